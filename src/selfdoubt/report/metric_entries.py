"""Metrics as entries of a report: a number with its interval, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from selfdoubt.errors import MetricError
from selfdoubt.metrics.bootstrap import Compared, compare, resamples
from selfdoubt.metrics.calibration import reliability
from selfdoubt.metrics.ranking import Order, checked
from selfdoubt.metrics.selective import METRICS, accuracy_at

Entry = dict[str, Any]
LEVEL = 0.95
#: Of every score, in the order of a table; accuracies at a coverage and coverages at an accuracy are in percent.
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


class Draws(NamedTuple):
    """The bootstrap behind all intervals."""

    draws: int
    seed: int


def nothing(why: str) -> Entry:
    """An entry without a number."""
    return {"value": None, "low": None, "high": None, "why": why}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval (1927) of a share of ``n``: neither empty nor outside [0, 1] where all or none hit.

    Example:
        >>> low, high = wilson(1.0, 10)
        >>> round(low, 3), round(high, 3)
        (0.722, 1.0)
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def proportion(hits: Sequence[bool]) -> Entry:
    """A share with Wilson's interval."""
    if not hits:
        return nothing("there is nothing to count")
    share = sum(hits) / len(hits)
    low, high = wilson(share, len(hits))
    return {"value": share, "low": low, "high": high}


