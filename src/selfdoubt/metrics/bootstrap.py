"""Bootstrap intervals over questions, paired differences, and the spread over seeds.

The questions are drawn again with replacement, ``draws`` times, with the same seed the same way for every score and
metric; the interval is between percentiles of the metric over these draws (Efron, 1979). Two scores are compared on the
same draws. A draw on which the metric is not defined (all answers right, say) is left out and counted in ``failed``.

A metric is a name in ``selective.METRICS``, computed for all draws at once, or any function of (risk, correct), called
draw by draw: the slow way, which gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float

from selfdoubt.errors import ConfigError, MetricError, require
from selfdoubt.metrics.estimate import Estimate
from selfdoubt.metrics.ranking import JudgementsLike, Order, ScoresLike, check_answers
from selfdoubt.metrics.resampling import bound_resamples, draw_resamples, two_sided_p
from selfdoubt.metrics.selective import METRICS

MetricLike = str | Callable[[np.ndarray, np.ndarray], float]


class Comparison(NamedTuple):
    """A metric of one score, and its difference to the baseline's."""

    estimate: Estimate
    difference: Estimate | None  #: None for the baseline itself, or without one


class SystemComparison(NamedTuple):
    """A metric of two systems on the same questions."""

    a: float | None  #: None: undefined on the answers of A
    b: float | None
    difference: Estimate  #: B minus A


