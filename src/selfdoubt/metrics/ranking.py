"""Answers sorted by risk, ties together, in one or in many resamples: the arithmetic below every metric.

A metric is a function of two small tables: how many answers share each value of the score, and how many of them are
right. A resample of the questions changes these counts and nothing else, so the answers are sorted once and
the metric of a thousand resamples is a few operations on ``(draws, groups)``. A metric that is not defined on a draw is
NaN **here only**: ``selective`` raises, ``bootstrap`` counts.

Ties share their mean accuracy: each of them counts as if every order within the group were taken and averaged. The
accuracy of the ``k`` surest is then ``(right_before + (k - before) * mean) / k`` within a group, and sums of it over
``k`` are differences of harmonic numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from selfdoubt.errors import MetricError

#: One number per answer, as an array or any other sequence.
ScoresLike = Float[np.ndarray, "answers"] | Sequence[float]
#: True for each right answer, as an array or any other sequence.
JudgementsLike = Bool[np.ndarray, "answers"] | Sequence[bool]
PerDraw = Float[np.ndarray, "draws"]
Table = Int[np.ndarray, "draws groups"]
#: Shares of whole numbers are compared with this much room for rounding, of one answer.
ROUNDING = 1e-9


@dataclass(frozen=True, eq=False)
class Ranked:
    """Counts per group of equal scores, from the lowest score to the highest."""

    score: Float[np.ndarray, "groups"]  #: score of each group, ascending
    answers: Table  #: number of answers in the group
    right: Table  #: number of right ones among these

    @cached_property
    def end(self) -> Table:
        """Answers up to the end of the group."""
        return self.answers.cumsum(1)

    @cached_property
    def right_end(self) -> Table:
        """Of these, the right ones."""
        return self.right.cumsum(1)

    @cached_property
    def start(self) -> Table:
        """Answers before the group."""
        return self.end - self.answers

    @cached_property
    def right_start(self) -> Table:
        """Of these, the right ones."""
        return self.right_end - self.right

    @cached_property
    def wrong(self) -> Table:
        """Wrong answers of the group."""
        return self.answers - self.right

    @cached_property
    def mean(self) -> Float[np.ndarray, "draws groups"]:
        """Share of right answers in the group; 0 where a draw has none of it."""
        return self.right / np.maximum(self.answers, 1)

    @cached_property
    def lead(self) -> Float[np.ndarray, "draws groups"]:
        """Right answers before the group, less as many as they would have at the group's own accuracy."""
        return self.right_start - self.mean * self.start

    @cached_property
    def harmonic(self) -> Float[np.ndarray, "terms"]:
        """1 + 1/2 + .. + 1/k for k = 0 .. the greatest n."""
        return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, self.n.max() + 1))])

    @cached_property
    def harmonic_end(self) -> Float[np.ndarray, "draws groups"]:
        """That of the end of each group."""
        return self.harmonic[self.end]

    @property
    def n(self) -> Int[np.ndarray, "draws"]:
        """Answers of each draw."""
        return self.end[:, -1]

    @property
    def n_right(self) -> Int[np.ndarray, "draws"]:
        """Right answers of each draw."""
        return self.right_end[:, -1]

    def within(self, k: Int[np.ndarray, "draws"]) -> Int[np.ndarray, "draws 1"]:
        """Return the group in which each draw's ``k``-th answer lies."""
        return np.count_nonzero(self.end < k[:, None], axis=1)[:, None].clip(max=self.end.shape[1] - 1)


class Order(NamedTuple):
    """The sorting of one list of scores, done once for all draws."""

    score: Float[np.ndarray, "groups"]
    order: Int[np.ndarray, "answers"]
    starts: Int[np.ndarray, "groups"]
    right: Bool[np.ndarray, "answers"]  #: in that order

    @classmethod
    def sort(cls, score: Float[np.ndarray, "answers"], correct: Bool[np.ndarray, "answers"]) -> Order:
        """Sort scores, and remember which are equal."""
        order = np.argsort(score, kind="stable")
        values = score[order]
        starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
        return cls(values[starts], order, starts, correct[order])

    def rank(self, counts: Int[np.ndarray, "draws answers"]) -> Ranked:
        """Return the groups of each draw.

        Args:
            counts: Number of times that each draw holds each answer.
        """
        answers = counts[:, self.order]
        right = answers * self.right
        if len(self.starts) < len(self.order):
            answers, right = (np.add.reduceat(x, self.starts, axis=1) for x in (answers, right))
        return Ranked(self.score, answers, right)


def check_answers(
    score: ScoresLike | Shaped[np.ndarray, "answers"],
    correct: JudgementsLike | Shaped[np.ndarray, "answers"],
    name: str = "risk",
) -> tuple[Float[np.ndarray, "answers"], Bool[np.ndarray, "answers"]]:
    """Return scores in float64 and judgements as booleans, checked.

    Raises:
        MetricError: If they are not two lists of one length of at least 2, a score is not finite, or a judgement is
            not a boolean.
    """
    score, correct = np.asarray(score), np.asarray(correct)
    if score.ndim != 1 or score.shape != correct.shape:
        raise MetricError(
            f"{name} and correct must be two lists of one length, got shapes {score.shape} and {correct.shape}; "
            "give one judgement for each answer"
        )
    if correct.dtype != np.bool_:
        raise MetricError(
            f"correct must hold booleans, got {correct.dtype}; take unjudged answers out with "
            f"drop_unjudged({name}, correct)"
        )
    if score.dtype.kind not in "fiu":
        raise MetricError(f"{name} must hold numbers, got {score.dtype}; give one float for each answer")
    bad = np.flatnonzero(~np.isfinite(score))
    if len(bad):
        raise MetricError(
            f"{name}[{bad[0]}] is {score[bad[0]]}, and {len(bad)} of {len(score)} are not finite; "
            "leave these answers out, or find out why they have no score"
        )
    if len(score) < 2:
        raise MetricError(f"a metric needs at least 2 judged answers, got {len(score)}; judge more")
    return score.astype(np.float64), correct


