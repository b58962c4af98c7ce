"""How far a metric can be trusted: bootstrap intervals over questions, paired differences, and spread over seeds.

The questions are drawn again with replacement, ``draws`` times, with the same seed the same way for every score and
metric; the interval is between percentiles of the metric over these draws (Efron, 1979). Two scores are compared on the
same draws. A draw on which the metric is not defined (all answers right, say) is left out and counted in ``failed``.

A metric is a name in ``curves.METRICS``, computed for all draws at once, or any function of (risk, correct), called
draw by draw: the slow way, which gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Int

from selfdoubt.errors import ConfigError, MetricError, require
from selfdoubt.metrics.ranking import Order, checked
from selfdoubt.metrics.selective import METRICS

MetricLike = str | Callable[[np.ndarray, np.ndarray], float]
#: Numbers in one block of draws: small enough to stay in a core's cache.
BLOCK = 1 << 17


class Interval(NamedTuple):
    """A metric and where it would lie on other questions of the kind."""

    value: float  #: on the answers as they are
    low: float
    high: float
    draws: int  #: resamples asked for
    failed: int  #: of these, where the metric was not defined: not part of the interval


class Difference(NamedTuple):
    """How much greater a metric is for one score than for another, on the same answers."""

    value: float  #: first minus second
    low: float
    high: float
    p: float  #: two-sided, of no difference
    draws: int
    failed: int


class Compared(NamedTuple):
    """A metric of one score, and its difference to the baseline's."""

    interval: Interval
    difference: Difference | None  #: None for the baseline itself, or without one


class Spread(NamedTuple):
    """A number measured once for each seed."""

    mean: float
    low: float
    high: float
    seeds: int


