"""Laws of metrics that hold for any answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.errors import MetricError
from selfdoubt.metrics import selective
from selfdoubt.metrics.ranking import Order
from selfdoubt.metrics.selective import METRICS
from tests.strategies import judged_answers, seeds

OF_ORDER = [name for name, metric in METRICS.items() if not metric.needs_probability]


def outcome(name, score, correct):
    """The number, or that there is none."""
    if METRICS[name].needs_probability:
        score = score / (1 + score.max())
    try:
        return METRICS[name].function(score, correct)
    except MetricError:
        return None


@pytest.mark.parametrize("name", METRICS)
@given(answers=judged_answers(), seed=seeds)
def test_the_order_of_the_file_changes_no_bit(name, answers, seed):
    score, correct = answers
    order = np.random.default_rng(seed).permutation(len(score))
    assert outcome(name, score[order], correct[order]) == outcome(name, score, correct)


@pytest.mark.parametrize("name", OF_ORDER)
@given(answers=judged_answers())
def test_only_the_order_of_risks_counts(name, answers):
    risk, correct = answers
    for transformed in (3 * risk + 5, np.log1p(risk), -1 / (1 + risk)):
        assert outcome(name, transformed, correct) == outcome(name, risk, correct)


@given(judged_answers(both=True))
def test_a_perfect_ranking_is_the_best_there_is(answers):
    _, correct = answers
    risk = np.where(correct, 0, 1) + np.linspace(0, 0.5, len(correct))
    accuracy = correct.mean()
    assert selective.auroc(risk, correct) == 1
    assert selective.auprc(risk, correct) == 1
    assert selective.prr(risk, correct) == pytest.approx(1)
    assert selective.excess_aurc(risk, correct) == pytest.approx(0, abs=1e-12)
    assert selective.coverage_at(risk, correct, accuracy=1.0) == pytest.approx(accuracy)
    assert selective.accuracy_at(risk, correct, coverage=accuracy) == pytest.approx(1)
    accuracies = selective.accuracy_coverage(risk, correct).accuracy
    assert (np.diff(accuracies) <= 1e-12).all()


@given(judged_answers(both=True))
def test_no_ranking_beats_the_perfect_one_or_loses_to_its_reverse(answers):
    risk, correct = answers
    apart = np.linspace(0, 0.5, len(risk))  # average precision and thresholds are hard on ties
    best, worst = ~correct + apart, correct + apart
    for name in OF_ORDER:
        if name == "prr_50" and len(risk) < 4:
            continue
        function, sign = METRICS[name].function, 1 if METRICS[name].bigger_is_better else -1
        found, least, most = (sign * function(x, correct) for x in (risk, worst, best))
        assert least - 1e-9 <= found <= most + 1e-9, name


@given(judged_answers(both=True))
def test_a_constant_score_is_flat_and_worth_nothing(answers):
    risk, correct = answers
    constant, accuracy = np.full_like(risk, 0.25), correct.mean()
    assert selective.accuracy_coverage(constant, correct).accuracy == pytest.approx(accuracy)
    assert selective.auroc(constant, correct) == 0.5
    assert selective.auprc(constant, correct) == pytest.approx(1 - accuracy)
    assert selective.prr(constant, correct) == pytest.approx(0, abs=1e-9)
    for form in ("sum", "trapezoid"):
        assert selective.aurc(constant, correct, form=form) == pytest.approx(1 - accuracy)
    for coverage in (0.01, 0.35, 1.0):
        assert selective.accuracy_at(constant, correct, coverage=coverage) == pytest.approx(accuracy)
    assert selective.coverage_at(constant, correct, accuracy=accuracy) == 1
    assert selective.coverage_at(constant, correct, accuracy=min(1.0, accuracy + 0.01)) == 0


@given(judged_answers())
def test_at_full_coverage_stands_the_accuracy(answers):
    risk, correct = answers
    curve = selective.accuracy_coverage(risk, correct)
    assert selective.accuracy_at(risk, correct, coverage=1.0) == pytest.approx(correct.mean())
    assert curve.coverage[-1] == 1
    assert curve.accuracy[-1] == pytest.approx(correct.mean())


@given(judged_answers(), st.floats(0.001, 1))
def test_areas_and_points_are_those_of_the_curve(answers, coverage):
    risk, correct = answers
    n, curve = len(risk), selective.accuracy_coverage(risk, correct)
    assert curve.coverage == pytest.approx(np.arange(1, n + 1) / n)
    assert selective.auarc(risk, correct) == pytest.approx(curve.accuracy.mean())
    area = np.trapezoid(curve.accuracy, curve.coverage) / (1 - 1 / n)
    assert selective.auarc(risk, correct, form="trapezoid") == pytest.approx(area)
    for form in ("sum", "trapezoid"):
        both = selective.aurc(risk, correct, form=form) + selective.auarc(risk, correct, form=form)
        assert both == pytest.approx(1)
    point = curve.accuracy[np.searchsorted(curve.coverage, coverage - 1e-12)]
    assert selective.accuracy_at(risk, correct, coverage=coverage) == pytest.approx(point)


@given(judged_answers(), st.floats(0, 1))
def test_coverage_at_can_be_had_by_a_threshold_and_keeps_its_word(answers, target):
    risk, correct = answers
    coverage = selective.coverage_at(risk, correct, accuracy=target)
    reached = [0.0] + [(risk <= t).mean() for t in risk if correct[risk <= t].mean() >= target - 1e-12]
    assert coverage == pytest.approx(max(reached))


@given(judged_answers(both=True))
def test_augrc_is_its_closed_form(answers):
    risk, correct = answers
    a = correct.mean()
    expected = (1 - selective.auroc(risk, correct)) * a * (1 - a) + (1 - a) ** 2 / 2
    assert selective.augrc(risk, correct) == pytest.approx(expected)


@given(judged_answers(both=True))
def test_turning_the_risk_around_turns_auroc_around(answers):
    risk, correct = answers
    assert selective.auroc(-risk, correct) == pytest.approx(1 - selective.auroc(risk, correct))
    assert selective.auroc(risk, ~correct) == pytest.approx(1 - selective.auroc(risk, correct))


@pytest.mark.parametrize("name", ["accuracy", "augrc", "auroc", "auprc", "ece", "brier", "nll"])
@given(judged_answers(both=True))
def test_every_answer_twice_is_the_same(name, answers):
    score, correct = answers
    assert outcome(name, np.tile(score, 2), np.tile(correct, 2)) == pytest.approx(outcome(name, score, correct))


@pytest.mark.parametrize("name", METRICS)
@given(answers=judged_answers(), seed=seeds)
def test_counting_equals_repeating(name, answers, seed):
    # The fast path: the sorted answers with the counts of each draw. The slow one: the metric of the repeated answers.
    score, correct = answers
    score = score / (1 + score.max())
    n = len(score)
    random = np.random.default_rng(seed)
    counts = np.stack([np.bincount(random.integers(n, size=m), minlength=n) for m in (n, n, n + 3)])
    fast = METRICS[name].over_draws(Order.sort(score, correct).rank(counts))
    for found, count in zip(fast, counts, strict=True):
        again = np.repeat(np.arange(n), count)
        try:
            slow = METRICS[name].function(score[again], correct[again])
        except MetricError:
            slow = np.nan
        assert found == pytest.approx(slow, abs=1e-9, nan_ok=True)
