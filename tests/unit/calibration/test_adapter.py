"""From a run to an adapter and back: the same kind of prompt has a p_correct then, and no other has."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from selfdoubt import RiskAwareLM, vote
from selfdoubt.calibration.adapter import NO_CONDITIONS, write_adapter
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval import run_folder
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.prompts import Prompting
from selfdoubt.eval.records import Question
from selfdoubt.eval.run import ask_questions, describe_conditions
from selfdoubt.eval.settings import Run
from selfdoubt.lm.adapters.adapter import load_adapter
from selfdoubt.lm.calibration import read_calibration
from selfdoubt.workflow import calibrate
from tests.zoo import talker, tokenizer

SHOTS = (Question("s1", "Who was first?", answers=("Ada",)), Question("s2", "Who was last?", answers=("Alan",)))
PLANS = {
    "chat": EvaluationConfig(),
    "system": EvaluationConfig(Prompting(instruction="Be brief.")),
    "shots": EvaluationConfig(shots=SHOTS),
    "plain": EvaluationConfig(Prompting("qa")),
    "plain shots": EvaluationConfig(Prompting("qa"), SHOTS),
}
QUESTIONS = [Question(f"q{i}", f"What is {i} and {i * i}?", answers=("this",)) for i in range(40)]
CHOICES = [replace(q, choices=("this", "that", f"number {i}"), right=(0,)) for i, q in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5)(talker()).eval()


def ask_all(model, out, plan, questions=QUESTIONS, half=20, **about):
    """A run; what is right is made up, so that both kinds are there."""
    lm = RiskAwareLM(model, tokenizer(), **about)
    plan = replace(plan, max_tokens=6)
    asked = ask_questions(lm, questions, plan, out)
    risks = sorted(r.scores["sum_nll"] for r in asked.records)
    records = [
        replace(r, correct=(r.scores["sum_nll"] < risks[half]) != (i % 5 == 0)) for i, r in enumerate(asked.records)
    ]
    settings = Run(model="talker", conditions=describe_conditions(lm, questions, plan).to_json(), costs=asked.costs)
    run_folder.save_run(asked, records, settings, out)
    return records


def learnt(model, tmp_path, *folders):
    result = calibrate(
        folders, out=tmp_path / "adapter", lm=RiskAwareLM(model, tokenizer()), draws=0, candidates=["score", "answer"]
    )
    manifest = json.loads((tmp_path / "adapter" / "selfdoubt.json").read_text(encoding="utf-8"))
    return RiskAwareLM(model, tokenizer(), calibration=read_calibration(manifest)), result.warnings


@pytest.mark.parametrize("form", PLANS)
def test_a_run_gives_numbers_to_prompts_of_its_form_and_to_no_others(model, tmp_path, form):
    ask_all(model, tmp_path / "run", PLANS[form])
    lm, _ = learnt(model, tmp_path, tmp_path / "run")
    for name, plan in PLANS.items():
        prompts = [plan.prompt(q) for q in QUESTIONS[:8]]
        options = {"max_tokens": 6, "raw": plan.raw, "stop": ["\n"] if plan.raw else []}
        own = lm.generate(prompts, **options)
        given = lm.score_batch([(p, a.text) for p, a in zip(prompts, own, strict=True) if a.text.strip()], raw=plan.raw)
        if name == form:
            assert sum(a.p_correct is not None for a in own) >= 7
            again = ask_all(model, tmp_path / "again", plan, QUESTIONS[:24], calibration=lm.calibration)
            assert sum(r.p_correct is not None for r in again) >= 22
        else:
            for answer in (*own, *given):
                assert answer.p_correct is None
                assert re.search("ask in the same way|single questions only", answer.p_correct_note)


def test_choices_have_numbers_where_choices_were_learnt_from_and_own_answers_none(model, tmp_path):
    ask_all(model, tmp_path / "run", EvaluationConfig(), CHOICES)
    lm, _ = learnt(model, tmp_path, tmp_path / "run")
    again = ask_all(model, tmp_path / "again", EvaluationConfig(), CHOICES, calibration=lm.calibration)
    assert all(r.p_correct is not None for r in again)
    for answer in (lm.generate(QUESTIONS[0].text), lm.score("that", QUESTIONS[0].text)):
        assert answer.p_correct is None
        assert "answers picked among choices" in answer.p_correct_note


def test_runs_of_several_forms_are_learnt_together_but_not_of_several_makes(model, tmp_path):
    for name in ("chat", "shots"):
        ask_all(model, tmp_path / name, PLANS[name])
    ask_all(model, tmp_path / "choices", EvaluationConfig(), CHOICES)
    lm, warnings = learnt(model, tmp_path, tmp_path / "chat", tmp_path / "shots")
    assert len(lm.calibration.conditions.forms) == 2
    assert NO_CONDITIONS not in warnings
    with pytest.raises(ConfigError, match=r"were made otherwise than those of .*calibrate each alone"):
        learnt(model, tmp_path / "other", tmp_path / "chat", tmp_path / "choices")


def test_a_run_of_an_earlier_version_is_learnt_from_and_says_what_it_lacks(model, tmp_path):
    ask_all(model, tmp_path / "run", EvaluationConfig())
    about = tmp_path / "run" / "run.json"
    about.write_text('{"model": "talker", "costs": {}}', encoding="utf-8")
    lm, warnings = learnt(model, tmp_path, tmp_path / "run")
    assert NO_CONDITIONS in warnings
    assert lm.calibration.conditions is None
    assert "no record" in lm.generate(QUESTIONS[0].text, max_tokens=6).p_correct_note
    about.write_text('{"model": "talker", "conditions": {"made": "up"}}', encoding="utf-8")
    with pytest.raises(DataError, match="conditions that cannot be read"):
        learnt(model, tmp_path / "other", tmp_path / "run")


def test_a_calibrated_run_reports_the_guarantee_of_its_threshold(model, tmp_path):
    many = [Question(f"q{i}", f"What is {i} and {i * i}?", answers=("this",)) for i in range(160)]
    ask_all(model, tmp_path / "run", EvaluationConfig(), many, half=110)
    calibrate(
        tmp_path / "run", out=tmp_path / "adapter", lm=RiskAwareLM(model, tokenizer()), draws=2,
        candidates=["answer"], target_accuracy=0.6, confidence=0.9,
    )  # fmt: skip
    stored = json.loads((tmp_path / "adapter" / "selfdoubt.json").read_text(encoding="utf-8"))["calibration"]
    settings = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    shown = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["abstention"]
    assert settings["threshold"] == shown["threshold"] == stored["threshold"]
    assert settings["promise"] == shown["promise"] == stored["promise"]
    assert shown["decided"] == 160
    assert 0 < shown["answered"] < 160
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8").replace("&nbsp;", " ")
    assert "60 % right, with confidence 90 %, on questions like those it was set with" in page

    calibrate(  # without a target there is no threshold, and the report claims none
        tmp_path / "run", out=tmp_path / "other", lm=RiskAwareLM(model, tokenizer()), draws=2, candidates=["score"]
    )  # fmt: skip
    assert "threshold" not in json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert "why" in json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["abstention"]


@pytest.mark.parametrize("answer_from", [None, "base"])
def test_a_calibrated_adapter_answers_as_its_calibrated_answers_were_made(model, tmp_path, answer_from):
    lm = RiskAwareLM(model, tokenizer())
    folder = lm.save(tmp_path / "voters", base="talker")
    head = RiskAwareLM.load("pocket").calibration
    written = write_adapter(head, Run(adapter=str(folder), answer_from=answer_from), [], tmp_path / "out", lambda _: lm)
    spec = load_adapter(talker(), written.parent).spec
    assert spec == replace(model.spec, answer_from=answer_from)
