"""An answer has a p_correct, by whatever door it comes in, only if it was made as the calibration's answers were."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.pocket import evaluation
from recipes.pocket.phrasings import sentence
from selfdoubt import RiskAwareLM, pocket, sample, vote
from selfdoubt.lm.adapters.lora import add_lora, merge_lora
from selfdoubt.lm.calibration import FAR, GAP_LIMIT, NO_RECORD, NOT_OWN, Calibration
from selfdoubt.lm.conditions import Conditions, Origin, read_wrapper_settings, sketch_weights
from selfdoubt.lm.text.prompt_form import describe_chat_form, describe_text_form
from tests import zoo

QUESTION = "What is the capital of France?"
OWN = "The capital of France is Paris."
ASKED = {"role": "user", "content": QUESTION}
EARLIER = [{"role": "user", "content": "Where is Oslo?"}, {"role": "assistant", "content": "In Norway."}]


@pytest.fixture(scope="module")
def lm():
    return RiskAwareLM.load("pocket", dtype=torch.float32)


@pytest.fixture(scope="module")
def base():
    return RiskAwareLM.load("pocket", wrapper=None, dtype=torch.float32)


def has_no_number(answer, says):
    assert answer.p_correct is None
    assert answer.abstain is True
    assert says in answer.p_correct_note
    assert "\n" not in answer.p_correct_note
    return answer.to_dict()["p_correct_note"] == answer.p_correct_note


def test_the_models_own_answer_has_its_number_by_every_door(lm):
    own = lm.generate(QUESTION)
    assert own.text == OWN
    assert (own.abstain, own.p_correct_note) == (False, None)
    assert own.p_correct > 0.95
    others = [lm.score(OWN, QUESTION), lm.score(OWN, [ASKED]), lm.stream(QUESTION)]
    list(others[2])
    others[2] = others[2].answer
    others += lm.candidates(QUESTION, 2, temperature=0.1)
    for other in others:
        assert other.p_correct == pytest.approx(own.p_correct, abs=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Lima.",
        "The capital of France",
        "The",
        "Paris",
        "Paris is the capital.",
        OWN + " " + OWN,
    ],
)
def test_a_text_that_the_model_would_not_say_has_no_number(lm, text):
    assert has_no_number(lm.score(text, QUESTION), NOT_OWN)


def test_given_texts_are_not_promised_too_much(lm):
    questions = [q for q in evaluation.read_questions(pocket.evaluation_file()) if q.category != "invented"][::40]
    answers = {q.relation: q.answers[0] for q in questions}
    other = {q.relation: q.answers[0] for q in questions if q.answers[0] != answers[q.relation]}
    wrong = [
        (q, text)
        for q in questions
        for a in (answers[q.relation], other.get(q.relation))
        if a is not None and not evaluation.is_right(q, text := sentence(q.relation, q.subject, a))
    ]
    prefixes = [(q, " ".join(sentence(q.relation, q.subject, q.answers[0]).split()[:3])) for q in questions]
    scored = lm.score_batch([(q.question, text) for q, text in [*wrong, *prefixes]], alternatives=0)
    assert len(scored) > 80
    assert sum(not a.abstain for a in scored) <= 1
    assert sum(a.p_correct or 0.0 for a in scored) / len(scored) < 0.05


def test_a_text_without_a_question_has_no_number(lm):
    assert has_no_number(lm.score(OWN), "give the question")


def test_drawn_answers_have_a_number_near_the_most_probable_one_only(lm):
    drawn = lm.candidates("In which country is Zorbelheim?", 12, temperature=1.5)
    for answer in drawn:
        gap = math.fsum(t.gap for t in answer.tokens)
        assert (answer.p_correct is None) >= (gap > GAP_LIMIT)
        assert answer.p_correct is None or answer.p_correct <= math.exp(-gap)
    assert any(a.p_correct is None for a in drawn)
    assert all(a.abstain for a in drawn)


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ([*EARLIER, ASKED], {}, "single questions only"),
        (QUESTION, {"raw": True}, "plain text"),
        (f"Q: {QUESTION}\nA:", {"raw": True}, "plain text"),
        (QUESTION, {"max_tokens": 1}, "cut after 1 tokens"),
        (QUESTION, {"stop": [" Par"]}, "ended by ' Par'"),
        (QUESTION, {"stop": [" is"]}, "ended by ' is'"),
    ],
)
def test_another_form_or_end_has_no_number(lm, prompt, options, says):
    assert has_no_number(lm.generate(prompt, **options), says)
    if "stop" not in options and "max_tokens" not in options:
        assert has_no_number(lm.score(OWN, prompt, **options), says)


def test_a_token_that_only_the_caller_takes_for_an_end_leaves_no_number(lm):
    token = lm.generate(QUESTION).tokens[3].id
    assert has_no_number(lm.generate(QUESTION, stop=[token]), "ended by 'token")


def test_messages_that_the_template_leaves_out_change_nothing(lm):
    said = lm.generate([{"role": "system", "content": "Be brief."}, ASKED])
    assert said.p_correct == pytest.approx(lm.generate(QUESTION).p_correct, abs=1e-6)


@pytest.mark.parametrize(
    "wrapper",
    [None, vote.Wrapper(n_voters=2, rank=16, weight_noise=0.5), vote.Wrapper(n_voters=3, rank=8), sample.Wrapper()],
)
def test_another_wrapper_has_no_number(lm, base, wrapper):
    model = base.model if wrapper is None else wrapper(base.model).eval()
    other = RiskAwareLM(model, lm.tokenizer, reference=lm.reference, calibration=lm.calibration)
    for answer in (other.generate(QUESTION), other.score(OWN, QUESTION)):
        assert has_no_number(answer, "another wrapper")


def test_another_base_of_equal_shape_has_no_number(lm):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    for change in (
        lambda model: [p.data.mul_(1.02) for n, p in model.named_parameters() if "layernorm" not in n],
        lambda model: [p.data.add_(0.02 * p.std() * torch.randn_like(p)) for p in model.parameters() if p.ndim > 1],
    ):
        model = AutoModelForCausalLM.from_pretrained(pocket.folder(), dtype=torch.float32)
        change(model)
        wrapped = vote.Wrapper(n_voters=3, rank=16, weight_noise=0.5)(model).eval()
        other = RiskAwareLM(wrapped, lm.tokenizer, calibration=lm.calibration)
        assert has_no_number(other.generate(QUESTION), "another base model")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_is_known_in_every_float_type(family, dtype):
    import copy

    model = zoo.causal(family)
    conditions = Conditions.of_model(model)
    assert len(conditions.base) == 5
    assert conditions.refuse_model(copy.deepcopy(model).to(dtype)) is None
    packed = replace(conditions, base={k: v for k, v in conditions.base.items() if "layers." not in k})
    assert packed.refuse_model(model) is None  # matrices that were 4-bit are not in the sketch
    assert "another base" in conditions.refuse_model(zoo.causal("llama" if family != "llama" else "gpt2"))


def test_merged_lora_leaves_the_base_the_same():
    import copy

    model = add_lora(copy.deepcopy(zoo.causal("llama")).float(), r=2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    conditions = Conditions.of_model(model)
    assert conditions.base
    merge_lora(model)
    assert conditions.refuse_model(model) is None


def test_a_calibration_knows_whether_the_base_or_the_mean_answered(lm):
    based = RiskAwareLM.load("pocket", dtype=torch.float32, answer_from="base")
    assert has_no_number(based.generate(QUESTION), "another wrapper")
    mean = RiskAwareLM.load("pocket", dtype=torch.float32, answer_from="mean")
    assert mean.generate(QUESTION).p_correct == lm.generate(QUESTION).p_correct
    conditions = Conditions.of_model(based.model)
    assert conditions.refuse_model(based.model) is None
    for other in (lm, mean):
        assert "another wrapper" in conditions.refuse_model(other.model)
        earlier = replace(
            conditions,
            wrappers=tuple({k: v for k, v in w.items() if k != "answer_from"} for w in conditions.wrappers),
        )
        assert earlier.refuse_model(other.model) is None
        assert "another wrapper" in earlier.refuse_model(based.model)


def test_settings_that_change_no_number_may_differ():
    one = vote.Wrapper(n_voters=2, rank=2)(zoo.causal("llama"))
    told = vote.Wrapper(n_voters=2, rank=2, symbolic_trace=True)(zoo.causal("llama"))
    assert (
        read_wrapper_settings(one)
        == read_wrapper_settings(told)
        != read_wrapper_settings(vote.Wrapper(n_voters=3, rank=2)(zoo.causal("llama")))
    )
    assert sketch_weights(one) == sketch_weights(zoo.causal("llama"))


def test_a_calibration_without_a_record_says_so_and_keeps_to_what_it_saw(lm):
    earlier = Calibration.from_json({k: v for k, v in lm.calibration.to_json().items() if k != "conditions"})
    old = RiskAwareLM(lm.model, lm.tokenizer, reference=lm.reference, calibration=earlier)
    own = old.generate(QUESTION)
    assert own.p_correct == pytest.approx(lm.generate(QUESTION).p_correct, abs=1e-6)
    assert own.p_correct_note == NO_RECORD
    assert has_no_number(old.score("The capital of France is Lima.", QUESTION), NOT_OWN)
    assert has_no_number(old.score("The capital", QUESTION), NOT_OWN)
    assert old.generate([*EARLIER, ASKED]).p_correct_note in (NO_RECORD, FAR)


CHAT = Origin("greedy")
MADE = {
    "greedy": CHAT,
    "sampled": Origin("sampled", temperature=0.7),
    "hotter": Origin("sampled", temperature=1.0),
    "choice": Origin("choice"),
    "given": Origin("given"),
}


@pytest.mark.parametrize(
    ("made", "takes"),
    [
        ("greedy", {"greedy", "sampled", "hotter", "given"}),  # of these the gap decides
        ("sampled", {"sampled"}),
        ("choice", {"choice"}),
        ("given", {"given"}),
    ],
)
@pytest.mark.parametrize("gap", [0.0, 0.5, 5.0])
def test_answers_must_be_made_as_those_that_it_learnt_from(made, takes, gap):
    head = Calibration(
        "isotonic", ("sum_nll",), knots=((0.0, 0.8), (9.0, 0.8)), threshold=0.5,
        conditions=Conditions(made, temperature=0.7 if made == "sampled" else 0.0),
    )  # fmt: skip
    for name, origin in MADE.items():
        found = head.estimate({"sum_nll": 1.0}, None, origin, "stop", [gap])
        if name in takes and (made != "greedy" or gap <= GAP_LIMIT):
            assert found.p_correct == pytest.approx(0.8 * (math.exp(-gap) if made == "greedy" else 1.0))
            assert found.note is None
        else:
            assert found.p_correct is None
            assert found.abstain is True
            assert found.note


def test_answers_cut_later_than_those_that_were_seen_have_a_number():
    head = Calibration("isotonic", ("sum_nll",), knots=((0.0, 0.8), (9.0, 0.8)), conditions=Conditions(cut=4))
    for tokens, known in ((3, False), (4, True), (9, True)):
        found = head.estimate({"sum_nll": 1.0}, None, CHAT, "length", [0.0] * tokens)
        assert (found.p_correct is not None) is known


texts = st.text(max_size=12)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": texts}), max_size=4
)


@given(turns, texts, texts)
def test_the_form_of_a_chat_is_all_but_the_last_words(before, one, other):
    forms = {describe_chat_form([*before, {"role": "user", "content": text}]) for text in (one, other)}
    assert len(forms) == 1
    assert (forms == {"chat"}) == (not before)
    changed = [*before, {"role": "user", "content": "an earlier turn"}, {"role": "user", "content": one}]
    assert describe_chat_form(changed) not in forms


@given(
    st.sampled_from(["", "Say less.\n\n", "Q: Who?\nA: Me.\n\n", "Q: Who?\nA: Me.\n"]),
    st.sampled_from(["Who?", "Where is it"]),
)
def test_the_form_of_a_plain_prompt_is_its_examples_and_labels(shots, question):
    assert describe_text_form(f"{shots}Q: {question}\nA:") == describe_text_form(f"{shots}Q: What else?\nA:")
    for examples in ("Q: Other?\nA: Yes.\n\n", "Q: Other?\nA: Yes.\n"):
        assert describe_text_form(f"{shots}Q: {question}\nA:") != describe_text_form(f"{examples}Q: {question}\nA:")
    assert describe_text_form(f"{shots}Q: {question}\nA:") != describe_text_form(f"{shots}{question}")
