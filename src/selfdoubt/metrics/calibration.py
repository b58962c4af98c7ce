"""Metrics of ``p_correct``: calibration error, Brier score, log loss. Pure functions of numpy arrays.

``p_correct`` is the probability that the answer is right, in [0, 1]; ``correct`` says whether it is. Answers with equal
probabilities share their mean accuracy, so file order cannot matter. All of this is defined when every answer is right
or every one wrong; with fewer than two answers, or p outside [0, 1], it is an error.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from selfdoubt.errors import ConfigError, MetricError
from selfdoubt.metrics.ranking import JudgementsLike, PerDraw, Ranked, ScoresLike, get_only_draw, rank_answers

Spacing = Literal["width", "mass"]
#: Probabilities are kept this far from 0 and 1 in the log loss: a sure and wrong answer costs 16.1 nats, not infinity.
CLIP = 1e-7


class Reliability(NamedTuple):
    """The bins that are not empty, for a plot of accuracy against confidence."""

    low: Float[np.ndarray, "bins"]  #: edges of equal-width bins; least and greatest p in bins of equal mass
    high: Float[np.ndarray, "bins"]
    answers: Int[np.ndarray, "bins"]  #: in the bin
    confidence: Float[np.ndarray, "bins"]  #: their mean p_correct
    accuracy: Float[np.ndarray, "bins"]  #: their share of right answers


def ece(
    p_correct: ScoresLike,
    correct: JudgementsLike,
    *,
    bins: int = 15,
    spacing: Spacing = "width",
) -> float:
    """Return the expected calibration error: the mean over answers of |accuracy - confidence| of their bin, in [0, 1].

    Naeini, Cooper and Hauskrecht (2015), "Obtaining well calibrated probabilities using Bayesian binning"; 15 bins of
    equal width as in Guo et al. (2017), "On calibration of modern neural networks". A bin holds its lower edge; the
    last also holds 1. With ``spacing="mass"`` the answers sorted by p are cut at ``floor(j n / bins)`` (Nguyen and
    O'Connor, 2015); equal ones on both sides of a cut have their mean accuracy on both.

    Raises:
        MetricError: Too few answers, p outside [0, 1] or not finite, lists that do not fit.
        ConfigError: ``bins`` below 1 or an unknown ``spacing``.

    Example:
        >>> ece(np.array([0.5, 0.5, 0.5, 0.5]), np.array([True, True, True, False]))
        0.25
    """
    _check_bins(bins, spacing)
    kernel = ece_mass_over_draws if spacing == "mass" else ece_over_draws
    return get_only_draw(kernel(_ranked(p_correct, correct), bins))


def brier(p_correct: ScoresLike, correct: JudgementsLike) -> float:
    """Return the Brier score: the mean of (p - correct)^2, in [0, 1], lower is better (Brier, 1950).

    Raises:
        MetricError: Too few answers, p outside [0, 1] or not finite, lists that do not fit.

    Example:
        >>> brier(np.array([0.5, 1.0]), np.array([False, True]))
        0.125
    """
    return get_only_draw(brier_over_draws(_ranked(p_correct, correct)))


def nll(p_correct: ScoresLike, correct: JudgementsLike) -> float:
    """Return the log loss: the mean of -log of the probability given to what came true, in nats, lower is better.

    p is clipped to [1e-7, 1 - 1e-7] (``CLIP``), so the range is [1e-7, 16.12].

    Raises:
        MetricError: Too few answers, p outside [0, 1] or not finite, lists that do not fit.

    Example:
        >>> round(nll(np.array([0.5, 0.5]), np.array([False, True])), 4)
        0.6931
    """
    return get_only_draw(nll_over_draws(_ranked(p_correct, correct)))


def reliability(
    p_correct: ScoresLike,
    correct: JudgementsLike,
    *,
    bins: int = 15,
    spacing: Spacing = "width",
) -> Reliability:
    """Return the table behind ``ece``, which is ``sum(answers / n * |accuracy - confidence|)``.

    Raises:
        MetricError: Too few answers, p outside [0, 1] or not finite, lists that do not fit.
        ConfigError: ``bins`` below 1 or an unknown ``spacing``.

    Example:
        >>> table = reliability(np.array([0.1, 0.9, 0.9]), np.array([False, True, False]), bins=2)
        >>> table.answers, table.accuracy
        (array([1, 2]), array([0. , 0.5]))
    """
    _check_bins(bins, spacing)
    r = _ranked(p_correct, correct)
    p, share = np.repeat(r.score, r.answers[0]), np.repeat(r.mean[0], r.answers[0])  # in order, ties averaged
    if spacing == "mass":
        place = np.searchsorted(np.arange(1, bins) * len(p) // bins, np.arange(len(p)), side="right")
    else:
        place = np.searchsorted(_edges(bins)[1:-1], p, side="right")
    filled, first, count = np.unique(place, return_index=True, return_counts=True)
    confidence, accuracy = (np.add.reduceat(x, first) / count for x in (p, share))
    if spacing == "mass":
        return Reliability(p[first], p[first + count - 1], count, confidence, accuracy)
    return Reliability(_edges(bins)[filled], _edges(bins)[filled + 1], count, confidence, accuracy)


def ece_over_draws(r: Ranked, bins: int = 15) -> PerDraw:
    """Return ``ece`` of every draw, bins of equal width."""
    place = np.searchsorted(_edges(bins)[1:-1], r.score, side="right")
    inside = place[:, None] == np.arange(bins)
    gaps = (r.answers * r.score - r.right) @ inside.astype(np.float64)
    return np.abs(gaps).sum(1) / r.n


def ece_mass_over_draws(r: Ranked, bins: int = 15) -> PerDraw:
    """Return ``ece`` of every draw, bins of equal mass."""
    gap = (r.answers * r.score - r.right).cumsum(1)
    each = r.score - r.mean  # of one answer of the group
    before = np.zeros(len(gap))
    total = np.zeros(len(gap))
    for j in range(1, bins + 1):
        k = j * r.n // bins
        group = r.within(k)
        beyond = np.take_along_axis(r.end, group, 1)[:, 0] - k
        here = (np.take_along_axis(gap, group, 1) - np.take_along_axis(each, group, 1) * beyond[:, None])[:, 0]
        total += np.abs(here - before)
        before = here
    return total / r.n


def brier_over_draws(r: Ranked) -> PerDraw:
    """Return ``brier`` of every draw."""
    return (r.right @ np.square(1 - r.score) + r.wrong @ np.square(r.score)) / r.n


def log_losses(p_correct: ScoresLike, correct: JudgementsLike) -> Float[np.ndarray, "answers"]:
    """Return the log loss of each answer, in nats: ``nll`` is their mean; NaN where p_correct is.

    Example:
        >>> log_losses(np.array([1.0, 0.5]), np.array([True, False])).round(4)
        array([0.    , 0.6931])
    """
    p = np.asarray(p_correct, np.float64).clip(CLIP, 1 - CLIP)
    return np.asarray(-np.log(np.where(correct, p, 1 - p)))


def nll_over_draws(r: Ranked) -> PerDraw:
    """Return ``nll`` of every draw."""
    p = r.score.clip(CLIP, 1 - CLIP)
    return -(r.right @ np.log(p) + r.wrong @ np.log1p(-p)) / r.n


def _ranked(p_correct: ScoresLike, correct: JudgementsLike) -> Ranked:
    ranked = rank_answers(p_correct, correct, "p_correct")
    p = np.asarray(p_correct, np.float64)
    bad = np.flatnonzero((p < 0) | (p > 1))
    if len(bad):
        raise MetricError(
            f"p_correct must lie in [0, 1], p_correct[{bad[0]}] is {p[bad[0]]:g}; "
            "a score that is not a probability goes to a metric of order, such as auroc"
        )
    return ranked


def _edges(bins: int) -> Float[np.ndarray, "edges"]:
    return np.linspace(0, 1, bins + 1)


def _check_bins(bins: int, spacing: str) -> None:
    if bins < 1:
        raise ConfigError(f"bins must be at least 1, got {bins}; 15 is usual")
    if spacing not in ("width", "mass"):
        raise ConfigError(f'spacing must be "width" or "mass", got {spacing!r}')
