"""Checks of what callers give: numbers, shapes, probabilities, levels. Each error is one line with its repair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from selfdoubt.distributions import wide_dtype
from selfdoubt.errors import ConfigError, DataError, NonFiniteError, ShapeError
from selfdoubt.fields import shorten_value

#: Largest distance from 1 that a sum of probabilities may have: bfloat16 rounds by up to 0.4 % each.
_SUM_ROOM = 0.01


@runtime_checkable
class SupportsArray(Protocol):
    """A tensor, a numpy array, or a column of a table."""

    def __array__(self) -> Any:
        """Return the numbers as a numpy array."""


#: Numbers of any kind: a tensor, an array, or a list, nested where there are several axes.
ArrayLike: TypeAlias = SupportsArray | Sequence[Any]


def read_values(values: ArrayLike, name: str) -> Tensor:
    """Return values as a tensor without a gradient; arrays and lists are copied.

    Raises:
        ShapeError: If they are not numbers in a rectangle, or there are none.
    """
    try:
        if isinstance(values, Tensor):
            tensor = values.detach()
        elif isinstance(values, SupportsArray):  # a column of a table would be read by its index otherwise
            tensor = torch.as_tensor(values.__array__().copy())
        else:
            tensor = torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:120]
        raise ShapeError(f"{name} must be a tensor, an array or a list of numbers, got {why}") from None
    if not tensor.numel():
        raise ShapeError(f"{name} is empty, of shape {tuple(tensor.shape)}; give at least one row")
    if tensor.is_complex():
        raise ShapeError(f"{name} must be real numbers, got {tensor.dtype}")
    return tensor


def read_numbers(values: ArrayLike, name: str) -> Tensor:
    """Return finite numbers as a tensor of float32, or float64 where they have it.

    Raises:
        ShapeError: If they are not numbers in a rectangle, or there are none.
        NonFiniteError: If one is NaN or infinite.
    """
    tensor = read_values(values, name)
    numbers = tensor.to(wide_dtype(tensor))
    finite = numbers.isfinite()
    if not finite.all():
        raise NonFiniteError(
            f"{int((~finite).sum())} of {finite.numel()} values of {name} are NaN or infinite; "
            "leave these rows out, or find out why the model gives them"
        )
    return numbers


def read_pair(
    first: ArrayLike, second: ArrayLike, names: tuple[str, str], *, repair: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return two tensors of finite numbers of one shape; nothing is broadcast.

    Raises:
        ShapeError: If their shapes differ, they are not numbers, or there are none.
        NonFiniteError: If one is NaN or infinite.
    """
    one, other = read_numbers(first, names[0]), read_numbers(second, names[1])
    if one.shape != other.shape:
        raise ShapeError(
            f"{names[0]} and {names[1]} must have one shape, got {tuple(one.shape)} and {tuple(other.shape)}; "
            f"{repair or f'try {names[1]}.reshape({names[0]}.shape) where both have as many numbers'}"
        )
    dtype = torch.promote_types(one.dtype, other.dtype)
    return one.to(dtype), other.to(one.device, dtype)


def read_with_std(y: ArrayLike, std: ArrayLike, name: str = "std") -> tuple[Tensor, Tensor]:
    """Return predictions and their standard deviations, which are not negative, of one shape.

    Raises:
        ShapeError: If their shapes differ, they are not numbers, or there are none.
        NonFiniteError: If one is NaN or infinite.
        DataError: If a standard deviation is negative.
    """
    mean, spread = read_pair(y, std, ("y", name))
    if (spread < 0).any():
        raise DataError(
            f"{name} must be at least 0, got {float(spread.min()):g}; give a standard deviation, not its logarithm"
        )
    return mean, spread


def read_scale(y: ArrayLike, risk: ArrayLike) -> tuple[Tensor, Tensor]:
    """Return predictions and risks above 0, of one shape.

    Raises:
        ShapeError: If their shapes differ, they are not numbers, or there are none.
        NonFiniteError: If one is NaN or infinite.
        DataError: If a risk is not above 0.
    """
    mean, scale = read_pair(y, risk, ("y", "risk"))
    low = int((scale <= 0).sum())
    if low:
        raise DataError(
            f"a risk that divides an error must be above 0, got {low} of {scale.numel()} that are not; "
            "add a small constant to all, e.g. risk + 1e-3 * risk.mean()"
        )
    return mean, scale


def read_probabilities(probs: ArrayLike, name: str = "probs") -> Tensor:
    """Return class probabilities, ``(*batch, classes)``, divided by their sum.

    Raises:
        ShapeError: If there are fewer than two classes.
        NonFiniteError: If one is NaN or infinite.
        DataError: If one is outside [0, 1], or a row does not sum to 1 but for rounding.
    """
    numbers = read_numbers(probs, name)
    if not numbers.ndim or numbers.shape[-1] < 2:
        raise ShapeError(
            f"{name} must be (..., classes) with two classes or more, got {tuple(numbers.shape)}; "
            "for one probability p per row give torch.stack([1 - p, p], -1)"
        )
    check_probabilities(numbers, name)
    sums = numbers.sum(-1, keepdim=True)
    worst = float((sums - 1).abs().max())
    if worst > _SUM_ROOM:
        raise DataError(
            f"rows of {name} must sum to 1, and one is {worst:.3g} away; for logits give logits.softmax(-1)"
        )
    return numbers.clamp(0, 1) / sums


def check_probabilities(p: Tensor, name: str) -> None:
    """Check that all numbers are in [0, 1], but for rounding.

    Raises:
        DataError: If one is not.
    """
    outside = torch.maximum(-p, p - 1)
    if (outside > 1e-6).any():
        bad = float(p.flatten()[int(outside.argmax())])
        raise DataError(f"{name} must be probabilities in [0, 1], got {bad:g}; for logits give logits.softmax(-1)")


def to_float64(x: Tensor) -> Tensor:
    """Return numbers in float64, on the CPU where their device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def read_labels(labels: ArrayLike, shape: tuple[int, ...], classes: int) -> Tensor:
    """Return class indices of this shape.

    Raises:
        ShapeError: If they have another shape, or are not whole numbers.
        DataError: If one is not the index of a class.
    """
    tensor = read_values(labels, "labels")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        raise ShapeError(f"labels must be whole numbers, the indices of classes, got {tensor.dtype}; try labels.long()")
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            f"labels must have the shape of probs without the classes, {shape}, got {tuple(tensor.shape)}; "
            "give one index per row, not one-hot rows"
        )
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= classes:
        raise DataError(f"labels must lie in 0 .. {classes - 1}, got {low if low < 0 else high}; are classes missing?")
    return tensor.long()


def check_level(level: float) -> float:
    """Check a coverage.

    Raises:
        ConfigError: If it is not in (0, 1).
    """
    if isinstance(level, bool) or not isinstance(level, Real) or not 0 < level < 1:
        raise ConfigError(
            f"level must lie in (0, 1), got {shorten_value(level)}; 0.9 means that 90 % are to be covered"
        )
    return float(level)


def read_scalar(value: float, name: str) -> float:
    """Return one finite number as a float.

    Raises:
        ConfigError: If it is not one number.
        NonFiniteError: If it is NaN or infinite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name} must be one number, got {shorten_value(value)}") from None
    if not math.isfinite(number):
        raise NonFiniteError(f"{name} must be a finite number, got {number}")
    return number
