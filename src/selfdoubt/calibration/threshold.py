"""Threshold of p_correct at or above which answers are right at least as often as the target, with a guarantee.

Learn then test (Angelopoulos, Bates, Candès, Jordan and Lei, 2021, "Learn then test: calibrating predictive algorithms
to achieve risk control"), with the exact binomial tail of selective classification (Geifman and El-Yaniv, 2017,
"Selective classification for deep neural networks"; Bates et al., 2021, "Distribution-free, risk-controlling prediction
sets").

Why the guarantee holds. Let a(t) be the accuracy among all questions of the world whose answer has p_correct >= t.

1. The thresholds, their order and the starting points are fixed before the calibration answers are looked at: they are
   plain numbers, or come from other answers (``build_grid``). So is p_correct: its head was fitted on other answers.
2. Answers are independent draws from where later questions come from. Then, given how many of them, N, lie at or above
   t, the number R of right ones among these is binomial with N trials and a(t), whatever p_correct is worth. If
   a(t) < target, the tail P(Binomial(N, target) >= R) is at or below a level with at most that chance, for every N and
   so on the whole; N = 0 never passes.
3. Thresholds are tested from the surest downwards. Each start brings an equal share of 1 - confidence as its level;
   what a passed test had is handed to the next, and a failed test loses it (the fallback procedure of Wiens, 2003; with
   one start, fixed-sequence testing). So with a chance of at most 1 - confidence any of the passed thresholds is below
   the target, for any dependence between tests; hence also the lowest passed one, which is taken.

Nothing here assumes that p_correct is calibrated, or that accuracy falls with the threshold. What is assumed is 2.: for
another kind of question, or if one question is counted several times, nothing is guaranteed. The chance is over the
draw of the calibration answers: of all who calibrate so, at most a share of 1 - confidence ends below the target.

A sequence best starts where enough answers are expected that a test can be passed at all. That must not be read off the
calibration answers themselves: "where N is large enough" would tie N to R wherever p_correct ranks badly.
``build_grid`` reads it off other answers; the default grid starts at fixed places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from selfdoubt.errors import ConfigError, DataError, require
from selfdoubt.formatting import format_percent

#: Steps of coverage at which ``build_grid`` puts thresholds.
COVERAGE_STEPS = 50
#: A sequence starts where twice as many answers are expected as would suffice if all of them were right.
MARGIN = 2.0


@dataclass(frozen=True)
class AccuracyGuarantee:
    """Answers with p_correct at or above the threshold are right at least as often as the target, with confidence."""

    threshold: float
    target_accuracy: float
    confidence: float
    coverage: float  #: share of the calibration answers at or above the threshold, in [0, 1]
    answers: int  #: number of calibration answers
    answered: int  #: number of them at or above the threshold
    right: int  #: number of right ones among these
    bound: float  #: exact lower bound of their accuracy at the level of this one test, >= target_accuracy

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as ``Calibration.promise`` holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Grid:
    """Thresholds in [0, 1], the highest first, and the indices at which a sequence of tests starts.

    Raises:
        ConfigError: If there are none, they do not descend, or a start is outside the list.
    """

    thresholds: tuple[float, ...]
    starts: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        t = self.thresholds
        if not t or not all(0 <= x <= 1 for x in t) or any(a <= b for a, b in pairwise(t)):
            raise ConfigError(f"thresholds must be in [0, 1] and descend, e.g. (0.9, 0.8, 0.0), got {_few(t)}")
        if not self.starts or not set(self.starts) <= set(range(len(t))):
            raise ConfigError(f"starts are places in a list of {len(t)} thresholds, 0 the first, got {self.starts}")


def build_fixed_grid(target_accuracy: float) -> Grid:
    """Return thresholds that depend on no answers, from halfway between the target and 1 down to 0.

    Half of the level starts there and half at p_correct = target: where p_correct is honest, the answers above that are
    right more often than the target, and there are the most of them.
    """
    _check_share("the target accuracy", target_accuracy)
    top, step = (1 + target_accuracy) / 2, 0.01
    upper = [target_accuracy + i * (top - target_accuracy) / 5 for i in range(5, 0, -1)]
    lower = [target_accuracy - i * step for i in range(math.ceil(target_accuracy / step))]
    return Grid((*upper, *(t for t in lower if t > 1e-9), 0.0), (0, 5))


def build_grid(
    elsewhere: Float[np.ndarray, " others"], answers: int, target_accuracy: float, confidence: float = 0.95
) -> Grid:
    """Return thresholds at even steps of coverage, taken from other answers than those that will be tested.

    One sequence, which starts where ``MARGIN`` times as many answers are expected as would pass if all were right.

    Args:
        elsewhere: p_correct of answers that the tests will not see, out-of-fold where a head was fitted on them.
        answers: Number of answers that will be tested.
        target_accuracy: Least accuracy of the answers at or above the threshold, in (0, 1).
        confidence: Probability with which the target is kept, in (0, 1).
    """
    _check_p(elsewhere)
    needed = min(MARGIN * count_least_answers(target_accuracy, confidence), answers)
    coverages = [i / COVERAGE_STEPS for i in range(1, COVERAGE_STEPS + 1) if answers * i / COVERAGE_STEPS >= needed]
    quantiles = np.quantile(elsewhere, [1 - c for c in coverages[:-1]], method="inverted_cdf")
    return Grid((*sorted({float(t) for t in quantiles if t > 0}, reverse=True), 0.0))


def count_least_answers(target_accuracy: float, confidence: float = 0.95) -> int:
    """Return the least number of answers that can prove the target, if all of them are right."""
    _check_share("the target accuracy", target_accuracy)
    _check_share("the confidence", confidence)
    return max(1, math.ceil(math.log(1 - confidence) / math.log(target_accuracy) - 1e-9))


def find_threshold(
    p_correct: Float[np.ndarray, " answers"],
    correct: Bool[np.ndarray, " judged"],
    target_accuracy: float,
    confidence: float = 0.95,
    *,
    grid: Grid | None = None,
) -> AccuracyGuarantee | None:
    """Return the threshold of largest coverage that keeps the target; None if none does: ``explain_no_threshold``.

    Args:
        p_correct: Probabilities in [0, 1], by a head that has not seen these answers.
        correct: Judgement of each; one answer per question.
        target_accuracy: Least accuracy of the answers at or above the threshold, in (0, 1).
        confidence: Probability with which the target is kept, over the draw of these answers, in (0, 1).
        grid: Thresholds to test, chosen without these answers; None takes ``build_fixed_grid(target_accuracy)``.

    Raises:
        ConfigError: If the target or the confidence is out of range.
        DataError: If there are no answers, p_correct is outside [0, 1], or the lists differ in length.

    Example:
        >>> sure, unsure = np.full(60, 0.97), np.full(60, 0.4)
        >>> right = np.array([True] * 60 + [True, False] * 30)
        >>> promise = find_threshold(np.concatenate([sure, unsure]), right, 0.9)
        >>> promise.coverage, 0.4 < promise.threshold < 0.97
        (0.5, True)
    """
    grid = grid or build_fixed_grid(target_accuracy)
    answered, right = count_at_thresholds(p_correct, correct, grid)
    levels = find_passed_levels(answered[None], right[None], target_accuracy, confidence, grid.starts)[0]
    places = np.flatnonzero(levels)
    if not len(places):
        return None
    last = int(places[-1])
    n, k = int(answered[last]), int(right[last])
    return AccuracyGuarantee(
        threshold=grid.thresholds[last],
        target_accuracy=target_accuracy,
        confidence=confidence,
        coverage=n / len(p_correct),
        answers=len(p_correct),
        answered=n,
        right=k,
        bound=_bound(n, k, float(levels[last])),
    )


def count_at_thresholds(
    p_correct: Float[np.ndarray, " answers"], correct: Bool[np.ndarray, " judged"], grid: Grid
) -> tuple[Int[np.ndarray, " thresholds"], Int[np.ndarray, " thresholds"]]:
    """Count the answers at or above each threshold, and the right ones among them."""
    _check_p(p_correct)
    if correct.shape != p_correct.shape:
        raise DataError(f"wanted one judgement for each p_correct, got {len(correct)} and {len(p_correct)}")
    order = np.argsort(p_correct, kind="stable")
    below = np.searchsorted(p_correct[order], np.array(grid.thresholds), side="left")
    wins = np.concatenate([np.cumsum(correct[order][::-1])[::-1], [0]])
    return len(p_correct) - below, wins[below]


def find_passed_levels(
    answered: Int[np.ndarray, "sets thresholds"],
    right: Int[np.ndarray, "sets thresholds"],
    target_accuracy: float,
    confidence: float = 0.95,
    starts: Sequence[int] = (0,),
) -> Float[np.ndarray, "sets thresholds"]:
    """Return the level at which each threshold passed its test, 0 where it did not: steps 2 and 3 of the proof above.

    Args:
        answered: Number of answers at or above each threshold, the highest threshold first, per calibration set.
        right: Number of right ones among these.
        target_accuracy: Least accuracy, in (0, 1).
        confidence: Probability with which the target is kept, in (0, 1).
        starts: Indices of the thresholds at which a sequence of tests starts.
    """
    _check_share("the target accuracy", target_accuracy)
    _check_share("the confidence", confidence)
    tail = require("scipy.stats", "qa").binom.sf(right - 1, answered, target_accuracy)
    share = (1 - confidence) / len(starts)
    levels = np.zeros(answered.shape)
    level = np.zeros(len(answered))
    for place in range(answered.shape[1]):
        level = level + share * (place in starts)
        level = np.where((tail[:, place] <= level) & (answered[:, place] > 0), level, 0.0)
        levels[:, place] = level
    return levels


def explain_no_threshold(
    p_correct: Float[np.ndarray, " answers"],
    correct: Bool[np.ndarray, " judged"],
    target_accuracy: float,
    confidence: float = 0.95,
    *,
    grid: Grid | None = None,
    share: float = 1.0,
) -> str:
    """Return a sentence on why no threshold qualifies: the best bound, and about how many more answers are needed.

    Args:
        p_correct: As for ``find_threshold``.
        correct: As for ``find_threshold``.
        target_accuracy: As for ``find_threshold``.
        confidence: As for ``find_threshold``.
        grid: As for ``find_threshold``.
        share: Share of further answers that would be tested, in (0, 1]; the head learns from the others.
    """
    grid = grid or build_fixed_grid(target_accuracy)
    answered, right = count_at_thresholds(p_correct, correct, grid)
    shares = format_percent(target_accuracy), format_percent(confidence)
    goal = f"no threshold keeps {shares[0]} of answers right with {shares[1]} confidence"
    least = count_least_answers(target_accuracy, confidence)
    total = len(p_correct)
    if total < least:
        least_more = math.ceil((least - total) / share)
        return (
            f"{goal}: {total} answers to test it on are too few even if all were right; "
            f"at least {least_more} more judged answers are needed"
        )
    level = (1 - confidence) / len(grid.starts)
    # No sequence got beyond its start, so these are the bounds that count.
    bounds = {place: _bound(int(answered[place]), int(right[place]), level) for place in grid.starts}
    best = max(bounds, key=lambda place: bounds[place])
    seen = f"{right[best]} of the surest {answered[best]} were right, which proves {format_percent(bounds[best])}"
    sizes = [
        _estimate_needed(int(n), int(k), total, target_accuracy, level, least)
        for n, k in zip(answered, right, strict=True)
    ]
    needed = min((w for w in sizes if w is not None), default=None)
    if needed is None:
        return (
            f"{goal}: {seen}, and no share of the answers was right often enough; more answers would not help, "
            "a lower target or a model that knows more would"
        )
    more: float = max(needed - total, total / 10) / share
    unit = 10 ** max(int(math.log10(more)) - 1, 1)
    return f"{goal}: {seen}; roughly {math.ceil(more / unit) * unit} more judged answers may do"


def _estimate_needed(n: int, k: int, total: int, target: float, level: float, least: int) -> int | None:
    """Estimate the number of answers that suffice at this threshold if shares stay as they are; None for never."""
    if n < min(least, 20) or k / n <= target:
        return None
    sizes = np.unique(np.geomspace(least, 1e6, 200).astype(int))
    tail = require("scipy.stats", "qa").binom.sf(np.floor(k / n * sizes) - 1, sizes, target)
    places = np.flatnonzero(tail <= level)
    return math.ceil(int(sizes[places[0]]) * total / n) if len(places) else None


def _bound(n: int, k: int, level: float) -> float:
    """Return Clopper and Pearson's lower bound of a share of which k of n were seen."""
    return float(require("scipy.stats", "qa").beta.ppf(level, k, n - k + 1)) if k else 0.0


def _few(values: Sequence[float]) -> str:
    return f"{list(values[:5])}{' ...' if len(values) > 5 else ''}"


def _check_share(what: str, value: float) -> None:
    if not 0 < value < 1:
        raise ConfigError(f"{what} is a share between 0 and 1 (90 % is 0.9), got {value}")


def _check_p(p: Float[np.ndarray, " answers"]) -> None:
    if not p.size:
        raise DataError("a threshold needs judged answers, got none")
    bad = p[~((p >= 0) & (p <= 1))]
    if bad.size:
        raise DataError(f"p_correct is a probability in [0, 1], got {bad[0]}; was it calibrated?")
