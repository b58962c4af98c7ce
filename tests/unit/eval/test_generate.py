"""Asking: a question's record does not depend on the batch around it, and each way of asking equals its slow form."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from selfdoubt import RiskAwareLM, vote
from selfdoubt.calibration.arrays import calibration_rows
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.generate import ask_batch, derive_seed
from selfdoubt.eval.prompts import Prompting
from selfdoubt.eval.records import Question, Record
from selfdoubt.eval.run import ask_questions, choose_quarter_layers
from selfdoubt.eval.scores.agreement import build_equivalence, cluster_answers
from selfdoubt.eval.scores.p_true import estimate_p_true
from tests.records import measured
from tests.zoo import talker, tokenizer

QUESTIONS = [
    Question("a", "What is the capital of France?", answers=("Paris",)),
    Question("b", "Hi?", answers=("Hello",)),
    Question("c", "Which currency do they use in Łódź?", answers=("Złoty",)),
]
CHOICES = [
    Question("d", "What do cats eat?", choices=("Meat", "Stones", "Light of the moon"), right=(0,)),
    Question("e", "Is it so?", choices=("Yes it is", "No"), right=(0, 1)),
]
PLAN = EvaluationConfig(max_tokens=5, batch_size=2, samples=3, p_true=True, seed=4)


def model(**options):
    torch.manual_seed(0)
    lm = RiskAwareLM(vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5)(talker()), tokenizer(), **options)
    lm.model.eval()
    return lm


def assert_close(a: Record, b: Record) -> None:
    assert (a.question, a.answer, a.finish, a.correct) == (b.question, b.answer, b.finish, b.correct)
    assert dict(a.scores) == pytest.approx(dict(b.scores), rel=1e-3, abs=1e-4)
    assert [s.text for s in a.samples] == [s.text for s in b.samples]


@pytest.mark.parametrize("style", ["chat", "qa"])
@pytest.mark.parametrize("questions", [QUESTIONS, CHOICES], ids=["open", "choices"])
def test_a_record_does_not_depend_on_the_batch_around_it(style, questions):
    lm, plan = model(layers=(1,)), replace(PLAN, how=Prompting(style))
    together = ask_batch(lm, questions, plan, build_equivalence("exact"))
    for i, question in enumerate(questions):
        alone = ask_batch(lm, [question], plan, build_equivalence("exact"))
        assert_close(together.records[i], alone.records[0])
        for name, states in together.states.items():
            torch.testing.assert_close(states[i], alone.states[name][0], rtol=1e-4, atol=1e-5)


def test_samples_are_those_that_the_model_draws_with_their_own_seeds():
    lm = model()
    record = ask_batch(lm, QUESTIONS[:1], PLAN, build_equivalence("exact")).records[0]
    for i, sample in enumerate(record.samples):
        drawn = lm.generate(QUESTIONS[0].text, max_tokens=5, temperature=1.0, seed=derive_seed(4, "a", i))
        assert sample.text == drawn.text.strip()
        assert sample.risk == pytest.approx(drawn.risk, rel=1e-3)
    assert {"self_consistency", "semantic_entropy", "semantic_entropy_weighted", "p_false"} <= set(record.scores)


def test_the_choice_is_the_one_that_the_model_finds_most_probable():
    lm = model()
    for question, record in zip(CHOICES, ask_batch(lm, CHOICES, PLAN, build_equivalence("exact")).records, strict=True):
        nll = [lm.score(choice, question.text).scores["sum_nll"] for choice in question.choices]
        best = nll.index(min(nll))
        assert record.answer == question.choices[best]
        shares = torch.tensor([-v for v in nll], dtype=torch.float64).softmax(0)
        assert record.grade == pytest.approx(float(shares[list(question.right)].sum()), rel=1e-4)
        assert record.correct == (best in question.right)
        assert record.scores["choice_nll"] == pytest.approx(-float(shares[best].log()), rel=1e-3, abs=1e-6)


def test_choices_may_be_shown_and_named_by_letter():
    plan = replace(PLAN, how=Prompting("chat", options=True))
    records = ask_batch(model(), CHOICES, plan, build_equivalence("exact")).records
    assert all(r.answer in r.question.choices for r in records)


def test_p_true_is_the_share_of_true_in_what_comes_next():
    lm = model()
    found = estimate_p_true(lm, [(QUESTIONS[0], "Paris"), (QUESTIONS[1], "")], PLAN)
    assert all(0 < p < 1 for p in found)
    assert estimate_p_true(lm, [(QUESTIONS[1], "")], PLAN)[0] == pytest.approx(found[1], rel=1e-4)
    # Both words of which the first letter is the whole of what can differ.
    words = [lm.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("True", "False")]
    assert words[0] != words[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 1}, "one sample agrees with nothing"),
        ({"samples": 2, "temperature": 0.0}, "the temperature of samples must be above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_a_plan_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationConfig(**settings)


def test_a_run_keeps_the_order_of_its_questions_and_never_asks_twice(tmp_path, monkeypatch):
    lm = model()
    lm.layers = choose_quarter_layers(lm)
    whole = ask_questions(lm, QUESTIONS, PLAN, tmp_path / "a")
    assert [r.question for r in whole.records] == QUESTIONS
    assert all(len(states) == 3 for states in whole.states.values())
    monkeypatch.setattr(lm, "generate", lambda *a, **k: pytest.fail("asked twice"))
    again = ask_questions(lm, QUESTIONS, PLAN, tmp_path / "a")
    assert again.records == whole.records
    assert again.costs == whole.costs
    for name, states in whole.states.items():
        assert torch.equal(states, again.states[name])
    with pytest.raises(ConfigError, match=r"holds answers of another run \(seed was 4, and is 5\)"):
        ask_questions(lm, QUESTIONS, replace(PLAN, seed=5), tmp_path / "a")
    with pytest.raises(ConfigError, match="questions was"):
        ask_questions(lm, QUESTIONS[:2], PLAN, tmp_path / "a")


def test_questions_that_cannot_be_asked_together(tmp_path):
    with pytest.raises(DataError, match="2 of 5 questions have choices"):
        ask_questions(model(), QUESTIONS + CHOICES, PLAN, tmp_path)
    with pytest.raises(DataError, match="the id 'a' comes twice"):
        ask_questions(model(), QUESTIONS + QUESTIONS[:1], PLAN, tmp_path)
    with pytest.raises(DataError, match="there are no questions"):
        ask_questions(model(), [], PLAN, tmp_path)


@pytest.mark.parametrize("style", ["chat", "qa"])
def test_empty_answers_have_the_surprisal_of_their_end(style):
    lm, plan = model(), replace(PLAN, how=Prompting(style), samples=8, p_true=False)
    prompts = [plan.prompt(q) for q in QUESTIONS]
    firsts = [lm.generate(p, raw=plan.raw, max_tokens=1).tokens[0] for p in prompts]
    drawn = [
        lm.generate(p, raw=plan.raw, max_tokens=1, temperature=1.0, seed=derive_seed(plan.seed, q.id, i)).tokens[0]
        for p, q in zip(prompts, QUESTIONS, strict=True)
        for i in range(0, 8, 3)
    ]
    lm.stop_ids = frozenset(t.id for t in (firsts[0], *drawn))  # the first answer and some samples end at once
    found = ask_batch(lm, QUESTIONS, plan, build_equivalence("exact")).records
    assert found[0].answer == ""
    assert found[0].scores["sum_nll"] == pytest.approx(firsts[0].nll, rel=1e-4)
    assert set(found[0].scores) == set(found[1].scores)
    for record, p in zip(found, prompts, strict=True):
        seeds = [derive_seed(plan.seed, record.question.id, i) for i in range(8)]
        own = lm.generate([p] * 8, seeds=seeds, temperature=1.0, max_tokens=plan.max_tokens, raw=plan.raw,
                          stop=["\n"] if plan.raw else [])  # fmt: skip
        assert any(not a.tokens for a in own)
        weights = [math.exp(-a.scores["sum_nll"]) for a in own]
        of = cluster_answers([s.text for s in record.samples])
        mass = [sum(w for w, c in zip(weights, of, strict=True) if c == one) / sum(weights) for one in set(of)]
        expected = -sum(m * math.log(m) for m in mass)
        assert record.scores["semantic_entropy_weighted"] == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert expected > 0 or len(mass) == 1


def test_a_run_with_empty_answers_compares_all_of_them():
    lm, plan = model(), replace(PLAN, samples=0, p_true=False)
    questions = [Question(f"q{i}", f"What is number {i} of {i * i}?", answers=("x",)) for i in range(30)]
    firsts = [lm.generate(q.text, max_tokens=1).tokens[0].id for q in questions]
    lm.stop_ids = frozenset(firsts[:3])
    found = [
        replace(r, correct=i % 3 > 0)
        for i, r in enumerate(ask_batch(lm, questions, plan, build_equivalence("exact")).records)
    ]
    assert any(r.answer == "" for r in found)
    report = measured(found, draws=20)
    assert "why" not in report["picked"]
    assert all(score["note"] is None and score["judged"] == 30 for score in report["scores"].values())
    assert len(calibration_rows(found)[0]) == 30