def interval(
    metric: MetricLike,
    risk: Float[np.ndarray, "answers"],
    correct: Bool[np.ndarray, "answers"],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """A metric with its bootstrap interval.

    Args:
        metric: A name in ``METRICS``, or a function of (risk, correct).
        risk: One score per answer that grows with doubt, or ``p_correct`` for a metric that needs it.
        correct: Which answers are right.
        draws: Resamples.
        level: Share of the resamples within the interval, in (0, 1).
        seed: Of the resamples.
        clusters: Draw these whole instead of single answers, e.g. each answer's question or topic; one per answer.

    Raises:
        MetricError: If the metric is not defined on the answers, or not on half of the resamples.
        ConfigError: If the metric is unknown or a setting is outside its range.

    Example:
        >>> risk, correct = np.arange(100.0), np.arange(100) % 3 != 0
        >>> found = interval("accuracy", risk, correct)
        >>> found.value, round(found.low, 2), round(found.high, 2), found.failed
        (0.66, 0.57, 0.75, 0)
    """
    key = _key(metric)
    found = compare({"": risk}, correct, {key: metric}, draws=draws, level=level, seed=seed, clusters=clusters)
    return found["", key].interval


def paired_difference(
    metric: MetricLike,
    a: Float[np.ndarray, "answers"],
    b: Float[np.ndarray, "answers"],
    correct: Bool[np.ndarray, "answers"],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Difference:
    """The metric of ``a`` minus that of ``b``, over the same resamples.

    The p-value is twice the smaller share of resamples on either side of zero, those at zero on both, with one added to
    count and total (Davison and Hinkley, 1997, section 4.2), at most 1: never below 2 / (draws + 1).

    Raises:
        MetricError: If the metric is not defined on the answers, or not on half of the resamples.
        ConfigError: If the metric is unknown or a setting is outside its range.

    Example:
        >>> good, bad = np.arange(60.0), np.arange(60.0) % 7
        >>> found = paired_difference("auroc", good, bad, np.arange(60) < 30)
        >>> found.low > 0, found.p < 0.01
        (True, True)
    """
    key = _key(metric)
    scores, only = {"a": a, "b": b}, {key: metric}
    found = compare(scores, correct, only, baseline="b", draws=draws, level=level, seed=seed, clusters=clusters)
    return cast(Difference, found["a", key].difference)


def compare(
    scores: Mapping[str, Float[np.ndarray, "answers"]],
    correct: Bool[np.ndarray, "answers"],
    metrics: Sequence[str] | Mapping[str, MetricLike],
    *,
    baseline: str | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> dict[tuple[str, str], Compared]:
    """Many metrics of many scores of the same answers, each with its interval and its difference to a baseline.

    The same numbers as ``interval`` and ``paired_difference``, but each score is sorted once. Scores that are
    probabilities and their metrics go into a call of their own.

    Args:
        scores: By name, over the same answers in the same order.
        correct: Which answers are right.
        metrics: Names in ``METRICS``, or functions by a name.
        baseline: Name of the score to compare with, e.g. that of sequence probability.
        draws: Resamples.
        level: Share of the resamples within the interval, in (0, 1).
        seed: Of the resamples.
        clusters: Draw these whole instead of single answers; one per answer.

    Returns:
        By (score, metric).

    Raises:
        MetricError: If a metric is not defined on the answers, or not on half of the resamples.
        ConfigError: If a metric or the baseline is unknown or a setting is outside its range.
    """
    named = dict(metrics) if isinstance(metrics, Mapping) else {name: name for name in metrics}
    _check(named, scores, baseline, draws, level)
    values = {(s, m): _function(metric)(x, correct) for s, x in scores.items() for m, metric in named.items()}
    drawn = _drawn(scores, correct, named, draws, seed, clusters)
    found = {}
    for (score, name), value in values.items():
        own = drawn[score, name]
        low, high, failed = _bounds(own, level, name)
        difference = None
        if baseline is not None and score != baseline:
            steps = own - drawn[baseline, name]
            bounds = _bounds(steps, level, name)
            gap = value - values[baseline, name]
            difference = Difference(gap, bounds[0], bounds[1], _p_value(steps), draws, bounds[2])
        found[score, name] = Compared(Interval(value, low, high, draws, failed), difference)
    return found


def across_seeds(values: Sequence[float], *, level: float = 0.95) -> Spread:
    """Mean of one number per seed, with Student's interval of the mean: mean +- t * s / sqrt(seeds). Needs scipy.

    Raises:
        MetricError: With fewer than two seeds, or a value that is not finite.
        ConfigError: If ``level`` is outside (0, 1).

    Example:
        >>> found = across_seeds([0.80, 0.82, 0.84])
        >>> round(found.mean, 2), round(found.low, 2), round(found.high, 2)
        (0.82, 0.77, 0.87)
    """
    _check_level(level)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise MetricError(f"a spread needs finite numbers of at least 2 seeds, got {list(values)}; run more seeds")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    t = float(require("scipy.stats", "qa").t.ppf((1 + level) / 2, len(values) - 1))
    half = t * deviation / math.sqrt(len(values))
    return Spread(mean, mean - half, mean + half, len(values))


def _drawn(
    scores: Mapping[str, Float[np.ndarray, "answers"]],
    correct: Bool[np.ndarray, "answers"],
    metrics: Mapping[str, MetricLike],
    draws: int,
    seed: int,
    clusters: Sequence[Hashable] | None,
) -> dict[tuple[str, str], Float[np.ndarray, "draws"]]:
    """Every metric of every score on every draw; NaN where it is not defined."""
    found = {(s, m): np.empty(draws) for s in scores for m in metrics}
    orders = {name: Order.of(*checked(score, correct)) for name, score in scores.items()}
    done = 0
    for counts in resamples(len(correct), draws, seed, clusters):
        block = slice(done, done := done + len(counts))
        for score, order in orders.items():
            ranked = order.ranked(counts)
            for name, metric in metrics.items():
                if isinstance(metric, str):
                    found[score, name][block] = METRICS[metric].over_draws(ranked)
                else:
                    found[score, name][block] = [_slowly(metric, scores[score], correct, c) for c in counts]
    return found


def _slowly(metric: Callable[..., float], score: np.ndarray, correct: np.ndarray, counts: np.ndarray) -> float:
    again = np.repeat(np.arange(len(correct)), counts)
    try:
        return metric(score[again], correct[again])
    except MetricError:
        return math.nan


def resamples(
    n: int, draws: int, seed: int, clusters: Sequence[Hashable] | None
) -> Iterator[Int[np.ndarray, "block answers"]]:
    """How often each draw holds each answer, some draws at a time; the draws do not depend on how many."""
    if clusters is not None and len(clusters) != n:
        raise MetricError(f"clusters must name one cluster for each of {n} answers, got {len(clusters)}")
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))} if clusters is not None else {}
    member = np.array([names[name] for name in clusters]) if clusters is not None else None
    units = len(names) if clusters is not None else n
    random = np.random.default_rng(seed)
    each = max(1, BLOCK // n)
    for start in range(0, draws, each):
        block = min(each, draws - start)
        picked = random.integers(units, size=(block, units)) + units * np.arange(block)[:, None]
        counts = np.bincount(picked.ravel(), minlength=block * units).reshape(block, units)
        yield counts if member is None else counts[:, member]


def _bounds(values: Float[np.ndarray, "draws"], level: float, name: str) -> tuple[float, float, int]:
    defined = values[~np.isnan(values)]
    failed = len(values) - len(defined)
    if 2 * failed > len(values):
        raise MetricError(
            f"{name} is not defined on {failed} of {len(values)} resamples: too few answers, or nearly all are "
            "right or nearly all wrong; judge more"
        )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), failed


def _p_value(steps: Float[np.ndarray, "draws"]) -> float:
    defined = steps[~np.isnan(steps)]
    smaller = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (smaller + 1) / (len(defined) + 1)))


def _key(metric: MetricLike) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "the metric")


def _function(metric: MetricLike) -> Callable[[np.ndarray, np.ndarray], float]:
    return METRICS[metric].function if isinstance(metric, str) else metric


def _check(
    metrics: Mapping[str, MetricLike], scores: Mapping[str, object], baseline: str | None, draws: int, level: float
) -> None:
    unknown = [metric for metric in metrics.values() if isinstance(metric, str) and metric not in METRICS]
    if unknown:
        raise ConfigError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}")
    if baseline is not None and baseline not in scores:
        raise ConfigError(f"the baseline {baseline!r} is none of the scores {', '.join(scores)}")
    if draws < 2:
        raise ConfigError(f"draws must be at least 2, got {draws}; 1000 is usual")
    _check_level(level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level must lie in (0, 1), got {level}; 0.95 is usual")
