"""Bootstrap intervals: the fast way against the slow one, against scipy, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from selfdoubt.errors import ConfigError, MetricError
from selfdoubt.metrics import (
    Estimate,
    bootstrap_interval,
    compare_scores,
    estimate_over_seeds,
    paired_difference,
    resampling,
)
from selfdoubt.metrics.selective import METRICS


def answers(n=120, *, seed=0, strength=1.0):
    """A probability in tenths, and which answers are right: fit for every metric, with ties."""
    random = np.random.default_rng(seed)
    correct = random.random(n) < 0.6
    score = random.normal(size=n) + strength * correct
    return np.round(1 / (1 + np.exp(-score)), 1), correct


def numbers(estimate):
    return (estimate.value, estimate.low, estimate.high, estimate.p or 0, estimate.failed)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("name", METRICS)
def test_the_fast_way_gives_what_the_slow_one_gives(name, clustered):
    score, correct = answers()
    other, _ = answers(seed=1)
    options = {"draws": 60, "seed": 3, "clusters": [i // 3 for i in range(120)] if clustered else None}
    slow = METRICS[name].function
    assert numbers(bootstrap_interval(name, score, correct, **options)) == pytest.approx(
        numbers(bootstrap_interval(slow, score, correct, **options))
    )
    assert numbers(paired_difference(name, score, other, correct, **options)) == pytest.approx(
        numbers(paired_difference(slow, score, other, correct, **options))
    )


def wilcoxon(risk, correct, axis=-1):
    """AUROC by rank sums."""
    wrong, right = (1 - correct).sum(axis), correct.sum(axis)
    return ((stats.rankdata(risk, axis=axis) * (1 - correct)).sum(axis) - wrong * (wrong + 1) / 2) / (wrong * right)


@pytest.mark.parametrize(
    ("name", "statistic"),
    [
        ("accuracy", lambda risk, correct, axis=-1: correct.mean(axis)),
        ("auroc", wilcoxon),
        ("brier", lambda p, correct, axis=-1: np.square(p - correct).mean(axis)),
    ],
)
def test_intervals_against_scipy(name, statistic):
    score, correct = answers(400)
    risk = score if name == "brier" else -score
    random, options = np.random.default_rng(0), {"paired": True, "vectorized": True, "method": "percentile"}
    theirs = stats.bootstrap((risk, correct.astype(float)), statistic, n_resamples=2000, rng=random, **options)
    ours = bootstrap_interval(name, risk, correct, draws=2000)
    assert ours.value == pytest.approx(statistic(risk, correct))
    # An end of such an interval has a standard error of 0.06 of the metric's own; two differ by 0.085: 6.5 of that.
    slack = 6.5 * 0.085 * theirs.standard_error
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=slack)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=slack)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    # 400 data sets of 200 answers, true accuracy 0.7, level 0.9. The percentile bootstrap of a share of 200 holds the
    # truth in 0.88 or more; below 0.77 by chance: 6.7 standard errors of 0.0162, a false alarm in 1e-10.
    random = np.random.default_rng(0)
    held = 0
    for trial in range(400):
        correct = random.random(200) < 0.7
        found = bootstrap_interval("accuracy", np.arange(200.0), correct, draws=200, level=0.9, seed=trial)
        held += found.low <= 0.7 <= found.high
    assert 0.77 * 400 <= held < 400


def test_two_equally_good_scores_rarely_differ_significantly_and_a_better_one_does():
    # Without a difference p < 0.05 in about 0.05 of 300 trials; above 0.14 by chance: 7 standard errors of 0.0126.
    random = np.random.default_rng(0)
    alarms = 0
    for trial in range(300):
        correct = random.random(200) < 0.5
        a, b = (random.normal(size=200) + ~correct for _ in range(2))
        alarms += paired_difference("auroc", a, b, correct, draws=200, seed=trial).p < 0.05
    assert 0 < alarms <= 0.14 * 300
    better, worse = ~correct + random.normal(size=200) / 3, ~correct + random.normal(size=200) * 2
    found = paired_difference("auroc", better, worse, correct, draws=500)
    assert found.low > 0
    assert found.p == pytest.approx(2 / 501)


def test_the_same_resamples_serve_both_scores():
    score, correct = answers()
    other, _ = answers(seed=1)
    same = paired_difference("aurc", score, score.copy(), correct)
    assert same == Estimate(0, 0, 0, p=1)
    found, turned = (paired_difference("aurc", a, b, correct) for a, b in ((score, other), (other, score)))
    assert (turned.value, turned.low, turned.high, turned.p) == pytest.approx(
        (-found.value, -found.high, -found.low, found.p)
    )
    shifted = paired_difference("auroc", score, score * 2, correct)  # the same order: the same AUROC on every resample
    assert (shifted.low, shifted.high) == (0, 0)


def test_comparing_many_is_comparing_each():
    correct = answers()[1]
    scores = {f"score {i}": answers(seed=i)[0] for i in range(3)}
    found = compare_scores(scores, correct, ["auroc", "prr_50"], baseline="score 1", draws=100, level=0.8, seed=5)
    assert set(found) == {(score, metric) for score in scores for metric in ("auroc", "prr_50")}
    for (score, metric), compared in found.items():
        options = {"draws": 100, "level": 0.8, "seed": 5}
        assert compared.estimate == bootstrap_interval(metric, scores[score], correct, **options)
        if score == "score 1":
            assert compared.difference is None
        else:
            both = scores[score], scores["score 1"]
            assert compared.difference == paired_difference(metric, *both, correct, **options)
    assert compare_scores(scores, correct, ["auroc"], draws=10)["score 0", "auroc"].difference is None


def test_a_seed_gives_the_same_numbers_however_the_draws_are_cut(monkeypatch):
    score, correct = answers()
    found = bootstrap_interval("prr", score, correct, seed=7)
    monkeypatch.setattr(resampling, "BLOCK", 1000)
    assert numbers(bootstrap_interval("prr", score, correct, seed=7)) == pytest.approx(numbers(found))
    assert bootstrap_interval("prr", score, correct, seed=8) != found


def test_a_higher_level_gives_a_wider_interval():
    score, correct = answers()
    narrow, wide = (bootstrap_interval("auroc", score, correct, level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_clusters_are_drawn_whole():
    score, correct = answers()
    alone = bootstrap_interval("accuracy", score, correct)
    twice, topics = (np.repeat(score, 2), np.repeat(correct, 2)), [f"topic {i // 2}" for i in range(240)]
    assert numbers(bootstrap_interval("accuracy", *twice, clusters=topics)) == pytest.approx(numbers(alone))
    naive = bootstrap_interval("accuracy", *twice)
    assert naive.high - naive.low < 0.85 * (alone.high - alone.low)  # it believes in twice as many answers


def test_resamples_without_a_wrong_answer_are_left_out_and_counted():
    risk, correct = np.arange(20.0), np.arange(20) != 19
    found = bootstrap_interval("auroc", risk, correct, draws=2000)
    # (19 / 20)^20 = 0.358 of the resamples lack the wrong one; 6.5 standard errors of 0.0107 are 0.07.
    assert abs(found.failed / 2000 - 0.358) < 0.07
    assert (found.value, found.low, found.high) == (1, 1, 1)
    assert bootstrap_interval("accuracy", risk, correct).failed == 0


def test_a_metric_that_is_rarely_defined_has_no_interval():
    def picky(risk, correct):
        if len(set(risk)) < 20:
            raise MetricError("it wants all 20")
        return 0.5

    with pytest.raises(
        MetricError, match=r"^picky is not defined on 50 of 50 resamples: too few answers, .*; judge more$"
    ):
        bootstrap_interval(picky, np.arange(20.0), np.arange(20) < 5, draws=50)


def test_a_metric_may_be_any_function():
    risk, correct = np.arange(50.0), np.arange(50) < 30
    found = bootstrap_interval(lambda r, c: float(r[c].mean()), risk, correct, draws=100)
    assert isinstance(found, Estimate)
    assert found.low < found.value == 14.5 < found.high


def test_what_is_not_defined_on_the_answers_has_no_interval():
    with pytest.raises(MetricError, match=r"^AUROC compares right answers with wrong ones"):
        bootstrap_interval("auroc", np.arange(5.0), np.full(5, True))
    with pytest.raises(MetricError, match=r"^p_correct must lie in \[0, 1\]"):
        bootstrap_interval("brier", np.arange(5.0), np.full(5, True))
    with pytest.raises(MetricError, match=r"is nan, and 1 of 2 are not finite"):
        paired_difference("accuracy", np.zeros(2), np.array([math.nan, 1.0]), np.array([True, False]))


def test_settings_outside_their_range_are_errors():
    score, correct = answers()
    with pytest.raises(ConfigError, match=r"^unknown metric 'roc'; use one of accuracy, .*auroc"):
        bootstrap_interval("roc", score, correct)
    with pytest.raises(ConfigError, match=r"^draws must be at least 2, got 1"):
        bootstrap_interval("auroc", score, correct, draws=1)
    with pytest.raises(ConfigError, match=r"^level must lie in \(0, 1\), got 95"):
        bootstrap_interval("auroc", score, correct, level=95)
    with pytest.raises(ConfigError, match=r"^the baseline 'b' is none of the scores a$"):
        compare_scores({"a": score}, correct, ["auroc"], baseline="b")
    with pytest.raises(MetricError, match=r"^clusters must name one cluster for each of 120 answers, got 2$"):
        bootstrap_interval("auroc", score, correct, clusters=["a", "b"])


def test_the_spread_over_seeds_is_students_interval():
    values = [0.71, 0.75, 0.69, 0.74]
    found = estimate_over_seeds(values, level=0.9)
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert (found.value, found.low, found.high) == pytest.approx((np.mean(values), theirs.low, theirs.high))
    for bad in ([0.7], [], [0.7, math.nan]):
        with pytest.raises(MetricError, match=r"^a spread needs finite numbers of at least 2 seeds"):
            estimate_over_seeds(bad)
    with pytest.raises(ConfigError, match=r"^level must"):
        estimate_over_seeds(values, level=1.0)
