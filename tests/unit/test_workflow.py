"""``selfdoubt.evaluate`` and ``selfdoubt.calibrate``: the doors for Python."""

from __future__ import annotations

import json

import pytest
import torch

import selfdoubt
from selfdoubt import RiskAwareLM, vote
from selfdoubt.data.questions import Question
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.judges.rules import Exact
from selfdoubt.eval.judges.verdict import Verdict
from selfdoubt.eval.prompts import Prompting
from selfdoubt.workflow import load_asked
from tests.zoo import talker, tokenizer

CONFIG = EvaluationConfig(max_tokens=3, batch_size=20)
QUESTIONS = [(f"What is {i} and {i * i}?", ["this", f"number {i}"]) for i in range(60)]


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    return RiskAwareLM(vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5)(talker()).eval(), tokenizer())


def is_even(question: Question, answer: str | None) -> Verdict:
    return Verdict(int(question.text.split()[2]) % 2 == 0)


@pytest.fixture(scope="module")
def evaluation(lm, tmp_path_factory):
    return selfdoubt.evaluate(
        lm, QUESTIONS, tmp_path_factory.mktemp("run"), config=CONFIG, judge=is_even, states="none", draws=2
    )


def test_pairs_are_asked_judged_and_reported(evaluation):
    assert [record.question.text for record in evaluation.records] == [text for text, _ in QUESTIONS]
    assert evaluation.records[3].question.answers == ("this", "number 3")
    assert [record.correct for record in evaluation.records] == [i % 2 == 0 for i in range(60)]
    assert evaluation.report.to_json() == json.loads((evaluation.folder / "report.json").read_text(encoding="utf-8"))
    written = (evaluation.folder / "run.json").read_text(encoding="utf-8")
    assert json.dumps(evaluation.run.to_json(), indent=1, ensure_ascii=False) + "\n" == written
    assert evaluation.run.judge == "is_even"
    assert evaluation.sentences == evaluation.report.verdict.sentences
    assert all(path.is_file() for path in evaluation.files.values())


def test_a_file_and_its_questions_as_a_list_are_the_same_run(lm, tmp_path):
    rows = [{"id": f"q{i}", "question": q, "answers": a} for i, (q, a) in enumerate(QUESTIONS[:6])]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    listed = [Question(f"q{i}", q, answers=tuple(a)) for i, (q, a) in enumerate(QUESTIONS[:6])]
    options = {"config": CONFIG, "judge": "exact", "limit": 4, "seed": 7, "draws": 2}
    a = selfdoubt.evaluate(lm, file, tmp_path / "a", **options)
    b = selfdoubt.evaluate(lm, listed, tmp_path / "b", **{**options, "judge": Exact()})
    assert a.records == b.records
    assert len(a.records) == 4
    assert a.run.data == str(file)
    assert a.run.seed == 7
    assert lm.layers == ()


def test_a_run_is_calibrated_as_its_folder_is(lm, evaluation, tmp_path):
    options = {"candidates": ["answer"], "draws": 0}
    result = selfdoubt.calibrate(evaluation, out=tmp_path / "a", **options)
    other = selfdoubt.calibrate(evaluation.folder, out=tmp_path / "b", lm=lm, **options)
    assert result.calibration == other.calibration
    assert result.folder == tmp_path / "a"
    assert result.quality.chosen == "answer"
    assert result.evaluations == ()
    stored = json.loads((tmp_path / "a" / "selfdoubt.json").read_text(encoding="utf-8"))
    assert stored["calibration"] == json.loads(json.dumps(result.calibration.to_json()))
    assert any(line.startswith("answer *") for line in result.sentences)
    assert result.lines()[-1] == f"stored in {tmp_path / 'a' / 'selfdoubt.json'}"


def test_renewed_reports_come_back(evaluation, tmp_path):
    result = selfdoubt.calibrate([evaluation], out=tmp_path / "a", candidates=["answer"], draws=2)
    [renewed] = result.evaluations
    assert renewed.folder == evaluation.folder
    assert all(record.p_correct is not None for record in renewed.records)
    assert "p_correct" in renewed.report.probabilities


def test_a_model_that_settings_do_not_describe_must_be_given(evaluation, tmp_path):
    with pytest.raises(ConfigError, match="give the model, lm="):
        selfdoubt.calibrate(evaluation.folder, out=tmp_path / "a", candidates=["answer"], draws=0)


@pytest.mark.parametrize(
    ("error", "data", "options", "message"),
    [
        (DataError, [("Why?", "")], {}, "question 0 of the list, or an answer to it, is empty"),
        (ConfigError, QUESTIONS, {"task": "gen"}, "task say how to read a file"),
        (ConfigError, QUESTIONS, {"limit": 0}, "limit must be at least 1"),
        (ConfigError, QUESTIONS, {"draws": 1}, "draws must be at least 2"),
        (ConfigError, QUESTIONS, {"judge": "column:x"}, "needs a file with that column"),
        (ConfigError, QUESTIONS, {"states": "some"}, "auto, none, all or numbers"),
        (ConfigError, QUESTIONS, {"config": EvaluationConfig(Prompting(options=True))}, "has 0 choices"),
        (DataError, [], {}, "there are no questions"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(lm, tmp_path, error, data, options, message):
    with pytest.raises(error, match=message) as caught:
        selfdoubt.evaluate(lm, data, tmp_path / "run", **options)
    assert "\n" not in str(caught.value)


def test_repeated_questions_have_ids_of_their_own():
    assert len({q.id for q in load_asked([("Who?", "I"), ("Who?", ["you"]), ("Why?", ())])}) == 3
    assert load_asked([("Why?", ())])[0].answers == ()
