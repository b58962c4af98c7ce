"""Computes the metrics of a report as estimates, each with its interval or the reason why it is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from selfdoubt.errors import MetricError
from selfdoubt.metrics import (
    METRICS,
    Comparison,
    Estimate,
    accuracy_at,
    compare_scores,
    reliability,
    wilson_interval,
)
from selfdoubt.metrics.ranking import check_answers
from selfdoubt.report.results import BestScoreTest, ConfidenceCurve, ReliabilityBin

LEVEL = 0.95
#: Metrics of every score, in the order of a table; names of shares, e.g. "accuracy_at_35", are in percent.
OF_SCORES = tuple(
    name
    for name, m in METRICS.items()
    if not (m.needs_probability or name in ("accuracy", "augrc", "excess_aurc", "aurc", "aurc_trapezoid"))
)
#: Metrics that are one minus another.
MIRRORED = {"auarc": "aurc", "auarc_trapezoid": "aurc_trapezoid"}
PAIRED = ("auroc", "prr")  #: compared with the baseline's
OF_PROBABILITIES = ("ece", "brier", "nll")
BINS = 15  #: of equal width, for the calibration error
PLOTTED = 10  #: bins of equally many answers, for a plot of reliability


class Bootstrap(TypedDict):
    """The settings of the bootstrap behind all intervals, as functions of ``metrics`` take them."""

    draws: int
    seed: int


@dataclass(frozen=True)
class ScoreEntries:
    """Metrics of one score, and their differences to the baseline's."""

    metrics: Mapping[str, Estimate]
    against: Mapping[str, Estimate]


def measure_scores(
    scores: Mapping[str, Sequence[float]],
    correct: Sequence[bool],
    baseline: str | None,
    bootstrap: Bootstrap,
    metrics: Sequence[str] = OF_SCORES,
) -> dict[str, ScoreEntries]:
    """Measure several scores of the same answers.

    Args:
        scores: By name, each growing with doubt.
        correct: Judgements of the same answers.
        baseline: Name of the score that the others are compared with; None compares nothing.
        bootstrap: Settings of the bootstrap.
        metrics: Names in ``METRICS``.

    Returns:
        The entries by score name; ``against`` has differences to the baseline in AUROC and PRR, on the same resamples.
    """
    compared = _compare(scores, correct, metrics, baseline, bootstrap)
    return {
        name: ScoreEntries(
            metrics=_add_mirrored(
                {metric: _use_wilson(metric, _estimate(compared[name, metric]), len(correct)) for metric in metrics}
            ),
            against={
                metric: _difference(compared[name, metric])
                for metric in PAIRED
                if metric in metrics and baseline not in (None, name)
            },
        )
        for name in scores
    }


