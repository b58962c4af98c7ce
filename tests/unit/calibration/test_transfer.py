"""Heads on hidden states, chosen by what transfers to a set of questions that was left out; and p_answerable."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.preprocessing import StandardScaler

from selfdoubt.calibration import heads
from selfdoubt.calibration.arrays import calibration_arrays
from selfdoubt.calibration.fit import fit_calibration
from selfdoubt.calibration.quality import measure_quality
from selfdoubt.errors import LoadError
from selfdoubt.eval.records import Question, Record
from selfdoubt.lm.calibration import Calibration
from selfdoubt.metrics import prr


def build_records(logit, sure, asked, rng):
    """Records that are right with the probability of these logits."""
    correct = rng.random(len(logit)) < 1 / (1 + np.exp(-logit))
    return [
        Record(
            Question(f"q{i}", f"What is number {i}?"),
            "an answer",
            {"sum_nll": sure[i], "mean_total": sure[i] / 3 + 0.1, "question_mean_nll": asked[i]},
            correct=bool(correct[i]),
        )
        for i in range(len(logit))
    ]


def hide_in_state(signal, rng, width=96, loud=10.0):
    """Hidden states in which loud directions say nothing, and the signal is one of the quiet ones."""
    n = len(signal)
    basis = np.linalg.qr(rng.normal(size=(width, width)))[0]
    values = rng.normal(size=(n, width)) * np.concatenate([np.full(4, loud), np.ones(width - 4)])
    values[:, 20] = signal
    return (values @ basis.T).astype(np.float32)


def quiet_world(n=700, seed=0, position="mean"):
    """What is right hangs on a quiet direction of one state, and a little on the surprisal."""
    rng = np.random.default_rng(seed)
    signal, sure, asked = rng.normal(size=n), rng.exponential(2, n), rng.exponential(1, n)
    logit = 2.5 * signal - 0.5 * (sure - 2) - 0.5
    states = {f"{p}.{layer}": rng.normal(size=(n, 96)) for p in ("first", "mean", "question") for layer in (3,)}
    states[f"{position}.3"] = hide_in_state(signal, rng)
    return build_records(logit, sure, asked, rng), states, logit


def test_a_signal_in_a_quiet_direction_of_a_state_is_learnt_as_well_as_scikit_learn_learns_it():
    """Its best strength of the penalty, picked by the very numbers that are compared."""
    records, states, _ = quiet_world()
    head, report = fit_calibration(records, states)
    assert report.chosen == "state"
    assert str(head.state.key) == "mean.3"
    y = np.array([r.correct for r in records])
    scores = [[r.scores["sum_nll"], r.scores["question_mean_nll"]] for r in records]
    x = StandardScaler().fit_transform(np.hstack([states["mean.3"], scores]))
    learners = [LogisticRegression(C=c, max_iter=2000) for c in (0.01, 0.1, 1.0, 10.0)]
    theirs = [roc_auc_score(y, cross_val_predict(each, x, y, cv=5, method="predict_proba")[:, 1]) for each in learners]
    assert report.best.inside.auroc > max(theirs) - 0.02
    without = next(c for c in report.candidates if c.name == "question")
    assert report.best.inside.auroc > without.inside.auroc + 0.1
    assert report.best.inside.prr > without.inside.prr + 0.2


def misleading_world(seed=0):
    """Three sets: "first.0" separates each in a direction of its own, "mean.0" all in the same one, but less."""
    rng = np.random.default_rng(seed)
    n = 600
    sets = np.arange(n) % 3
    signal, sure, asked = rng.normal(size=n), rng.exponential(2, n), rng.exponential(1, n)
    records = build_records(1.5 * signal - 0.3 * (sure - 2), sure, asked, rng)
    right = np.array([1 if r.correct else -1 for r in records])
    misled = rng.normal(size=(n, 3)) * 0.3 + (2 * (np.arange(3) == sets[:, None]) - 0.5) * right[:, None]
    shared = rng.normal(size=(n, 3))
    shared[:, 0] = signal
    return records, {"first.0": misled, "mean.0": shared}, [f"set {i}" for i in sets]


def test_of_several_sets_the_head_that_transfers_is_chosen():
    records, states, sets = misleading_world()
    misled = {"first.0": states["first.0"]}
    inside, _ = fit_calibration(records, misled)
    assert inside.state is not None  # like these questions, the state is the best there is
    head, report = fit_calibration(records, misled, sets=sets)
    assert report.chosen != "state"
    assert head.state is None
    assert report.sets == ("set 0", "set 1", "set 2")
    state = next(c for c in report.candidates if c.name == "state")
    assert state.inside.log_loss < report.best.inside.log_loss
    assert state.outside.log_loss > report.best.outside.log_loss
    text = "\n".join(report.lines())
    assert "chosen by the log loss on each of 3 sets by a head that has not seen it" in text
    assert "AUROC, other sets" in text
    entry = json.loads(json.dumps(report.to_json()))
    assert entry["chosen_by"] == "sets"
    assert list(entry["candidates"][0]["by_set"]) == ["set 0", "set 1", "set 2"]
    assert head.about["chosen_by"] == "sets"
    assert head.about["outside"]["prr"] == report.best.outside.prr


def test_of_several_states_the_one_that_transfers_is_read():
    records, states, sets = misleading_world()
    inside, _ = fit_calibration(records, states)
    assert str(inside.state.key) == "first.0"
    head, report = fit_calibration(records, states, sets=sets)
    assert report.chosen == "state"
    assert str(head.state.key) == "mean.0"


def test_numbers_of_sets_are_means_over_them_by_heads_that_have_not_seen_them():
    records, states, sets = misleading_world()
    _, report = fit_calibration(records, states, sets=sets, candidates=["question"])
    p = np.array(report.out_of_topic)
    y = np.array([r.correct for r in records])
    names = np.array(sets)
    losses = []
    for name in report.sets:
        rows = names == name
        rest = [r for r, out in zip(records, rows, strict=True) if not out]
        arrays = calibration_arrays(rest, np.arange(len(rest)), {}, [s for s in sets if s != name])
        again = heads.fit_logistic(arrays, 0, report.best.features)
        theirs = [again.p_correct(r.scores) for r, out in zip(records, rows, strict=True) if out]
        known = np.array([t is not None for t in theirs])
        assert p[rows][known] == pytest.approx([t for t in theirs if t is not None])
        losses.append(log_loss(y[rows], p[rows]))
        assert report.best.by_set[name].log_loss == pytest.approx(losses[-1])
        assert report.best.by_set[name].prr == pytest.approx(prr(1 - p[rows], y[rows]))
    assert report.best.outside.log_loss == pytest.approx(np.mean(losses))
    assert report.best.outside.answers == len(records)


def test_one_set_is_chosen_by_folds_and_so_are_sets_too_small_to_leave_out():
    records, states, _ = quiet_world(200)
    for sets in (["a"] * 200, ["a"] * 196 + ["b"] * 4):
        _, report = fit_calibration(records, states, sets=sets, candidates=["question"])
        assert report.sets == ()
        assert report.chosen_by == "folds"
        assert "chosen by the log loss on questions like these" in "\n".join(report.lines())


@pytest.mark.parametrize("position", ["first", "question"])
def test_p_answerable_reads_what_is_known_before_the_answer(position):
    records, states, logit = quiet_world(position=position)
    head, report = fit_calibration(records, states)
    alone = head.answerable
    assert report.answerable.chosen == "state"
    assert str(alone.state.key) == f"{position}.3"
    assert all(name.startswith("question_") for c in report.answerable.candidates for name in c.features)
    y = [r.correct for r in records]
    assert roc_auc_score(y, report.answerable.out_of_fold) > roc_auc_score(y, logit) - 0.12
    assert report.answerable.best.inside.auroc == pytest.approx(roc_auc_score(y, report.answerable.out_of_fold))
    assert head.about["answerable"]["inside"]["auroc"] == report.answerable.best.inside.auroc
    assert "from the question alone, before the first token (p_answerable):" in report.lines()
    assert set(head.layers) == {3}


def test_p_answerable_never_reads_the_mean_over_the_answer():
    records, states, _ = quiet_world(position="mean")
    head, report = fit_calibration(records, states)
    assert head.state.position == "mean"
    assert report.answerable.best.inside.auroc < 0.65
    assert head.answerable.state is None or head.answerable.state.position != "mean"


def test_without_scores_of_the_question_there_is_no_p_answerable():
    records, _, _ = quiet_world(200)
    blind = [replace(r, scores={k: v for k, v in r.scores.items() if "question" not in k}) for r in records]
    head, report = fit_calibration(blind)
    assert head.answerable is None
    assert report.answerable is None
    assert report.to_json()["answerable"] is None


def test_a_head_with_p_answerable_comes_back_and_one_of_earlier_versions_has_none():
    records, states, _ = quiet_world(200)
    head, _ = fit_calibration(records, states)
    entry = json.loads(json.dumps(head.to_json()))
    assert Calibration.from_json(entry).answerable == head.answerable
    earlier = {key: value for key, value in entry.items() if key != "answerable"}
    assert Calibration.from_json(earlier) == replace(Calibration.from_json(entry), answerable=None)
    assert json.loads(json.dumps(replace(head, answerable=None).to_json())) == earlier
    with pytest.raises(LoadError, match=r"the calibration cannot be read .* run `selfdoubt calibrate` again"):
        Calibration.from_json({**entry, "answerable": {**entry["answerable"], "kind": "magic"}})


def test_quality_of_sets_is_the_mean_over_them():
    p = np.array([0.9, 0.2, 0.6, 0.8, 0.7, 0.1])
    y = np.array([True, False, True, False, True, False])
    sets = [np.array([0, 1]), np.array([2, 3, 4, 5])]
    each = [measure_quality(p[rows], y[rows]) for rows in sets]
    both = measure_quality(p, y, sets)
    assert both.answers == 6
    for name in ("log_loss", "brier", "auroc", "ece", "prr"):
        assert getattr(both, name) == pytest.approx(np.mean([getattr(q, name) for q in each]))