def rank_answers(
    score: ScoresLike | Shaped[np.ndarray, "answers"],
    correct: JudgementsLike | Shaped[np.ndarray, "answers"],
    name: str = "risk",
) -> Ranked:
    """Return the groups of the answers as they are, as the only draw.

    Raises:
        MetricError: As ``check_answers``.
    """
    values, right = check_answers(score, correct, name)
    return Order.sort(values, right).rank(np.ones((1, len(values)), np.int64))


def get_only_draw(draws: PerDraw) -> float:
    """Return the metric of the only draw."""
    return float(draws[0])


def accuracy_at_over_draws(r: Ranked, coverage: float) -> PerDraw:
    """Return the mean accuracy of the ``ceil(coverage * n)`` surest."""
    k = np.maximum(np.ceil(coverage * r.n - ROUNDING), 1).astype(np.int64)
    group = r.within(k)
    lead, mean = (np.take_along_axis(x, group, 1)[:, 0] for x in (r.lead, r.mean))
    return lead / k + mean


def coverage_at_over_draws(r: Ranked, accuracy: float) -> PerDraw:
    """Return the largest share of answers up to the end of a group whose accuracy is at least this."""
    reached = r.right_end >= accuracy * r.end - ROUNDING
    return np.where(reached, r.end, 0).max(1) / r.n


def auarc_over_draws(r: Ranked) -> PerDraw:
    """Return the mean over k = 1 .. n of the accuracy of the k surest."""
    return _accuracies(r, np.zeros_like(r.n)) / r.n


def auarc_trapezoid_over_draws(r: Ranked) -> PerDraw:
    """Return the area under the accuracy between coverage 1/n and 1 by trapezoids, divided by 1 - 1/n."""
    first = np.take_along_axis(r.mean, r.within(np.ones_like(r.n)), 1)[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        return (auarc_over_draws(r) * r.n - (first + r.n_right / r.n) / 2) / (r.n - 1)


def aurc_over_draws(r: Ranked) -> PerDraw:
    """Return the mean over k of the error of the k surest."""
    return 1 - auarc_over_draws(r)


def aurc_trapezoid_over_draws(r: Ranked) -> PerDraw:
    """Return the area under the error by trapezoids."""
    return 1 - auarc_trapezoid_over_draws(r)


def excess_aurc_over_draws(r: Ranked) -> PerDraw:
    """Return AURC less that of the best order."""
    return _with_both(r, _best(r, np.zeros_like(r.n)) / r.n - auarc_over_draws(r))


def augrc_over_draws(r: Ranked) -> PerDraw:
    """Return the area under the share of answers that are answered and wrong, over coverage from 0 to 1."""
    return _dot(r.answers, r.start - r.right_start + r.wrong / 2) / np.square(r.n, dtype=np.float64)


def prr_over_draws(r: Ranked, max_rejection: float = 1.0) -> PerDraw:
    """Return the part of the way from a random order to the best one that the accuracy goes, over the rejections."""
    rejected = np.floor(max_rejection * r.n + ROUNDING).astype(np.int64)
    kept = r.n - rejected
    random = rejected * r.n_right / r.n
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (_accuracies(r, kept) - random) / (_best(r, kept) - random)
    return np.where(rejected >= 2, _with_both(r, ratio), np.nan)


def auroc_over_draws(r: Ranked) -> PerDraw:
    """Return the share of pairs of a wrong and a right answer in which the wrong one has the higher risk; ties half."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return _dot(r.wrong, r.right_start + r.right / 2) / ((r.n - r.n_right) * r.n_right)


def auprc_over_draws(r: Ranked) -> PerDraw:
    """Return the average precision of finding wrong answers from the riskiest down."""
    n_wrong = r.n - r.n_right
    retrieved = n_wrong[:, None] - (r.start - r.right_start)  # wrong answers of this risk or more
    with np.errstate(divide="ignore", invalid="ignore"):
        return _with_both(r, _dot(r.wrong, retrieved / np.maximum(r.n[:, None] - r.start, 1)) / n_wrong)


def _with_both(r: Ranked, metric: PerDraw) -> PerDraw:
    """Return NaN on draws without a right or without a wrong answer."""
    return np.where((r.n_right > 0) & (r.n_right < r.n), metric, np.nan)


def _accuracies(r: Ranked, low: Int[np.ndarray, "draws"]) -> PerDraw:
    """Return the sum of the accuracy of the k surest over k = low + 1 .. n."""
    if not low.any():
        return r.n_right + _dot(r.lead, np.diff(r.harmonic_end, axis=1, prepend=0))
    first = low[:, None]
    answers = np.diff(np.maximum(r.end, first), axis=1, prepend=first)
    inverses = np.diff(np.maximum(r.harmonic_end, r.harmonic[first]), axis=1, prepend=r.harmonic[first])
    return _dot(r.mean, answers) + _dot(r.lead, inverses)


def _best(r: Ranked, low: Int[np.ndarray, "draws"]) -> PerDraw:
    """Return the same sum if all right answers came first: of min(1, right / k)."""
    right = r.n_right
    return np.maximum(right - low, 0) + right * (r.harmonic[r.n] - r.harmonic[np.maximum(right, low)])


def _dot(a: Shaped[np.ndarray, "draws groups"], b: Shaped[np.ndarray, "draws groups"]) -> PerDraw:
    return np.asarray(np.einsum("ij,ij->i", a, b), np.float64)