def bootstrap_interval(
    metric: MetricLike,
    risk: ScoresLike,
    correct: JudgementsLike,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Return a metric with its bootstrap interval.

    Args:
        metric: A name in ``METRICS``, or a function of (risk, correct).
        risk: One score per answer that grows with doubt, or ``p_correct`` for a metric that needs it.
        correct: True for each right answer.
        draws: Resamples.
        level: Share of the resamples within the interval, in (0, 1).
        seed: Seed of the resamples.
        clusters: Draw these whole instead of single answers, e.g. each answer's question or topic; one per answer.

    Raises:
        MetricError: If the metric is not defined on the answers, or not on half of the resamples.
        ConfigError: If the metric is unknown or a setting is outside its range.

    Example:
        >>> risk, correct = np.arange(100.0), np.arange(100) % 3 != 0
        >>> accuracy = bootstrap_interval("accuracy", risk, correct)
        >>> accuracy.value, round(accuracy.low, 2), round(accuracy.high, 2), accuracy.failed
        (0.66, 0.57, 0.75, 0)
    """
    key = _key(metric)
    compared = compare_scores(
        {"": risk}, correct, {key: metric}, draws=draws, level=level, seed=seed, clusters=clusters
    )
    return compared["", key].estimate


def paired_difference(
    metric: MetricLike,
    a: ScoresLike,
    b: ScoresLike,
    correct: JudgementsLike,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Estimate:
    """Return the metric of ``a`` minus that of ``b``, over the same resamples, with its p-value.

    The p-value is twice the smaller share of resamples on either side of zero, those at zero on both, with one added to
    count and total (Davison and Hinkley, 1997, section 4.2), at most 1: never below 2 / (draws + 1).

    Raises:
        MetricError: If the metric is not defined on the answers, or not on half of the resamples.
        ConfigError: If the metric is unknown or a setting is outside its range.

    Example:
        >>> good, bad = np.arange(60.0), np.arange(60.0) % 7
        >>> difference = paired_difference("auroc", good, bad, np.arange(60) < 30)
        >>> difference.low > 0, difference.p < 0.01
        (True, True)
    """
    key = _key(metric)
    compared = compare_scores(
        {"a": a, "b": b}, correct, {key: metric}, baseline="b", draws=draws, level=level, seed=seed, clusters=clusters
    )
    return cast(Estimate, compared["a", key].difference)


def compare_scores(
    scores: Mapping[str, ScoresLike],
    correct: JudgementsLike,
    metrics: Sequence[str] | Mapping[str, MetricLike],
    *,
    baseline: str | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> dict[tuple[str, str], Comparison]:
    """Return many metrics of many scores of the same answers, each with its interval and difference to a baseline.

    The same numbers as ``bootstrap_interval`` and ``paired_difference``, but each score is sorted once. Scores that are
    probabilities and their metrics go into a call of their own.

    Args:
        scores: By name, over the same answers in the same order.
        correct: True for each right answer.
        metrics: Names in ``METRICS``, or functions by a name.
        baseline: Name of the score to compare with, e.g. "sum_nll".
        draws: Resamples.
        level: Share of the resamples within the interval, in (0, 1).
        seed: Seed of the resamples.
        clusters: Draw these whole instead of single answers; one per answer.

    Returns:
        The comparisons by (score name, metric name).

    Raises:
        MetricError: If a metric is not defined on the answers, or not on half of the resamples.
        ConfigError: If a metric or the baseline is unknown or a setting is outside its range.
    """
    named = dict(metrics) if isinstance(metrics, Mapping) else {name: name for name in metrics}
    _check(named, scores, baseline, draws, level)
    arrays, right = {name: np.asarray(score) for name, score in scores.items()}, np.asarray(correct)
    values = {(s, m): _function(metric)(x, right) for s, x in arrays.items() for m, metric in named.items()}
    drawn = _measure_draws(arrays, right, named, draws, seed, clusters)
    compared = {}
    for (score, name), value in values.items():
        low, high, failed = bound_resamples(drawn[score, name], level, name)
        difference = None
        if baseline is not None and score != baseline:
            gaps = drawn[score, name] - drawn[baseline, name]
            bounds = bound_resamples(gaps, level, name)
            gap = value - values[baseline, name]
            difference = Estimate(gap, bounds.low, bounds.high, p=two_sided_p(gaps), failed=bounds.failed)
        compared[score, name] = Comparison(Estimate(value, low, high, failed=failed), difference)
    return compared


def compare_systems(
    metric: str,
    a: Sequence[tuple[float, bool]],
    b: Sequence[tuple[float, bool]],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> SystemComparison:
    """Return a metric of two systems on the same questions, in the same order, and the difference ``b`` minus ``a``.

    Each system has its own judgements: unlike ``compare_scores``, where two scores share them. Where the metric is not
    defined, the difference says why.

    Args:
        metric: A name in ``METRICS``.
        a: Risk and judgement of each question.
        b: The same of the other system.
        draws: Resamples of the questions, the same for both.
        level: Share of the resamples within the interval, in (0, 1).
        seed: Seed of the resamples.

    Example:
        >>> a, b = [(0.1, False), (0.9, True)] * 10, [(0.9, False), (0.1, True)] * 10
        >>> compare_systems("auroc", a, b).difference.value
        1.0
    """
    arrays = [(np.array([r for r, _ in side], np.float64), np.array([c for _, c in side], bool)) for side in (a, b)]
    values: list[float | None] = []
    reasons: list[str] = []
    for x, right in arrays:
        try:
            values.append(float(METRICS[metric].function(x, right)))
        except MetricError as error:
            values.append(None)
            reasons.append(str(error))
    before, after = values
    if before is None or after is None:
        return SystemComparison(before, after, Estimate.missing(reasons[0]))
    orders = [Order.sort(*check_answers(x, right)) for x, right in arrays]
    measure = METRICS[metric].over_draws
    gaps = [measure(orders[1].rank(n)) - measure(orders[0].rank(n)) for n in draw_resamples(len(a), draws, seed)]
    try:
        low, high, failed = bound_resamples(np.concatenate(gaps), level, metric)
    except MetricError as error:
        return SystemComparison(before, after, Estimate.missing(str(error)))
    return SystemComparison(before, after, Estimate(after - before, low, high, failed=failed))


def estimate_mean(values: Sequence[float], *, draws: int = 1000, level: float = 0.95, seed: int = 0) -> Estimate:
    """Return a mean with its bootstrap interval; of no values, an estimate that is missing.

    Example:
        >>> mean = estimate_mean([0.0, 1.0] * 50)
        >>> mean.value, round(mean.low, 2), round(mean.high, 2)
        (0.5, 0.4, 0.6)
    """
    if not values:
        return Estimate.missing("there is nothing to average")
    x = np.asarray(values, np.float64)
    drawn = np.concatenate([counts @ x / len(x) for counts in draw_resamples(len(x), draws, seed)])
    low, high, _ = bound_resamples(drawn, level, "the mean")
    return Estimate(float(x.mean()), low, high)


def estimate_over_seeds(values: Sequence[float], *, level: float = 0.95) -> Estimate:
    """Return the mean of one number per seed, with Student's interval: mean +- t * s / sqrt(seeds). Needs scipy.

    Raises:
        MetricError: With fewer than two seeds, or a value that is not finite.
        ConfigError: If ``level`` is outside (0, 1).

    Example:
        >>> mean = estimate_over_seeds([0.80, 0.82, 0.84])
        >>> round(mean.value, 2), round(mean.low, 2), round(mean.high, 2)
        (0.82, 0.77, 0.87)
    """
    _check_level(level)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise MetricError(f"a spread needs finite numbers of at least 2 seeds, got {list(values)}; run more seeds")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    t = float(require("scipy.stats", "qa").t.ppf((1 + level) / 2, len(values) - 1))
    half = t * deviation / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def _measure_draws(
    scores: Mapping[str, Float[np.ndarray, "answers"]],
    correct: Bool[np.ndarray, "answers"],
    metrics: Mapping[str, MetricLike],
    draws: int,
    seed: int,
    clusters: Sequence[Hashable] | None,
) -> dict[tuple[str, str], Float[np.ndarray, "draws"]]:
    """Return every metric of every score on every draw; NaN where it is not defined."""
    drawn = {(s, m): np.empty(draws) for s in scores for m in metrics}
    orders = {name: Order.sort(*check_answers(score, correct)) for name, score in scores.items()}
    done = 0
    for counts in draw_resamples(len(correct), draws, seed, clusters):
        block = slice(done, done := done + len(counts))
        for score, order in orders.items():
            ranked = order.rank(counts)
            for name, metric in metrics.items():
                if isinstance(metric, str):
                    drawn[score, name][block] = METRICS[metric].over_draws(ranked)
                else:
                    drawn[score, name][block] = [_measure_draw(metric, scores[score], correct, c) for c in counts]
    return drawn


def _measure_draw(metric: Callable[..., float], score: np.ndarray, correct: np.ndarray, counts: np.ndarray) -> float:
    again = np.repeat(np.arange(len(correct)), counts)
    try:
        return metric(score[again], correct[again])
    except MetricError:
        return math.nan


def _key(metric: MetricLike) -> str:
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "the metric")


def _function(metric: MetricLike) -> Callable[[np.ndarray, np.ndarray], float]:
    return METRICS[metric].function if isinstance(metric, str) else metric


def _check(
    metrics: Mapping[str, MetricLike], scores: Mapping[str, object], baseline: str | None, draws: int, level: float
) -> None:
    unknown = [metric for metric in metrics.values() if isinstance(metric, str) and metric not in METRICS]
    if unknown:
        raise ConfigError(f"unknown metric {unknown[0]!r}; use one of {', '.join(METRICS)}")
    if baseline is not None and baseline not in scores:
        raise ConfigError(f"the baseline {baseline!r} is none of the scores {', '.join(scores)}")
    if draws < 2:
        raise ConfigError(f"draws must be at least 2, got {draws}; 1000 is usual")
    _check_level(level)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"level must lie in (0, 1), got {level}; 0.95 is usual")
