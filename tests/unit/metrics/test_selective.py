"""Metrics of selective answering against other people's implementations, by hand, and what is refused."""

from __future__ import annotations

import itertools
import math

import jaxtyping
import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score
from torchmetrics.functional.classification import binary_calibration_error

from selfdoubt.errors import ConfigError, MetricError
from selfdoubt.metrics import compare_scores, selective
from selfdoubt.metrics.calibration import brier, ece, nll, reliability
from selfdoubt.metrics.selective import METRICS
from tests import oracles

TIED = [False, True]


def answers(n=300, *, tied=False, seed=0):
    """A risk that knows something, and which answers are right."""
    random = np.random.default_rng(seed)
    correct = random.random(n) < 0.6
    risk = random.normal(size=n) + 0.8 * ~correct
    return (np.round(risk * 2) / 2 if tied else risk), correct


def probabilities(n=300, *, tied=False, seed=0):
    random = np.random.default_rng(seed)
    p = random.random(n)
    right = random.random(n) < np.clip(p + 0.3 * np.sin(9 * p), 0, 1)  # too sure here, not sure enough there
    return (np.round(p * 20) / 20 if tied else p), right


@pytest.fixture
def unchecked():
    """As users run it: without the check of shapes in signatures, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# Other people's implementations


@pytest.mark.parametrize("tied", TIED)
def test_auroc_and_auprc_against_scikit_learn(tied):
    risk, correct = answers(tied=tied)
    assert selective.auroc(risk, correct) == pytest.approx(roc_auc_score(~correct, risk), abs=1e-12)
    assert selective.auprc(risk, correct) == pytest.approx(average_precision_score(~correct, risk), abs=1e-12)


@pytest.mark.parametrize("tied", TIED)
def test_brier_and_log_loss_against_scikit_learn(tied):
    p, correct = probabilities(tied=tied)
    assert brier(p, correct) == pytest.approx(brier_score_loss(correct, p), abs=1e-12)
    assert nll(p, correct) == pytest.approx(log_loss(correct, p.clip(1e-7, 1 - 1e-7)), abs=1e-12)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_against_torchmetrics(bins):
    p, correct = probabilities()
    theirs = binary_calibration_error(torch.from_numpy(p), torch.from_numpy(correct), n_bins=bins, norm="l1")
    assert ece(p, correct, bins=bins) == pytest.approx(theirs.item(), abs=1e-6)  # theirs is float32


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_against_netcal(bins):
    theirs = oracles.load("netcal.metrics.confidence.ECE").ECE
    p, correct = probabilities()  # 300: each number of bins divides it, so that all cuts of equal mass agree
    assert ece(p, correct, bins=bins) == pytest.approx(theirs(bins).measure(p, correct.astype(int)), abs=1e-12)
    mass = theirs(bins, equal_intervals=False).measure(p, correct.astype(int))
    assert ece(p, correct, bins=bins, spacing="mass") == pytest.approx(mass, abs=1e-12)


def test_areas_under_the_risk_curve_against_torch_uncertainty():
    theirs = oracles.load_alone("torch_uncertainty.metrics.classification.risk_coverage")
    risk, correct = answers()
    n = len(risk)
    confidence = torch.from_numpy(1 - (risk.argsort().argsort() + 0.5) / n / 2)  # of the chosen of two classes, > 1/2
    found = {}
    for name in ("AURC", "AUGRC"):
        metric = getattr(theirs, name)()
        metric.update(torch.stack([confidence, 1 - confidence], 1), torch.from_numpy(~correct).long())
        found[name] = metric.compute().item()
    assert selective.aurc(risk, correct, form="trapezoid") == pytest.approx(found["AURC"], abs=1e-6)
    # Theirs starts at coverage 1/n and stretches the rest to [0, 1]; ours starts at coverage 0, where nothing is wrong.
    first = (1 - selective.accuracy_coverage(risk, correct).accuracy[0]) / n
    ours = (selective.augrc(risk, correct) - first / n / 2) / (1 - 1 / n)
    assert ours == pytest.approx(found["AUGRC"], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_rejection", [1.0, 0.5])
def test_prr_against_lm_polygraph(max_rejection, seed):
    area = oracles.load_alone("lm_polygraph.ue_metrics.pred_rej_area").PredictionRejectionArea(max_rejection)
    theirs = oracles.load_alone("lm_polygraph.ue_metrics.ue_metric")
    risk, correct = answers(seed=seed)
    quality = correct.astype(float)
    ours = selective.prr(risk, correct, max_rejection=max_rejection)
    if max_rejection == 1:
        assert selective.auarc(risk, correct) == pytest.approx(area(risk, quality), abs=1e-12)
    found, best, chance = area(risk, quality), area(-quality, quality), theirs.get_random_scores(area, quality)
    expected = theirs.normalize_metric(found, best, chance)
    # Their random baseline is the mean of 1,000 shuffles, ours its expectation: 6.5 of its standard errors, as PRR.
    shuffled = np.random.default_rng(seed)
    spread = np.std([area(shuffled.permutation(len(risk)), quality) for _ in range(400)]) / math.sqrt(1000)
    slope = (best - found) / (best - chance) ** 2
    assert abs(ours - expected) <= 6.5 * spread * slope
    assert spread * slope < 0.01  # so that this says something
    # With the exact baseline in theirs, the numbers are the same.
    assert ours == pytest.approx(theirs.normalize_metric(found, best, quality.mean()), abs=1e-12)


# By hand, and by the long way


def test_ties_count_as_the_mean_over_all_their_orders():
    risk = np.array([2.0, 1.0, 2.0, 2.0, 3.0, 1.0])
    correct = np.array([True, False, False, True, False, True])
    orders = [o for o in itertools.permutations(range(6)) if (np.diff(risk[list(o)]) >= 0).all()]
    assert len(orders) == math.factorial(2) * math.factorial(3)
    each = [np.cumsum(correct[list(o)]) / np.arange(1, 7) for o in orders]
    mean = np.mean(each, 0)
    assert selective.accuracy_coverage(risk, correct).accuracy == pytest.approx(mean)
    assert selective.auarc(risk, correct) == pytest.approx(mean.mean())
    assert selective.auarc(risk, correct, form="trapezoid") == pytest.approx(np.trapezoid(mean) / 5)
    best, accuracy = np.minimum(1, 3 / np.arange(1, 7)), correct.mean()
    assert selective.excess_aurc(risk, correct) == pytest.approx(best.mean() - mean.mean())
    for rejection, kept in ((1.0, 0), (0.5, 3)):
        expected = (mean[kept:].mean() - accuracy) / (best[kept:].mean() - accuracy)
        assert selective.prr(risk, correct, max_rejection=rejection) == pytest.approx(expected)


def test_accuracy_at_takes_the_surest_rounded_up():
    risk = np.arange(100.0)
    correct = risk < 7
    assert selective.accuracy_at(risk, correct, coverage=0.07) == 1  # 0.07 * 100 is 7.000000000000001 to a computer
    assert selective.accuracy_at(risk, correct, coverage=0.071) == 7 / 8
    assert selective.accuracy_at(risk, correct, coverage=0.001) == 1
    assert selective.accuracy_at(risk, correct, coverage=1.0) == pytest.approx(0.07)


def test_coverage_at_is_the_last_place_where_the_accuracy_holds():
    risk, correct = np.arange(10.0), np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 1], bool)
    assert selective.coverage_at(risk, correct, accuracy=0.9) == 1  # 9 of 10, although 2 of 3 came before
    assert selective.coverage_at(risk, correct, accuracy=1.0) == 0.2
    assert selective.coverage_at(risk, correct, accuracy=0.0) == 1


def test_coverage_at_does_not_part_ties():
    risk, correct = np.array([0.0, 1.0, 1.0, 1.0]), np.array([True, True, False, False])
    assert selective.coverage_at(risk, correct, accuracy=0.6) == 0.25
    assert selective.coverage_at(risk, correct, accuracy=0.5) == 1
    assert selective.coverage_at(np.ones(4), correct, accuracy=0.6) == 0


def test_unjudged_answers_are_left_out_and_counted():
    found = selective.drop_unjudged([0.3, math.nan, 0.1], [False, None, True])
    assert found.risk.tolist() == [0.3, 0.1]
    assert found.correct.tolist() == [False, True]
    assert found.n_unjudged == 1
    assert selective.drop_unjudged([], []).n_unjudged == 0
    with pytest.raises(MetricError, match=r"^risk and correct must be two lists of one length, got 1 and 2; .*None"):
        selective.drop_unjudged([0.3], [False, None])


@pytest.mark.parametrize("spacing", ["width", "mass"])
@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("bins", [1, 4, 7, 15, 1000])
def test_the_reliability_table_is_what_calibration_error_sums(spacing, tied, bins):
    p, correct = probabilities(tied=tied)
    table = reliability(p, correct, bins=bins, spacing=spacing)
    assert table.answers.sum() == len(p)
    assert (table.answers > 0).all()
    assert ((table.low <= table.confidence + 1e-12) & (table.confidence <= table.high + 1e-12)).all()
    gaps = np.abs(table.accuracy - table.confidence) * table.answers
    assert ece(p, correct, bins=bins, spacing=spacing) == pytest.approx(gaps.sum() / len(p))
    if spacing == "mass" and bins < len(p):
        assert np.ptp(table.answers) <= 1


def test_bins_hold_their_lower_edge_and_the_last_holds_one():
    table = reliability(np.array([0.0, 0.5, 1.0]), np.array([False, True, True]), bins=2)
    assert table.answers.tolist() == [1, 2]
    assert table.low.tolist() == [0, 0.5]
    assert table.high.tolist() == [0.5, 1]


def test_a_sure_and_wrong_probability_costs_a_finite_amount():
    assert nll(np.array([1.0, 1.0]), np.array([False, False])) == pytest.approx(-math.log(1e-7))
    assert nll(np.array([1.0, 0.0]), np.array([True, False])) == pytest.approx(1e-7)


def test_the_table_of_metrics_has_what_a_report_names():
    assert set(METRICS) == {
        "accuracy",
        *(f"accuracy_at_{c}" for c in (1, 8, 9, 35)),
        *(f"coverage_at_{a}" for a in (100, 95, 90, 80, 70)),
        *("aurc", "aurc_trapezoid", "auarc", "auarc_trapezoid", "augrc", "excess_aurc"),
        *("prr", "prr_50", "auroc", "auprc", "ece", "ece_mass", "brier", "nll"),
    }
    risk, correct = answers(tied=True)
    p, right = probabilities()
    for name, metric in METRICS.items():
        score, verdicts = (p, right) if metric.needs_probability else (risk, correct)
        assert math.isfinite(metric.function(score, verdicts)), name
    assert METRICS["prr_50"].function(risk, correct) == selective.prr(risk, correct, max_rejection=0.5)
    assert METRICS["accuracy_at_35"].function(risk, correct) == selective.accuracy_at(risk, correct, coverage=0.35)
    assert METRICS["coverage_at_70"].function(risk, correct) == selective.coverage_at(risk, correct, accuracy=0.7)
    assert METRICS["ece_mass"].function(p, right) == ece(p, right, spacing="mass")


# What is refused


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_an_error(name, bad):
    with pytest.raises(MetricError, match=r"\[1\] is -?(nan|inf), and 1 of 3 are not finite; leave these"):
        METRICS[name].function(np.array([0.1, bad, 0.3]), np.array([True, False, True]))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_answers_are_an_error(name, n):
    with pytest.raises(MetricError, match=rf"^a metric needs at least 2 judged answers, got {n}; judge more$"):
        METRICS[name].function(np.full(n, 0.5), np.full(n, True))


@pytest.mark.parametrize("name", METRICS)
def test_lists_that_do_not_fit_are_an_error(name, unchecked):
    function = METRICS[name].function
    for score, correct in ((np.zeros(3), np.zeros(2, bool)), (np.zeros((2, 2)), np.zeros((2, 2), bool))):
        with pytest.raises(
            MetricError, match=r"must be two lists of one length, got shapes \(.*\) and \(.*\); give one"
        ):
            function(score, correct)
    with pytest.raises(MetricError, match=r"^correct must hold booleans, got object; take .* with drop_unjudged\("):
        function(np.zeros(2), np.array([True, None]))
    with pytest.raises(MetricError, match=r"^correct must hold booleans, got int64; "):
        function(np.zeros(2), np.array([1, 0]))
    with pytest.raises(MetricError, match=r"must hold numbers, got <U1; "):
        function(np.array(["a", "b"]), np.array([True, False]))


def test_lists_are_taken_as_arrays_are():
    risk, p, correct = [0.1, 0.9, 0.3, 0.7], [0.9, 0.1, 0.8, 0.2], [True, False, True, False]
    for name, metric in METRICS.items():
        score = p if metric.needs_probability else risk
        assert metric.function(score, correct) == metric.function(np.array(score), np.array(correct)), name
    listed = compare_scores({"risk": risk}, correct, ["accuracy"], draws=5)
    assert listed == compare_scores({"risk": np.array(risk)}, np.array(correct), ["accuracy"], draws=5)


def test_lists_and_whole_numbers_are_taken_as_they_are(unchecked):
    assert selective.auroc([1, 2, 3], [True, False, False]) == 1


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.needs_probability])
@pytest.mark.parametrize("bad", [-0.01, 1.01])
def test_a_probability_outside_its_range_is_an_error(name, bad):
    with pytest.raises(MetricError, match=rf"^p_correct must lie in \[0, 1\], p_correct\[1\] is {bad}; .* auroc$"):
        METRICS[name].function(np.array([0.5, bad]), np.array([True, False]))


@pytest.mark.parametrize("right", [True, False])
def test_a_ranking_needs_right_and_wrong_answers(right):
    risk, correct = np.arange(5.0), np.full(5, right)
    counts = "5 right and 0 wrong" if right else "0 right and 5 wrong"
    for name in ("excess_aurc", "prr", "prr_50", "auroc", "auprc"):
        with pytest.raises(MetricError, match=rf"compares right answers with wrong ones, got {counts}; ask"):
            METRICS[name].function(risk, correct)


def test_accuracies_are_defined_where_all_answers_are_right_or_wrong():
    risk = np.arange(5.0)
    for right in (True, False):
        correct = np.full(5, right)
        assert selective.accuracy_coverage(risk, correct).accuracy.tolist() == [float(right)] * 5
        assert selective.accuracy_at(risk, correct, coverage=0.3) == right
        assert selective.coverage_at(risk, correct, accuracy=0.9) == right
        for form in ("sum", "trapezoid"):
            assert selective.aurc(risk, correct, form=form) == pytest.approx(1 - right, abs=1e-12)
        assert selective.augrc(risk, correct) == pytest.approx(0 if right else 0.5)
        assert brier(np.full(5, 0.5), correct) == 0.25


def test_too_few_answers_to_reject_any_are_an_error():
    with pytest.raises(MetricError, match=r"^PRR over the first 0\.5 of 3 rejections .* at least 4 answers"):
        selective.prr(np.arange(3.0), np.array([True, True, False]), max_rejection=0.5)


def test_settings_outside_their_range_are_errors(unchecked):
    risk, correct = answers(20)
    for call in (
        lambda: selective.accuracy_at(risk, correct, coverage=0.0),
        lambda: selective.accuracy_at(risk, correct, coverage=35),
        lambda: selective.coverage_at(risk, correct, accuracy=90),
        lambda: selective.prr(risk, correct, max_rejection=0.0),
        lambda: selective.auarc(risk, correct, form="Sum"),
        lambda: ece(correct * 0.5, correct, bins=0),
        lambda: ece(correct * 0.5, correct, spacing="quantile"),
        lambda: reliability(correct * 0.5, correct, bins=0),
    ):
        with pytest.raises(ConfigError, match=r" must "):
            call()
