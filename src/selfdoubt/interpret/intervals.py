"""Intervals that hold the target with a given probability, from a prediction and its standard deviation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selfdoubt.errors import ShapeError
from selfdoubt.interpret.arguments import ArrayLike, check_level, read_numbers, read_with_std
from selfdoubt.interpret.probabilities import ErrorDistribution, check_distribution


class Interval(NamedTuple):
    """Lower and upper ends, of the prediction's shape and unit."""

    low: Float[Tensor, "*batch"]
    high: Float[Tensor, "*batch"]

    @property
    def width(self) -> Float[Tensor, "*batch"]:
        """Upper less lower end."""
        return self.high - self.low

    def contains(self, target: ArrayLike) -> Bool[Tensor, "*batch"]:
        """Return which targets lie within, ends included; their mean is the coverage.

        Raises:
            ShapeError: If the targets have another shape.
            NonFiniteError: If one is NaN or infinite.
        """
        truth = read_numbers(target, "target").to(self.low.device)
        if truth.shape != self.low.shape:
            raise ShapeError(
                f"target must have the shape of the interval, {tuple(self.low.shape)}, got {tuple(truth.shape)}; "
                "try target.reshape(interval.low.shape)"
            )
        return (self.low <= truth) & (truth <= self.high)


def parametric_interval(
    y: ArrayLike, std: ArrayLike, *, level: float = 0.9, distribution: ErrorDistribution = "normal"
) -> Interval:
    """Return the central interval of a normal or Laplace distribution around each prediction.

    Normal: y -+ q std with q the (1 + level) / 2 quantile of N(0, 1). Laplace: y +- std ln(1 - level) / sqrt(2). It
    covers ``level`` of the targets only if ``std`` is right; ``ConformalIntervals`` measures that on data.

    Args:
        y: Predictions, of any shape.
        std: Their total standard deviations, of the same shape and unit, at least 0 (``forecast.total``).
        level: Share of targets to cover, in (0, 1).
        distribution: "normal" or "laplace". A ``sculpt`` with ``Laplace`` gives a scale b: its std is sqrt(2) b.

    Raises:
        ConfigError: If the level is outside (0, 1), or the distribution is another one.
        ShapeError: If the shapes differ, or there are no numbers.
        NonFiniteError: If a number is NaN or infinite.
        DataError: If a standard deviation is negative.

    Example:
        >>> low, high = parametric_interval([10.0], [2.0], level=0.95)
        >>> round(low.item(), 2), round(high.item(), 2)
        (6.08, 13.92)
    """
    check_level(level)
    check_distribution(distribution)
    mean, spread = read_with_std(y, std)
    if distribution == "normal":
        factor = -float(torch.special.ndtri(torch.tensor((1 - level) / 2, dtype=torch.float64)))
    else:
        factor = -math.log1p(-level) / math.sqrt(2)
    return Interval(mean - factor * spread, mean + factor * spread)
