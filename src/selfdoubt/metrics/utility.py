"""Utility of answers at stated prices: what answering is worth if a wrong answer costs more than none.

A right answer counts +1, an abstention 0, and a wrong answer minus its price. The price says what p_correct an answer
needs: price / (1 + price), so 1/2 at 1 and 9/10 at 9.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from selfdoubt.errors import MetricError
from selfdoubt.metrics.abstention import check_price, count_decisions, utility_over_draws
from selfdoubt.metrics.estimate import Estimate
from selfdoubt.metrics.ranking import JudgementsLike, Order, Ranked, ScoresLike, check_answers, rank_answers
from selfdoubt.metrics.resampling import bound_resamples, draw_resamples

#: Prices of a wrong answer in a report, in right answers: worth it at p_correct above 1/2, 2/3, 4/5 and 9/10.
PRICES = (1.0, 2.0, 4.0, 9.0)


class BestThreshold(NamedTuple):
    """The threshold of the highest utility on a set of answers: answer if risk <= threshold."""

    utility: float  #: per question; never below 0, which answering nothing has
    threshold: float | None  #: None: answering nothing is best
    coverage: float  #: share answered, in [0, 1]


def utility(abstain: JudgementsLike, correct: JudgementsLike, *, price: float) -> float:
    """Return the worth per question: +1 if right, -price if wrong, 0 if not answered; in [-price, 1].

    Args:
        abstain: True for each question that is not answered.
        correct: True for each answer that is, or would have been, right.
        price: Price of a wrong answer, in right answers; at least 0.

    Raises:
        ConfigError: The price is negative or not finite.
        MetricError: Fewer than two answers, lists that do not fit.

    Example:
        >>> utility([False, False, True, True], [True, False, True, False], price=4)
        -0.75
    """
    check_price(price)
    return float(utility_over_draws(count_decisions(abstain, correct), price)[0])


def abstain_at_price(p_correct: ScoresLike, price: float) -> Bool[np.ndarray, "answers"]:
    """Return which questions to abstain from at a price of a wrong answer: those with p <= price / (1 + price).

    Answering is worth p - (1 - p) price, which is above 0 where p > price / (1 + price) (Chow, 1970): the best rule if
    p_correct is calibrated.

    Raises:
        ConfigError: The price is negative or not finite.
        MetricError: p outside [0, 1] or not finite.

    Example:
        >>> abstain_at_price([0.3, 0.5, 0.85], 4).tolist()
        [True, True, False]
    """
    check_price(price)
    p = np.asarray(p_correct, np.float64)
    bad = p[~((p >= 0) & (p <= 1))]
    if bad.size:
        raise MetricError(f"p_correct must be a probability in [0, 1], got {bad[0]}; give 1 - risk only if it is one")
    return p <= price / (1 + price)


def find_best_threshold(risk: ScoresLike, correct: JudgementsLike, *, price: float) -> BestThreshold:
    """Return the threshold on a risk with the highest utility on these answers, between groups of equal risk.

    It is chosen on the answers on which it is measured: a bound for what this order of the answers can be worth, and
    no promise for later ones. Of equal utilities the lowest threshold counts.

    Raises:
        ConfigError: The price is negative or not finite.
        MetricError: Fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> find_best_threshold([0.1, 0.2, 0.3, 0.9], [True, True, False, False], price=1)
        BestThreshold(utility=0.5, threshold=0.2, coverage=0.5)
    """
    check_price(price)
    ranked = rank_answers(risk, correct)
    n = int(ranked.n[0])
    worth = _gain(ranked, price)[0]
    best = int(worth.argmax())
    if worth[best] <= 0:
        return BestThreshold(0.0, None, 0.0)
    return BestThreshold(float(worth[best]) / n, float(ranked.score[best]), int(ranked.end[0, best]) / n)


def estimate_best_utility(
    risk: ScoresLike,
    correct: JudgementsLike,
    *,
    price: float,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """Return the utility at the best threshold with its bootstrap interval; the threshold is chosen on each resample.

    Raises:
        ConfigError: The price is negative or not finite.
        MetricError: Fewer than two answers, a risk that is not finite, lists that do not fit.

    Example:
        >>> best = estimate_best_utility([0.1, 0.2, 0.3] * 40, [True, True, False] * 40, price=1)
        >>> round(best.value, 2), round(best.low, 2), round(best.high, 2)
        (0.67, 0.58, 0.74)
    """
    value = find_best_threshold(risk, correct, price=price).utility
    scores, right = check_answers(risk, correct)
    order = Order.sort(scores, right)
    drawn = [
        np.maximum(_gain(order.rank(counts), price).max(1), 0) / len(right)
        for counts in draw_resamples(len(right), draws, seed)
    ]
    bounds = bound_resamples(np.concatenate(drawn), level, "the best utility")
    return Estimate(value, bounds.low, bounds.high)


def _gain(ranked: Ranked, price: float) -> Float[np.ndarray, "draws groups"]:
    """Return the summed worth of answering up to the end of each group."""
    return ranked.right_end - float(price) * (ranked.end - ranked.right_end)
