"""Resamples of the questions, and bounds of a metric over them: the arithmetic below every bootstrap interval."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from selfdoubt.errors import MetricError

#: Numbers in one block of draws: small enough to stay in a core's cache.
BLOCK = 1 << 17


class Bounds(NamedTuple):
    """The interval of a metric between percentiles of its resamples (Efron, 1979)."""

    low: float
    high: float
    failed: int  #: resamples on which the metric is not defined: left out


def draw_resamples(
    n: int, draws: int, seed: int, clusters: Sequence[Hashable] | None = None
) -> Iterator[Int[np.ndarray, "block answers"]]:
    """Yield how often each draw holds each answer, some draws at a time; the size of a block changes no draw.

    Args:
        n: Number of answers.
        draws: Number of resamples.
        seed: Seed of the resamples.
        clusters: Draw these whole instead of single answers; one per answer.

    Raises:
        MetricError: If there is not one cluster per answer.
    """
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


def bound_resamples(values: Float[np.ndarray, "draws"], level: float, name: str) -> Bounds:
    """Return the interval that holds the middle ``level`` of a metric's resamples; NaN counts as not defined.

    Raises:
        MetricError: If the metric is not defined on half of the resamples.

    Example:
        >>> tuple(round(b, 2) for b in bound_resamples(np.array([0.1, 0.2, 0.3, np.nan]), 0.5, "accuracy"))
        (0.15, 0.25, 1)
    """
    defined = values[~np.isnan(values)]
    failed = len(values) - len(defined)
    if 2 * failed > len(values):
        raise MetricError(
            f"{name} is not defined on {failed} of {len(values)} resamples: too few answers, or nearly all are "
            "right or nearly all wrong; judge more"
        )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Bounds(float(low), float(high), failed)


def two_sided_p(differences: Float[np.ndarray, "draws"]) -> float:
    """Return the p-value of no difference: twice the smaller share of resamples on either side of zero, at most 1.

    Those at zero count on both sides, and one is added to count and total (Davison and Hinkley, 1997, section 4.2).

    Example:
        >>> round(two_sided_p(np.array([0.1, 0.2, 0.3, -0.1])), 1)
        0.8
    """
    defined = differences[~np.isnan(differences)]
    smaller = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2 * (smaller + 1) / (len(defined) + 1)))
