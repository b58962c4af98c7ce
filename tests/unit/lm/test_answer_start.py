"""Voters that read the answer only: their scores, stored settings, training, and the ways that they refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import selfdoubt
from selfdoubt import RiskAwareLM, vote
from selfdoubt.errors import ConfigError, ShapeError, WrapError
from selfdoubt.lm.adapters.export import export_peft
from selfdoubt.lm.conditions import Conditions
from selfdoubt.lm.noise_search import _read, _Text
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.train import TrainConfig
from selfdoubt.train.batches import collate
from selfdoubt.train.head import get_head
from selfdoubt.train.wrapper_settings import build_wrapper, choose_wrapper
from tests.zoo import causal, mlp, prompts, talker, tokenizer

SPEC = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5, start="answer")
QUESTION = "What is the capital of France?"


def talking(spec=SPEC, **options):
    return RiskAwareLM(spec(talker()).eval(), tokenizer(), **options)


def test_no_score_compares_members_on_the_question():
    answer = talking().generate(QUESTION, max_tokens=6)
    usual = talking(vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5)).generate(QUESTION, max_tokens=6)
    left_out = usual.scores.keys() - answer.scores.keys()
    signals = ("aleatoric", "epistemic", "disagreement", "spread")
    assert left_out == {f"{part}_{pool}_{s}" for part in ("question", "both") for pool in ("sum", "mean", "max")
                        for s in signals}  # fmt: skip
    assert answer.scores["mean_epistemic"] > 1e-4
    plain = RiskAwareLM(talker(), tokenizer()).generate(QUESTION, max_tokens=6)
    assert answer.scores["question_sum_nll"] == pytest.approx(plain.scores["question_sum_nll"])


def test_streams_and_batches_say_what_each_question_gets_alone():
    lm = talking()
    answers = [lm.generate(question, max_tokens=6) for question in (QUESTION, "Hi")]
    stream = lm.stream(QUESTION, max_tokens=6)
    assert [token.epistemic for token in stream] == pytest.approx([t.epistemic for t in answers[0].tokens])
    for ours, theirs in zip(lm.generate([QUESTION, "Hi"], max_tokens=6), answers, strict=True):
        assert ours.scores == pytest.approx(dict(theirs.scores), rel=1e-3, abs=1e-5)
    texts = ["Paris is the capital.", "No."]
    pairs = [(QUESTION, texts[0]), ("Hi", texts[1])]
    alone = [lm.score(text, question) for question, text in pairs]
    for ours, theirs in zip(lm.score_batch(pairs), alone, strict=True):
        assert ours.scores == pytest.approx(dict(theirs.scores), rel=1e-3, abs=1e-5)
        assert ours.scores["mean_epistemic"] > 1e-4


def test_a_text_that_answers_nothing_is_read_by_all_members():
    text = "The capital of France is Paris."
    alone = talking().score(text)
    assert max(token.epistemic for token in alone.tokens) > 1e-4
    usual = talking(vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5)).score(text)
    assert [t.epistemic for t in alone.tokens] == pytest.approx([t.epistemic for t in usual.tokens])


@pytest.mark.parametrize("risk", ["question_mean_epistemic", "both_sum_disagreement"])
def test_a_risk_that_needs_members_on_the_question_is_refused(risk):
    with pytest.raises(ConfigError, match=rf"^risk='{risk}' compares members on the question, .*start='prompt'$"):
        talking(risk=risk)
    assert talking(risk="question_mean_nll").generate(QUESTION, max_tokens=2).risk_name == "question_mean_nll"


def test_settings_come_back_and_older_ones_mean_the_prompt(tmp_path):
    folder = selfdoubt.save(SPEC(causal("llama")), tmp_path)
    assert selfdoubt.load(folder, causal("llama")).spec == SPEC
    manifest = json.loads((folder / "selfdoubt.json").read_text())
    del manifest["wrappers"][0]["start"], manifest["checksums"]
    (folder / "selfdoubt.json").write_text(json.dumps(manifest))
    assert selfdoubt.load(folder, causal("llama")).spec == replace(SPEC, start="prompt")
    table = choose_wrapper({}, {"start": "end"}, seed=0)
    with pytest.raises(ConfigError, match=r"^wrapper\.start must be .*'end'"):
        build_wrapper(table)


def test_a_calibration_is_of_one_start():
    usual = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5)
    ours, theirs = (Conditions.of_model(spec(causal("llama"))) for spec in (SPEC, usual))
    assert ours.refuse_model(SPEC(causal("llama"))) is None
    assert "another wrapper" in ours.refuse_model(usual(causal("llama")))
    earlier = Conditions(
        wrappers=tuple({k: v for k, v in w.items() if k != "start"} for w in theirs.wrappers), base=theirs.base
    )
    assert earlier.refuse_model(usual(causal("llama"))) is None
    assert "another wrapper" in earlier.refuse_model(SPEC(causal("llama")))


def test_they_are_no_peft_adapters(tmp_path):
    with pytest.raises(WrapError, match=r"^voters with start='answer' read the answer only, .*start='prompt'$"):
        export_peft(SPEC(causal("llama")), tmp_path / "out", base="me/base")


def test_flags_and_files_of_training():
    table = choose_wrapper({}, {"start": "answer", "n_voters": 2}, seed=0)
    assert (build_wrapper(table).start, build_wrapper(table).n_voters) == ("answer", 2)
    text = choose_wrapper({"wrapper": "vote:start=answer"}, {}, seed=0)
    assert build_wrapper(text).start == "answer"
    with pytest.raises(ConfigError, match="loss_on='response'"):
        TrainConfig(data="", out="", wrapper=SPEC, loss_on="all", batch_size=3)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("voter_batch", ["split", "repeat"])
def test_the_loss_of_training_is_that_of_generation(voter_batch, packed):
    from selfdoubt.train.module import RiskAwareModule

    model = SPEC(causal("llama"))
    config = TrainConfig(data="", out="", wrapper=SPEC, batch_size=3, voter_batch=voter_batch, pack=packed)
    starts, answers = prompts(4, 6, 2, 5, 3, 3), prompts(3, 2, 4, 2, 3, 2, seed=1)
    examples = [
        {"ids": [*start, *answer], "counts": [False] * len(start) + [True] * len(answer)}
        for start, answer in zip(starts, answers, strict=True)
    ]
    rows = [examples[i : i + 2] for i in (0, 2, 4)] if packed else [[e] for e in examples[::2]]
    batch = collate(rows, 1, 24 if packed else None, packed=packed)
    expected = torch.zeros((), dtype=torch.float64)
    for row, members in enumerate(rows):
        for example in members:
            place = examples.index(example)
            stepper = HFStepper(model)
            steps = [piece.logits for _, piece in stepper.start([starts[place]])][-1:]
            steps += [stepper.step(torch.tensor([token])).logits[:, :, None] for token in answers[place][:-1]]
            logp = torch.cat(steps, 2)[:, 0].log_softmax(-1)
            of_members = -logp[:, range(len(answers[place])), answers[place]].sum(1)
            expected += of_members[row] if voter_batch == "split" else of_members.sum()
    loss = RiskAwareModule(model, config).loss(batch)
    assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert get_head(model).weight.grad is None


def test_validation_masks_the_base_row_too():
    from selfdoubt.train.module import RiskAwareModule

    losses = []
    examples = [{"ids": p, "counts": [False] * 3 + [True] * (len(p) - 3)} for p in prompts(6, 8)]
    for answer_from in ("mean", "base"):
        spec = vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5, start="answer", answer_from=answer_from)
        module = RiskAwareModule(spec(causal("llama")), TrainConfig(data="", out="", wrapper=spec))
        module.validation_step(collate([[e] for e in examples], 1), 0)
        losses.append(module.val_loss.compute())
    assert_close(losses[0], losses[1])


def test_the_search_for_noise_reads_prompts_with_the_base():
    model = vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5, start="answer", answer_from="base")(causal("llama"))
    (prompt, answer), (longer, _) = prompts(5, 3), prompts(9, 1, seed=2)
    texts = [_Text([*prompt, *answer[:2]], 3), _Text([*longer, *answer[:2]], 3)]
    ours = _read(model, texts, 3).view(3, 2, 3, -1)
    for row, start in enumerate((prompt, longer)):
        stepper = HFStepper(model)
        steps = [piece.logits for _, piece in stepper.start([start])][-1:]
        steps += [stepper.step(torch.tensor([token])).logits[:, :, None] for token in answer[:2]]
        assert_close(ours[:, row], torch.cat(steps, 2)[:, 0], rtol=1e-5, atol=1e-5)


def test_positions_that_a_layer_does_not_have_are_refused():
    wrapped = vote.Wrapper(n_voters=2)(mlp())
    with pytest.raises(ShapeError, match=r"^members that are active at some of 7 positions .*param_filter"):
        wrapped.forward_rows(torch.randn(4, 4, dtype=torch.float64), active=torch.ones(4, 7, dtype=torch.bool))
