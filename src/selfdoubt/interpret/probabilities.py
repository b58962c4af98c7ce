"""Probability that a prediction is wrong, from class probabilities, logits with noise, or a number and a threshold."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from selfdoubt import risk
from selfdoubt.errors import ConfigError, ShapeError
from selfdoubt.interpret.arguments import (
    ArrayLike,
    check_probabilities,
    read_numbers,
    read_probabilities,
    read_scalar,
    read_with_std,
)

#: A distribution of errors, given by its standard deviation.
ErrorDistribution = Literal["normal", "laplace"]


def average_members(logits: ArrayLike) -> Float[Tensor, "*batch classes"]:
    """Return the mean of the members' class probabilities: p = mean_m softmax(logits_m).

    Args:
        logits: Unnormalised scores, ``(members, batch, ..., classes)``; for one model give ``logits[None]``.

    Raises:
        ShapeError: If there are fewer than three axes, or there are fewer than two classes.
        NonFiniteError: If a logit is NaN or infinite.

    Example:
        >>> average_members(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])).tolist()
        [[0.5, 0.5]]
    """
    numbers = read_logits(logits)
    if numbers.ndim < 3:
        raise ShapeError(
            f"logits must be (members, batch, ..., classes), got {tuple(numbers.shape)}; "
            "for one model give logits[None], for one row logits[:, None]"
        )
    return risk.mixture(numbers).softmax(-1)


def error_probability(probs: ArrayLike) -> Float[Tensor, "*batch"]:
    """Return the probability that the most probable class is wrong, 1 - max_k p_k, in [0, 1 - 1 / classes].

    It is the chance of a misclassification if the probabilities are calibrated.

    Args:
        probs: Class probabilities, ``(*batch, classes)``, that sum to 1.

    Raises:
        ShapeError: If there are fewer than two classes.
        NonFiniteError: If one is NaN or infinite.
        DataError: If they are not probabilities, e.g. logits.

    Example:
        >>> [round(x, 2) for x in error_probability([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3]]).tolist()]
        [0.3, 0.6]
    """
    p = read_probabilities(probs)
    top = p.argmax(-1, keepdim=True)
    return p.scatter(-1, top, 0).sum(-1)  # near 0 it is not lost in 1 - p


def binary_error_probability(p: ArrayLike) -> Float[Tensor, "*batch"]:
    """Return the probability that the more probable one of two classes is wrong, min(p, 1 - p), in [0, 1/2].

    Args:
        p: Probability of class 1, of any shape.

    Raises:
        ShapeError: If there are no numbers.
        NonFiniteError: If one is NaN or infinite.
        DataError: If one is outside [0, 1].

    Example:
        >>> binary_error_probability([0.25, 0.75, 1.0]).tolist()
        [0.25, 0.25, 0.0]
    """
    numbers = read_numbers(p, "p")
    check_probabilities(numbers, "p")
    return torch.minimum(numbers, 1 - numbers).clamp_min(0)


def probability_above(
    y: ArrayLike, std: ArrayLike, threshold: float, *, distribution: ErrorDistribution = "normal"
) -> Float[Tensor, "*batch"]:
    """Return the probability that the target lies above a threshold, in [0, 1]: F((y - threshold) / std).

    F is the distribution function of the normal or the Laplace distribution of standard deviation 1.

    Args:
        y: Predictions of a number, of any shape.
        std: Their standard deviations, of the same shape and unit, at least 0 (``forecast.total``).
        threshold: A number in the unit of ``y``.
        distribution: "normal" or "laplace". A ``sculpt`` with ``Laplace`` gives a scale b: its std is sqrt(2) b.

    Raises:
        ConfigError: If the distribution is another one.
        ShapeError: If the shapes differ, or there are no numbers.
        NonFiniteError: If a number is NaN or infinite.
        DataError: If a standard deviation is negative.

    Example:
        >>> [round(x, 4) for x in probability_above([0.0, 1.96], [1.0, 1.0], 0.0).tolist()]
        [0.5, 0.975]
    """
    apart, tail = _measure_tail(y, std, threshold, distribution)
    return torch.where(apart > 0, 1 - tail, tail)


def wrong_side_probability(
    y: ArrayLike, std: ArrayLike, threshold: float, *, distribution: ErrorDistribution = "normal"
) -> Float[Tensor, "*batch"]:
    """Return the probability that the target lies on the other side of a threshold than ``y``, in [0, 1/2].

    F(-|y - threshold| / std): the chance that a decision by ``y > threshold`` is wrong.

    Args:
        y: As for ``probability_above``.
        std: As for ``probability_above``.
        threshold: As for ``probability_above``.
        distribution: As for ``probability_above``.

    Raises:
        ConfigError: If the distribution is another one.
        ShapeError: If the shapes differ, or there are no numbers.
        NonFiniteError: If a number is NaN or infinite.
        DataError: If a standard deviation is negative.

    Example:
        >>> [round(x, 4) for x in wrong_side_probability([-1.96, 1.96], [1.0, 2.0], 0.0).tolist()]
        [0.025, 0.1635]
    """
    return _measure_tail(y, std, threshold, distribution)[1]


def check_distribution(distribution: str) -> None:
    """Check the name of a distribution of errors.

    Raises:
        ConfigError: If it is unknown.
    """
    if distribution not in ("normal", "laplace"):
        raise ConfigError(f'distribution must be "normal" or "laplace", got {distribution!r}')


def _measure_tail(y: ArrayLike, std: ArrayLike, threshold: float, distribution: str) -> tuple[Tensor, Tensor]:
    """Return the distances to the threshold, and the probability beyond them."""
    check_distribution(distribution)
    mean, spread = read_with_std(y, std)
    apart = mean - read_scalar(threshold, "threshold")
    z = torch.where(apart == 0, torch.zeros_like(apart), apart.abs() / spread)
    return apart, torch.special.ndtr(-z) if distribution == "normal" else 0.5 * (-math.sqrt(2) * z).exp()


def read_logits(logits: ArrayLike) -> Tensor:
    """Return finite logits of two classes or more.

    Raises:
        ShapeError: If there are fewer than two classes, or they are not numbers.
        NonFiniteError: If one is NaN or infinite.
    """
    numbers = read_numbers(logits, "logits")
    check_classes(numbers)
    return numbers


def check_classes(logits: Tensor) -> None:
    """Check that the last axis has two classes or more.

    Raises:
        ShapeError: If it has not.
    """
    if not logits.ndim or logits.shape[-1] < 2:
        raise ShapeError(
            f"logits must be (..., classes) with two classes or more, got {tuple(logits.shape)}; "
            "for one logit per row see average_binary_noise"
        )
