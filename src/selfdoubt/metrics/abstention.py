"""Metrics of abstaining: what saying "I do not know" is worth. Pure functions of two lists.

``abstain`` says which questions are not answered; ``correct`` which answers are right or **would have been**. An answer
is so one of four: right, wrong, or abstained from although right or because wrong.

Abstaining is a true positive where the answer would have been wrong, as wrong is the positive class of AUROC. What is
undefined (0 of 0) is a ``MetricError``, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from selfdoubt.errors import ConfigError, MetricError
from selfdoubt.metrics.estimate import Estimate
from selfdoubt.metrics.ranking import JudgementsLike, PerDraw, check_answers
from selfdoubt.metrics.resampling import bound_resamples, draw_resamples

CountsPerDraw = Int[np.ndarray, "draws"]


class DecisionCounts(NamedTuple):
    """Numbers of answers by decision and judgement, one per draw."""

    right: CountsPerDraw  #: answered, and right
    wrong: CountsPerDraw  #: answered, and wrong
    abstained_right: CountsPerDraw  #: not answered; the answer would have been right
    abstained_wrong: CountsPerDraw  #: not answered; the answer would have been wrong

    @property
    def n(self) -> CountsPerDraw:
        """Number of questions."""
        return self.right + self.wrong + self.abstained_right + self.abstained_wrong


def omniscience_index(abstain: JudgementsLike, correct: JudgementsLike) -> float:
    """Return the share of right answers less that of wrong ones, in [-1, 1]; abstaining counts 0.

    Times 100 it is the Omniscience Index of Jackson et al. (2025, "AA-Omniscience: evaluating cross-domain knowledge
    reliability in large language models"): 100 (right - wrong) / all. It equals the utility at the price 1.

    Raises:
        MetricError: Fewer than two answers, lists that do not fit or hold no booleans.

    Example:
        >>> omniscience_index([False, False, False, True], [True, True, False, False])
        0.25
    """
    return _measure("omniscience_index", abstain, correct)


def hallucination_rate(abstain: JudgementsLike, correct: JudgementsLike) -> float:
    """Return the share of wrong answers among the questions that are not answered right, in [0, 1]; lower is better.

    wrong / (wrong + abstained), as Jackson et al. (2025) define it: how often the model answers wrong where it should
    have abstained. It is not the share of wrong answers among the given ones.

    Raises:
        MetricError: All questions are answered right, fewer than two answers, lists that do not fit.

    Example:
        >>> hallucination_rate([False, False, False, True], [True, True, False, False])
        0.5
    """
    return _measure("hallucination_rate", abstain, correct)


def abstention_precision(abstain: JudgementsLike, correct: JudgementsLike) -> float:
    """Return the share of the abstentions whose answer would have been wrong, in [0, 1].

    Raises:
        MetricError: Nothing was abstained from, fewer than two answers, lists that do not fit.

    Example:
        >>> abstention_precision([False, False, True, True], [True, False, True, False])
        0.5
    """
    return _measure("abstention_precision", abstain, correct)


def abstention_recall(abstain: JudgementsLike, correct: JudgementsLike) -> float:
    """Return the share of the wrong answers that were abstained from, in [0, 1].

    Raises:
        MetricError: No answer is or would be wrong, fewer than two answers, lists that do not fit.

    Example:
        >>> abstention_recall([False, False, True, True], [False, False, False, True])
        0.3333333333333333
    """
    return _measure("abstention_recall", abstain, correct)


def abstention_f1(abstain: JudgementsLike, correct: JudgementsLike) -> float:
    """Return the harmonic mean of ``abstention_precision`` and ``abstention_recall``, in [0, 1].

    2 TP / (2 TP + FP + FN): defined, and 0, where one of them is not defined.

    Raises:
        MetricError: Nothing is abstained from and nothing is wrong, fewer than two answers, lists that do not fit.

    Example:
        >>> abstention_f1([False, False, True, True], [False, False, False, True])
        0.4
    """
    return _measure("abstention_f1", abstain, correct)


def estimate_abstention(
    abstain: JudgementsLike,
    correct: JudgementsLike,
    *,
    price: float | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return the metrics of ``ABSTENTION_METRICS`` with bootstrap intervals; one that is undefined says why.

    Args:
        abstain: True for each question that is not answered.
        correct: True for each answer that is, or would have been, right.
        price: Adds "utility" at this price; None leaves it out.
        draws: Resamples of the questions.
        level: Share of the resamples within the interval, in (0, 1).
        seed: Seed of the resamples.

    Raises:
        ConfigError: The price is negative or not finite.
        MetricError: Fewer than two answers, lists that do not fit.

    Example:
        >>> index = estimate_abstention([False, False, True] * 40, [True, False, False] * 40)["omniscience_index"]
        >>> index.value, round(index.low, 2), round(index.high, 2)
        (0.0, -0.14, 0.15)
    """
    away, right = check_decisions(abstain, correct)
    cells = _split(away, right).T
    metrics: dict[str, Callable[[DecisionCounts], PerDraw]] = dict(ABSTENTION_METRICS)
    if price is not None:
        check_price(price)
        metrics["utility"] = lambda counts: utility_over_draws(counts, price)
    resamples = [counts @ cells for counts in draw_resamples(len(right), draws, seed)]
    drawn = DecisionCounts(*np.concatenate(resamples).T)
    whole = count_decisions(abstain, correct)
    return {name: _estimate(name, metric, whole, drawn, level) for name, metric in metrics.items()}


def omniscience_index_over_draws(counts: DecisionCounts) -> PerDraw:
    """Return ``omniscience_index`` of each draw."""
    return utility_over_draws(counts, 1)


def hallucination_rate_over_draws(counts: DecisionCounts) -> PerDraw:
    """Return ``hallucination_rate`` of each draw."""
    return _divide(counts.wrong, counts.n - counts.right)


def abstention_precision_over_draws(counts: DecisionCounts) -> PerDraw:
    """Return ``abstention_precision`` of each draw."""
    return _divide(counts.abstained_wrong, counts.abstained_wrong + counts.abstained_right)


def abstention_recall_over_draws(counts: DecisionCounts) -> PerDraw:
    """Return ``abstention_recall`` of each draw."""
    return _divide(counts.abstained_wrong, counts.abstained_wrong + counts.wrong)


def abstention_f1_over_draws(counts: DecisionCounts) -> PerDraw:
    """Return ``abstention_f1`` of each draw."""
    twice = 2 * counts.abstained_wrong
    return _divide(twice, twice + counts.abstained_right + counts.wrong)


def utility_over_draws(counts: DecisionCounts, price: float) -> PerDraw:
    """Return ``utility`` of each draw."""
    return (counts.right - price * counts.wrong) / counts.n


#: Metrics of decisions by the name that they have in a report; each is NaN on a draw where it is not defined.
ABSTENTION_METRICS: Mapping[str, Callable[[DecisionCounts], PerDraw]] = MappingProxyType({
    "omniscience_index": omniscience_index_over_draws,
    "hallucination_rate": hallucination_rate_over_draws,
    "abstention_precision": abstention_precision_over_draws,
    "abstention_recall": abstention_recall_over_draws,
    "abstention_f1": abstention_f1_over_draws,
})  # fmt: skip

_UNDEFINED = {
    "hallucination_rate": "all questions are answered right",
    "abstention_precision": "nothing was abstained from",
    "abstention_recall": "no answer is wrong, or would have been",
    "abstention_f1": "nothing was abstained from, and no answer is wrong",
}


def _measure(name: str, abstain: JudgementsLike, correct: JudgementsLike) -> float:
    value = float(ABSTENTION_METRICS[name](count_decisions(abstain, correct))[0])
    if math.isnan(value):
        raise MetricError(f"{name} is not defined: {_UNDEFINED[name]}; measure more questions")
    return value


def _estimate(
    name: str,
    metric: Callable[[DecisionCounts], PerDraw],
    whole: DecisionCounts,
    drawn: DecisionCounts,
    level: float,
) -> Estimate:
    value = float(metric(whole)[0])
    if math.isnan(value):
        return Estimate.missing(_UNDEFINED[name])
    try:
        bounds = bound_resamples(metric(drawn), level, name)
    except MetricError as error:
        return Estimate.missing(str(error))
    return Estimate(value, bounds.low, bounds.high, failed=bounds.failed)


def _divide(part: CountsPerDraw, whole: CountsPerDraw) -> PerDraw:
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def count_decisions(abstain: JudgementsLike, correct: JudgementsLike) -> DecisionCounts:
    """Return the counts of the answers as they are, as the only draw.

    Raises:
        MetricError: As ``check_decisions``.
    """
    return DecisionCounts(*_split(*check_decisions(abstain, correct)).sum(1)[:, None])


def _split(away: Bool[np.ndarray, "answers"], right: Bool[np.ndarray, "answers"]) -> Int[np.ndarray, "kinds answers"]:
    """Return 1 in the row of each answer's kind, in the order of ``DecisionCounts``."""
    return np.stack([~away & right, ~away & ~right, away & right, away & ~right]).astype(np.int64)


def check_decisions(
    abstain: JudgementsLike, correct: JudgementsLike
) -> tuple[Bool[np.ndarray, "answers"], Bool[np.ndarray, "answers"]]:
    """Return decisions and judgements as booleans, checked.

    Raises:
        MetricError: If they are not two lists of booleans of one length of at least 2.
    """
    away: Shaped[np.ndarray, "..."] = np.asarray(abstain)
    if away.dtype != np.bool_:
        raise MetricError(f"abstain must hold booleans, got {away.dtype}; give e.g. p_correct < threshold")
    _, right = check_answers(away.astype(np.int64), correct, "abstain")
    return away, right


def check_price(price: float) -> None:
    """Check the price of a wrong answer, in right answers.

    Raises:
        ConfigError: If it is negative or not finite.
    """
    if not (math.isfinite(price) and price >= 0):
        raise ConfigError(f"price must be a number of right answers, at least 0, got {price}; 9 means one in ten")