def mean(values: Sequence[float], draw: Draws) -> Entry:
    """A mean with its bootstrap interval."""
    if not values:
        return nothing("there is nothing to average")
    x = np.asarray(values, np.float64)
    drawn = np.concatenate([counts @ x / len(x) for counts in resamples(len(x), draw.draws, draw.seed, None)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"value": float(x.mean()), "low": float(low), "high": float(high)}


def of_scores(
    scores: Mapping[str, Sequence[float]],
    correct: Sequence[bool],
    baseline: str | None,
    draw: Draws,
    metrics: Sequence[str] = OF_SCORES,
) -> dict[str, dict[str, dict[str, Entry]]]:
    """Metrics of several scores of the same answers.

    Args:
        scores: By name, each growing with doubt.
        correct: Of the same answers.
        baseline: Which of the scores the others are compared with.
        draw: The bootstrap.
        metrics: Names in ``METRICS``.

    Returns:
        By score: ``metrics``, and ``against`` the baseline: differences in AUROC and PRR, on the same resamples.
    """
    found = _compared(scores, correct, metrics, baseline, draw)
    return {
        name: {
            "metrics": _mirrored(
                {metric: _accuracy(metric, _entry(found[name, metric]), len(correct)) for metric in metrics}
            ),
            "against": {
                metric: _difference(found[name, metric])
                for metric in PAIRED
                if metric in metrics and baseline not in (None, name)
            },
        }
        for name in scores
    }


def picked(
    scores: Mapping[str, Sequence[float]], correct: Sequence[bool], baseline: str, draw: Draws
) -> dict[str, Any]:
    """The score with the highest PRR on a random half of the answers, compared with the baseline on the other half.

    The best of many scores looks better than it is on the answers that it was picked on; on others it does not.

    Returns:
        ``score``, ``judged`` (answers in the other half) and ``prr``, the entry of the difference; or ``why`` not.
    """
    order = np.random.default_rng(draw.seed).permutation(len(correct))
    one, other = order[: len(order) // 2], order[len(order) // 2 :]
    right = np.asarray(correct, bool)
    arrays = {name: np.asarray(values, np.float64) for name, values in scores.items()}
    try:
        found = {name: METRICS["prr"].function(x[one], right[one]) for name, x in arrays.items()}
        best = max(found, key=lambda name: found[name])
        if best == baseline:
            return {"score": best, "judged": len(other), "why": "it is the baseline itself"}
        halves = {name: arrays[name][other].tolist() for name in (best, baseline)}
        entries = of_scores(halves, right[other].tolist(), baseline, draw, ["prr"])
    except MetricError as error:
        return {"why": str(error)}
    return {"score": best, "judged": len(other), "prr": entries[best]["against"]["prr"]}


def paired(
    metric: str, a: Sequence[tuple[float, bool]], b: Sequence[tuple[float, bool]], draw: Draws
) -> tuple[tuple[float | None, float | None], Entry]:
    """A metric of two runs on the same questions, in the same order, and the difference ``b`` minus ``a``.

    Each run has its own judgements: unlike ``of_scores``, where two scores share them.

    Args:
        metric: A name in ``METRICS``.
        a: Risk and judgement of each question.
        b: The same of the other run.
        draw: The bootstrap over questions, the same for both.
    """
    own = METRICS[metric]
    arrays = [(np.array([r for r, _ in side], np.float64), np.array([c for _, c in side], bool)) for side in (a, b)]
    values = [_defined(own.function, x, right) for x, right in arrays]
    numbers = tuple(v if isinstance(v, float) else None for v in values)
    why = [v for v in values if isinstance(v, str)]
    if why:
        return (numbers[0], numbers[1]), nothing(why[0])
    orders = [Order.of(*checked(x, right)) for x, right in arrays]
    drawn = [
        own.over_draws(orders[1].ranked(counts)) - own.over_draws(orders[0].ranked(counts))
        for counts in resamples(len(a), draw.draws, draw.seed, None)
    ]
    steps = np.concatenate(drawn)
    defined = steps[~np.isnan(steps)]
    if 2 * len(defined) < len(steps):
        return (numbers[0], numbers[1]), nothing(f"{metric} is not defined on most resamples; judge more answers")
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(values[1]) - float(values[0])
    return (numbers[0], numbers[1]), {"value": value, "low": float(low), "high": float(high)}


def _defined(function: Callable[..., float], x: Any, right: Any) -> float | str:
    try:
        return float(function(x, right))
    except MetricError as error:
        return str(error)


def of_probabilities(p: Sequence[float], correct: Sequence[bool], draw: Draws) -> dict[str, Any]:
    """Calibration of probabilities of being right, and the table behind a plot of it."""
    found = _compared({"p": p}, correct, OF_PROBABILITIES, None, draw)
    try:
        few = max(1, min(PLOTTED, len(p) // 10))
        table = reliability(np.asarray(p, np.float64), np.asarray(correct, bool), bins=few, spacing="mass")
        bins = [dict(zip(table._fields, (x.item() for x in row), strict=True)) for row in zip(*table, strict=True)]
    except MetricError:
        bins = []
    return {
        "bins": BINS,
        "binning": "of equal width",
        **{name: _entry(found["p", name]) for name in OF_PROBABILITIES},
        "reliability": bins,
    }


def curve(score: Sequence[float], correct: Sequence[bool]) -> dict[str, list[float] | float]:
    """Accuracy of the answers at or above each percentile of confidence, with a pointwise band (Wilson's).

    Returns:
        ``percentile`` 0 .. 99, ``accuracy`` of the surest 100 - percentile in a hundred, ``low`` and ``high``; and
        ``riskiest_tenth``, the accuracy of those.

    Raises:
        MetricError: With fewer than two answers.
    """
    x, right = checked(np.asarray(score, np.float64), np.asarray(correct, bool))
    percentiles = list(range(100))
    shares = [accuracy_at(x, right, coverage=(100 - p) / 100) for p in percentiles]
    bands = [wilson(share, _surest(len(x), 100 - p)) for share, p in zip(shares, percentiles, strict=True)]
    return {
        "percentile": [float(p) for p in percentiles],
        "accuracy": shares,
        "low": [low for low, _ in bands],
        "high": [high for _, high in bands],
        "riskiest_tenth": accuracy_at(-x, right, coverage=0.1),
    }


def _surest(n: int, percent: int) -> int:
    """How many answers the surest so many percent of ``n`` are."""
    return max(1, -(-n * percent // 100))


def _compared(
    scores: Mapping[str, Sequence[float]],
    correct: Sequence[bool],
    metrics: Sequence[str],
    baseline: str | None,
    draw: Draws,
) -> dict[tuple[str, str], Compared | str]:
    """What ``compare`` says; where a metric is not defined, why."""
    arrays = {name: np.asarray(values, np.float64) for name, values in scores.items()}
    options = {"baseline": baseline, "draws": draw.draws, "level": LEVEL, "seed": draw.seed}
    try:
        return dict(compare(arrays, np.asarray(correct, bool), metrics, **options))  # type: ignore[arg-type]
    except MetricError as error:
        if len(metrics) == 1:
            return {(name, metrics[0]): str(error) for name in scores}
    found: dict[tuple[str, str], Compared | str] = {}
    for metric in metrics:
        found |= _compared(scores, correct, [metric], baseline, draw)
    return found


def _entry(found: Compared | str) -> Entry:
    if isinstance(found, str):
        return nothing(found)
    return {"value": found.interval.value, "low": found.interval.low, "high": found.interval.high}


def _accuracy(metric: str, entry: Entry, n: int) -> Entry:
    """An accuracy at a coverage with Wilson's interval: where all of few answers are right, so are all resamples."""
    if not metric.startswith("accuracy_at_") or entry["value"] is None:
        return entry
    low, high = wilson(entry["value"], _surest(n, int(metric.removeprefix("accuracy_at_"))))
    return {**entry, "low": low, "high": high}


def _mirrored(entries: dict[str, Entry]) -> dict[str, Entry]:
    """With AURC beside AUARC."""
    for name, other in MIRRORED.items():
        if name in entries:
            e = entries[name]
            known = e["value"] is not None
            entries[other] = {"value": 1 - e["value"], "low": 1 - e["high"], "high": 1 - e["low"]} if known else e
    return entries


def _difference(found: Compared | str) -> Entry:
    if isinstance(found, str) or found.difference is None:
        return nothing(found if isinstance(found, str) else "there is nothing to compare with")
    d = found.difference
    return {"value": d.value, "low": d.low, "high": d.high, "p": d.p}