def validate_best_score(
    scores: Mapping[str, Sequence[float]], correct: Sequence[bool], baseline: str, bootstrap: Bootstrap
) -> BestScoreTest:
    """Pick the score with the highest PRR on a random half of the answers, and compare it with the baseline's.

    The comparison is on the other half: the best of many scores looks better than it is on the answers that it was
    picked on.
    """
    order = np.random.default_rng(bootstrap["seed"]).permutation(len(correct))
    one, other = order[: len(order) // 2], order[len(order) // 2 :]
    right = np.asarray(correct, bool)
    arrays = {name: np.asarray(values, np.float64) for name, values in scores.items()}
    try:
        prr = {name: METRICS["prr"].function(x[one], right[one]) for name, x in arrays.items()}
        best = max(prr, key=lambda name: prr[name])
        if best == baseline:
            return BestScoreTest(best, len(other), why="it is the baseline itself")
        halves = {name: arrays[name][other].tolist() for name in (best, baseline)}
        entries = measure_scores(halves, right[other].tolist(), baseline, bootstrap, ["prr"])
    except MetricError as error:
        return BestScoreTest(why=str(error))
    return BestScoreTest(best, len(other), entries[best].against["prr"])


def measure_probabilities(p: Sequence[float], correct: Sequence[bool], bootstrap: Bootstrap) -> dict[str, Estimate]:
    """Return the calibration error, the Brier score and the log loss of probabilities of being right."""
    compared = _compare({"p": p}, correct, OF_PROBABILITIES, None, bootstrap)
    return {name: _estimate(compared["p", name]) for name in OF_PROBABILITIES}


def bin_probabilities(p: Sequence[float], correct: Sequence[bool]) -> tuple[ReliabilityBin, ...]:
    """Return the table behind a plot of reliability; empty with fewer than two answers."""
    try:
        few = max(1, min(PLOTTED, len(p) // 10))
        table = reliability(np.asarray(p, np.float64), np.asarray(correct, bool), bins=few, spacing="mass")
    except MetricError:
        return ()
    return tuple(ReliabilityBin(*(x.item() for x in row)) for row in zip(*table, strict=True))


def measure_curve(score: Sequence[float], correct: Sequence[bool]) -> ConfidenceCurve:
    """Return the accuracy of the answers at or above each confidence percentile, with a pointwise band (Wilson's).

    Raises:
        MetricError: With fewer than two answers.
    """
    x, right = check_answers(np.asarray(score, np.float64), np.asarray(correct, bool))
    percentiles = range(100)
    shares = [accuracy_at(x, right, coverage=(100 - p) / 100) for p in percentiles]
    bands = [
        wilson_interval(share, _count_surest(len(x), 100 - p), level=LEVEL)
        for share, p in zip(shares, percentiles, strict=True)
    ]
    return ConfidenceCurve(
        confidence_percentile=tuple(float(p) for p in percentiles),
        accuracy=tuple(shares),
        low=tuple(low for low, _ in bands),
        high=tuple(high for _, high in bands),
        riskiest_tenth=accuracy_at(-x, right, coverage=0.1),
    )


def _count_surest(n: int, percent: int) -> int:
    """Return the number of the surest answers that are this many percent of ``n``, at least 1."""
    return max(1, -(-n * percent // 100))


def _compare(
    scores: Mapping[str, Sequence[float]],
    correct: Sequence[bool],
    metrics: Sequence[str],
    baseline: str | None,
    bootstrap: Bootstrap,
) -> dict[tuple[str, str], Comparison | str]:
    """Return ``compare_scores``; where a metric is not defined, the reason."""
    arrays = {name: np.asarray(values, np.float64) for name, values in scores.items()}
    right = np.asarray(correct, bool)
    try:
        return dict(compare_scores(arrays, right, metrics, baseline=baseline, level=LEVEL, **bootstrap))
    except MetricError as error:
        if len(metrics) == 1:
            return {(name, metrics[0]): str(error) for name in scores}
    compared: dict[tuple[str, str], Comparison | str] = {}
    for metric in metrics:
        compared |= _compare(scores, correct, [metric], baseline, bootstrap)
    return compared


def _estimate(compared: Comparison | str) -> Estimate:
    return Estimate.missing(compared) if isinstance(compared, str) else compared.estimate


def _use_wilson(metric: str, estimate: Estimate, n: int) -> Estimate:
    """Return an accuracy at a coverage with Wilson's interval: where all of few answers are right, so are resamples."""
    if not metric.startswith("accuracy_at_") or estimate.value is None:
        return estimate
    count = _count_surest(n, int(metric.removeprefix("accuracy_at_")))
    return Estimate(estimate.value, *wilson_interval(estimate.value, count, level=LEVEL))


def _add_mirrored(entries: dict[str, Estimate]) -> dict[str, Estimate]:
    """Add AURC to AUARC."""
    for name, other in MIRRORED.items():
        if name in entries:
            entries[other] = _mirror(entries[name])
    return entries


def _mirror(estimate: Estimate) -> Estimate:
    """Return one minus a metric."""
    value, low, high = estimate.value, estimate.low, estimate.high
    return estimate if value is None or low is None or high is None else Estimate(1 - value, 1 - high, 1 - low)


def _difference(compared: Comparison | str) -> Estimate:
    if isinstance(compared, str) or compared.difference is None:
        return Estimate.missing(compared if isinstance(compared, str) else "there is nothing to compare with")
    return compared.difference
