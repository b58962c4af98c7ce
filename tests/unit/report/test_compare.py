"""Two runs on the same questions: joined by id, paired, and refused where they do not fit."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import bootstrap

from selfdoubt.errors import DataError
from selfdoubt.eval.records import save_records
from selfdoubt.metrics import auroc
from selfdoubt.report import compare_runs
from tests.records import judged, record


def write(folder, records, run=None):
    folder.mkdir()
    save_records(folder / "answers.jsonl", records)
    (folder / "report.json").write_text(json.dumps({"run": run or {}}))
    return folder


def compared(a, b, **options):
    """Return what ``selfdoubt compare --json`` prints."""
    return compare_runs(a, b, **options).to_json()


@pytest.fixture
def better():
    """The same questions; four wrong answers in five of the last 30 are right now."""
    return [replace(r, correct=r.correct or (i >= 50 and i % 5 > 0)) for i, r in enumerate(judged(80))]


def test_a_run_does_not_differ_from_itself_in_any_order(tmp_path):
    records = judged(60)
    mixed = random.Random(0).sample(records, 60)
    found = compared(write(tmp_path / "a", records), write(tmp_path / "b", mixed), draws=50)
    assert found["shared"] == found["judged"] == 60
    assert found["accuracy"]["difference"] == {"value": 0, "low": 0, "high": 0}
    for own in found["scores"].values():
        for metric in ("auroc", "prr"):
            if own[metric]["a"] is not None:
                assert own[metric]["difference"] == {"value": 0, "low": 0, "high": 0}


def test_the_difference_in_accuracy_is_paired(tmp_path, better):
    found = compared(write(tmp_path / "a", judged(80)), write(tmp_path / "b", better), draws=2000)
    steps = np.array([float(y.correct) - float(x.correct) for x, y in zip(judged(80), better, strict=True)])
    own = found["accuracy"]["difference"]
    assert own["value"] == pytest.approx(steps.mean())
    other = bootstrap((steps,), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(0))
    assert (own["low"], own["high"]) == pytest.approx(tuple(other.confidence_interval), abs=0.02)
    right = found["right"]
    assert right["only_b"] == steps.sum()
    assert right["only_a"] == 0
    assert sum(right.values()) == 80


def test_scores_are_measured_on_each_run_s_own_judgements(tmp_path, better):
    found = compared(write(tmp_path / "a", judged(80)), write(tmp_path / "b", better), draws=20)["scores"]["good"]
    for key, records in (("a", judged(80)), ("b", better)):
        score, right = np.array([r.scores["good"] for r in records]), np.array([r.correct for r in records])
        assert found["auroc"][key] == pytest.approx(auroc(score, right))
    assert found["auroc"]["difference"]["value"] == pytest.approx(found["auroc"]["b"] - found["auroc"]["a"])


def test_only_shared_and_judged_questions_count_and_the_others_are_told(tmp_path):
    records = judged(60)
    other = [replace(r, correct=None) if i < 3 else r for i, r in enumerate(records[10:])]
    comparison = compare_runs(write(tmp_path / "a", records), write(tmp_path / "b", [*other, record("new")]), draws=20)
    found = comparison.to_json()
    assert (found["shared"], found["judged"], found["only"]) == (50, 47, {"a": 10, "b": 1})
    text = "\n".join(comparison.lines())
    assert "50 questions in both, 47 of them judged in both; 10 only in A, 1 only in B" in text


def test_a_score_of_one_run_only_is_left_out_with_the_reason(tmp_path):
    less = [replace(r, scores={"sum_nll": r.scores["sum_nll"]}) for r in judged(40)]
    found = compared(write(tmp_path / "a", judged(40)), write(tmp_path / "b", less), draws=20)
    assert set(found["scores"]) == {"p_correct", "sum_nll"}
    assert found["left_out"] == dict.fromkeys(("good", "flat"), "no question has it in both runs")


def test_the_text_names_p_correct_and_the_baseline_first(tmp_path, better):
    lines = compare_runs(write(tmp_path / "a", judged(80)), write(tmp_path / "b", better), draws=20).lines()
    start = next(i for i, line in enumerate(lines) if line.startswith("score"))
    assert [line.split()[0] for line in lines[start + 1 :: 2]][:3] == ["calibrated", "sequence", "good"]


def test_what_is_not_defined_is_no_number(tmp_path):
    right = [replace(r, correct=True) for r in judged(20)]
    found = compared(write(tmp_path / "a", judged(20)), write(tmp_path / "b", right), draws=20)
    own = found["scores"]["good"]["prr"]
    assert own["a"] is not None
    assert (own["b"], own["difference"]["value"]) == (None, None)
    assert "right" in own["difference"]["why"]
    json.dumps(found, allow_nan=False)
    unjudged = [replace(r, correct=None) for r in judged(20)]
    comparison = compare_runs(tmp_path / "a", write(tmp_path / "c", unjudged), draws=20)
    assert comparison.accuracy.difference.value is None
    assert "no shared question is judged" in comparison.lines()[-1]


def test_runs_that_share_nothing_are_refused(tmp_path):
    with pytest.raises(DataError, match="share no question"):
        compared(write(tmp_path / "a", judged(5)), write(tmp_path / "b", [record("other")]))


def test_another_question_under_the_same_id_is_refused(tmp_path):
    other = [record("q0", text="Something else?")]
    with pytest.raises(DataError, match=r"the id 'q0' is 'What is q0\?' in .* and 'Something else\?'"):
        compared(write(tmp_path / "a", judged(5)), write(tmp_path / "b", other))


def test_a_folder_that_was_not_evaluated_is_named(tmp_path):
    good = write(tmp_path / "a", judged(5))
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"b/report.json cannot be read .* `selfdoubt evaluate`"):
        compared(good, tmp_path / "b")
    (tmp_path / "b" / "report.json").write_text("[1]")
    with pytest.raises(DataError, match="is not a report"):
        compared(good, tmp_path / "b")
