"""Fits the size of noise to a model: relative to the outputs of its leaves, and small enough to keep its predictions.

Two steps. Deviations of ``weight_noise="auto"`` are scaled in each leaf, so that at ``alpha=1`` they are as large as
the leaf's own output on real inputs. Then ``noise.py`` searches one size for all leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from selfdoubt.deviations import START_NOISE
from selfdoubt.errors import ConfigError
from selfdoubt.forecast import Forecast
from selfdoubt.members import Wrapped
from selfdoubt.model_inputs import read_batches
from selfdoubt.noise import (
    SMALLEST,
    STEPS,
    NoiseLimits,
    NoiseSearch,
    NoiseTally,
    check_finite_sum,
    find_noisy,
    search_size,
)  # fmt: skip
from selfdoubt.rows import ForwardContext
from selfdoubt.tree import iter_tensors, tree_map


@runtime_checkable
class ScalableModule(Protocol):
    """The interface of replaced leaves whose deviations can be measured and scaled."""

    def measure(self, x: Tensor) -> tuple[float, float] | None:
        """Return the sums of squares of the deviations and of the leaf's output; None where they cannot be measured."""

    def rescale(self, factor: float) -> None:
        """Multiply all deviations."""


def fit_noise(
    wrapped: Wrapped,
    inputs: Iterable[Any],
    *,
    limits: NoiseLimits | None = None,
    low: float = SMALLEST,
    high: float | None = None,
    steps: int = STEPS,
) -> NoiseSearch:
    """Set the noise of voters or samples to the largest size that keeps the base model's predictions on real inputs.

    Outputs called ``logits``, and all outputs of a wrapper with ``output="logits"``, are compared by their most
    probable class and by KL(base || member); others by their relative change.

    Args:
        wrapped: A model with voters or samples that nothing has trained yet.
        inputs: Batches without labels: each a tensor, a tuple of the inputs that the model requires, or a mapping of
            inputs by name.
        limits: Limits of the change; None takes ``NoiseLimits()``.
        low: Smallest size.
        high: Largest size; None takes the wrapper's ``largest_noise``.
        steps: Steps of the bisection.

    Raises:
        ConfigError: If even the smallest size changes too much.
        DataError: If there are no batches, or if one does not have the inputs that the model requires.
        WrapError: If the model has neither voters nor samples.

    Example:
        >>> from selfdoubt import vote
        >>> wrapped = vote.Wrapper(weight_noise="auto")(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)))
        >>> result = fit_noise(wrapped, [torch.randn(64, 4)])
        >>> 0 < result.change <= 0.01 and wrapped.spec.alpha == result.alpha
        True
    """
    noisy, is_trained = find_noisy(wrapped), wrapped.is_trained
    batches = list(read_batches(inputs, wrapped.input_names))

    def run(model: nn.Module) -> None:
        for args, kwargs in batches:
            model(*args, **kwargs)

    scale_open_noise(wrapped, run)

    @torch.no_grad()
    def measure(limits: NoiseLimits) -> NoiseTally:  # noqa: ARG001
        tally = NoiseTally()
        with add_base_row(noisy):
            for args, kwargs in batches:
                _add_outputs(tally, wrapped.forecast(*args, **kwargs))
        return tally

    try:
        return search_size(wrapped, measure, limits or NoiseLimits(), low=low, high=high, steps=steps)
    finally:
        wrapped.is_trained = is_trained  # larger deviations are not learnt ones


@contextmanager
def run_base(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model inside all wrappers; in the block its replaced leaves run without deviation or noise."""
    inside = model
    calls: list[ForwardContext] = []
    while isinstance(inside, Wrapped):
        calls.append(inside.call)
        inside = inside.module
    for call in calls:
        # One member, the base, to which all rows belong, whatever their number.
        call.members, call.rows, call.training, call.has_base = 1, 0, False, True
    try:
        yield inside
    finally:
        for call in calls:
            call.has_base = False
            call.scales.clear()


@contextmanager
def add_base_row(wrapped: Wrapped) -> Iterator[None]:
    """Give a wrapper of voters or samples a base row while the block runs."""
    before: Any = wrapped.spec
    wrapped.spec = replace(before, answer_from="base")
    try:
        yield
    finally:
        wrapped.spec = before


def scale_open_noise(wrapped: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Scale deviations of ``weight_noise="auto"`` to the outputs of their leaves; do nothing for other noise.

    Leaves whose outputs cannot be measured get deviations as large as their weights.

    Args:
        wrapped: A model with voters or samples.
        run: Function that runs the model it is given, the base, on real inputs.
    """
    if not getattr(find_noisy(wrapped).spec, "seeks_noise", False):
        return
    for module in wrapped.modules():
        if isinstance(module, ScalableModule):
            module.rescale(1 / START_NOISE)
    scale_to_outputs(wrapped, run)


def scale_to_outputs(wrapped: nn.Module, run: Callable[[nn.Module], Any], size: float = 1.0) -> None:
    """Scale the deviations of each leaf to a size relative to the leaf's own output, on real inputs.

    At ``alpha=1`` the root mean square of a leaf's deviations is then ``size`` times that of its output without its
    bias. Leaves without a kernel, and those that no input reaches, keep theirs.

    Args:
        wrapped: A model with voters.
        run: Function that runs the model it is given, the base, on real inputs.
        size: Relative size.

    Raises:
        ConfigError: If a leaf's deviations are all zero.
        NonFiniteError: If an output is NaN or infinite.
    """
    sums: dict[nn.Module, tuple[float, float]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter_tensors((args, kwargs)))
        measured = module.measure(x) if isinstance(module, ScalableModule) else None
        if measured is not None:
            before = sums.get(module, (0.0, 0.0))
            sums[module] = before[0] + measured[0], before[1] + measured[1]

    leaves = [module for module in wrapped.modules() if isinstance(module, ScalableModule)]
    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in leaves if isinstance(m, nn.Module)]
    try:
        with torch.no_grad(), run_base(wrapped) as base:
            run(base)
    finally:
        for handle in handles:
            handle.remove()
    for module, (delta, output) in sums.items():
        check_finite_sum(delta + output)
        if delta == 0:
            raise ConfigError("deviations of zero have no size to scale; draw them with weight_noise above 0")
        if output > 0 and isinstance(module, ScalableModule):
            module.rescale(size * math.sqrt(output / delta))


def _add_outputs(tally: NoiseTally, outputs: Any) -> None:
    """Compare the members with the base in all outputs: in those of classes, if there are any, else in all values."""
    forecasts: list[Forecast] = []
    tree_map(lambda f: forecasts.append(f) if isinstance(f, Forecast) else None, outputs)
    logits = [f for f in forecasts if f.kind == "logits"]
    for forecast in logits or [f for f in forecasts if f.members.is_floating_point()]:
        assert forecast.base is not None
        if logits:
            tally.add_logits(forecast.base, forecast.members)
        else:
            tally.add_values(forecast.base, forecast.members)
