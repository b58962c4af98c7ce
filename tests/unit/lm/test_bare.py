"""A model without an adapter stays what it is: its own tokens, and its own surprisal and entropy as its risk."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdoubt import RiskAwareLM, Wrapped, pocket, sample, sculpt, vote
from selfdoubt.errors import ConfigError, UntrainedWarning
from selfdoubt.lm.answer_from import check_answer_from
from selfdoubt.lm.text.prompt import encode
from tests import real

QUESTIONS = ["What is the capital of France?", "In which country is Tartu?", "who wrote faust"]


def assert_bare(folder, max_tokens):
    """The tokens are those of Hugging Face's own ``generate``, and the risk is what one pass gives."""
    lm = RiskAwareLM.load(folder)
    assert not isinstance(lm.model, Wrapped)
    assert lm.note.startswith("nothing was trained for the risk of this model, so it is the model's own surprisal")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=next(lm.model.parameters()).dtype)
    stops = sorted(lm.stop_ids)
    for question in QUESTIONS:
        answer = lm.generate(question, max_tokens=max_tokens)
        ids = torch.tensor([encode(tokenizer, question).ids])
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens, eos_token_id=stops,
            pad_token_id=stops[0],
        )  # fmt: skip
        assert [t.id for t in answer.tokens] == [i for i in found[0, ids.shape[1] :].tolist() if i not in stops]
        assert answer.risk == answer.scores["sum_nll"] > 0
        assert answer.scores["sum_total"] > 0


def test_the_pocket_without_its_voters_says_what_generate_says():
    assert_bare(pocket.folder(), 16)


def test_a_real_model_says_what_generate_says():
    assert_bare(real.model("smollm2"), 12)


def test_the_pocket_by_its_name_keeps_its_trained_voters():
    lm = RiskAwareLM.load("pocket")
    assert lm.model.spec.n_voters == 3
    assert lm.note is None


@pytest.mark.parametrize(
    ("wrapper", "answers", "note"),
    [
        (vote.Wrapper(n_voters=2, rank=2), "base", "this vote is untrained: the answers are the base model's own"),
        (sample.Wrapper(n_samples=2), "base", "this sample is untrained: the answers are the base model's own"),
        (sample.Wrapper(answer_from="mean"), "mean", "this sample is untrained, and its members make .* answers worse"),
        (sculpt.Wrapper(), None, "this sculpt is untrained: its scale says nothing yet"),
    ],
)
def test_an_untrained_wrapper_works_when_asked_for_and_warns(wrapper, answers, note):
    with pytest.warns(UntrainedWarning, match=note):
        lm = RiskAwareLM.load(pocket.folder(), wrapper=wrapper)
    assert lm.model.spec == (wrapper if answers is None else replace(wrapper, answer_from=answers))
    assert lm.generate(QUESTIONS[0], max_tokens=3).tokens
    assert lm.note == lm.front.note


def test_who_asks_for_a_plain_model_is_told_nothing(recwarn):
    assert RiskAwareLM.load(pocket.folder(), wrapper=None).note is None
    assert not recwarn.list


def assert_plain_tokens(folder, questions, max_tokens, wrapper, **options):
    """The base row's tokens are the plain model's; its surprisals are those of the plain model to rounding."""
    with pytest.warns(UntrainedWarning):
        lm = RiskAwareLM.load(folder, wrapper=wrapper, **options)
    plain = RiskAwareLM.load(folder, wrapper=None, **options)
    for first in range(0, len(questions), 50):
        some = questions[first : first + 50]
        ours, theirs = (m.generate(some, max_tokens=max_tokens, batch_size=50) for m in (lm, plain))
        for answer, expected in zip(ours, theirs, strict=True):
            assert [t.id for t in answer.tokens] == [t.id for t in expected.tokens]
            assert answer.scores["sum_nll"] == pytest.approx(expected.scores["sum_nll"], rel=1e-3, abs=1e-3)
            assert answer.scores["max_divergence"] > 0
        gc.collect()  # the checker of shapes keeps tensors in cycles


@pytest.mark.parametrize("wrapper", [vote.Wrapper(rank=16), sample.Wrapper()], ids=["vote", "sample"])
def test_untrained_members_leave_the_pockets_tokens_as_they_are(wrapper):
    assert_plain_tokens(pocket.folder(), QUESTIONS, 12, wrapper)


def test_untrained_members_leave_a_real_models_tokens_as_they_are():
    assert_plain_tokens(real.model("smollm2"), QUESTIONS, 8, vote.Wrapper(rank=16), dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", [vote.Wrapper(rank=16), sample.Wrapper()], ids=["vote", "sample"])
def test_untrained_members_leave_a_thousand_answers_as_they_are(real, wrapper):
    from selfdoubt.data.question_sets import load_questions
    from tests.real import model

    questions = [q.text for q in load_questions(real("webquestions/test.json"), limit=1000)]
    assert_plain_tokens(model("smollm2"), questions, 12, wrapper, dtype=torch.float32)


@pytest.mark.parametrize("answer_from", ["base", "mean"])
def test_who_answers_is_chosen_for_an_adapter_and_is_an_error_without_members(answer_from):
    lm = RiskAwareLM.load("pocket", answer_from=answer_from)
    assert lm.model.spec.answer_from == answer_from
    token = lm.generate(QUESTIONS[0], max_tokens=2).tokens[0]
    assert (token.divergence is not None) == (answer_from == "base")
    for wrapper, kind in ((None, "plain"), (sculpt.Wrapper(), "sculpt")):
        with pytest.raises(ConfigError, match=rf"^answer_from='{answer_from}' chooses .* has none \({kind}\)"):
            RiskAwareLM.load(pocket.folder(), wrapper=wrapper, answer_from=answer_from)


def test_another_word_for_who_answers_is_refused():
    with pytest.raises(ConfigError, match="answer_from must be 'base' or 'mean', or left out, got 'voters'"):
        check_answer_from("voters")
