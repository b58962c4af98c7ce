"""Draws the initial deviations of voters."""

from __future__ import annotations

import copy
import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from selfdoubt import compat, kernels
from selfdoubt.targets import Leaf

#: Size of the deviations of ``weight_noise="auto"``, relative to the weights, until a search has found one.
START_NOISE = 0.01


@runtime_checkable
class DeviationSettings(Protocol):
    """The settings of voters that say how deviations are drawn; see ``vote.Wrapper``."""

    @property
    def n_voters(self) -> int:
        """Number of voters."""

    @property
    def rank(self) -> int | None:
        """Rank of the deviations; None draws full ones."""

    @property
    def finetune(self) -> bool:
        """True starts from the model's weights; False draws all weights again."""

    @property
    def weight_noise(self) -> float | str:
        """Size of a deviation relative to the leaf's weights; "auto" leaves it open."""

    @property
    def alpha(self) -> float:
        """Scale of the deviations."""

    @property
    def antithetic(self) -> bool:
        """True draws each second voter's deviation as the opposite of the one before it."""


def draw_deviations(leaf: Leaf, spec: DeviationSettings, generator: torch.Generator) -> dict[str, nn.Parameter]:
    """Draw the initial deviations of a leaf's matched parameters."""
    base = compat.get_base_layer(leaf.module)
    kernel = kernels.find_kernel(base)
    if kernel is None:
        # The loop puts changed parameters into the whole leaf, under their full names; a ParameterDict takes no dots.
        parameters = {name.replace(".", "/"): leaf.module.get_parameter(name) for name in leaf.params}
    else:
        # Adapter layers: only the base layer's own parameters get deviations.
        matched = {name.rpartition(".")[2] for name in leaf.params}
        parameters = {n: p for n, p in base.named_parameters(recurse=False) if n in matched}
    fresh = [_redrawn(base, parameters, generator) for _ in range(spec.n_voters)] if not spec.finetune else []
    initial: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if fresh:
            start = torch.stack([(voter[name] - parameter.detach()) / spec.alpha for voter in fresh])
            initial[name] = start.to(parameter.dtype)
            continue
        noise = START_NOISE if isinstance(spec.weight_noise, str) else spec.weight_noise
        size = noise * _weight_std(base, parameter)
        dtype = _float_dtype(base, parameter)
        if spec.rank is not None and name == "weight" and kernel in (kernels.linear, kernels.embedding):
            fan_in, fan_out = kernels.count_features(base)
            # (A^T B)_ij sums `rank` products, and its standard deviation shall be `size`. The outputs of A have the
            # size of its inputs: a row of inputs for a linear layer, one entry for an embedding.
            looks_up = kernel is kernels.embedding
            a_std = 1.0 if looks_up else 1 / math.sqrt(fan_in)
            a = _normal((spec.n_voters, *((fan_in, spec.rank) if looks_up else (spec.rank, fan_in))), generator)
            b = _normal((spec.n_voters, spec.rank, fan_out), generator)
            if spec.antithetic:
                _pair(a, 1)
                _pair(b, -1)
            initial["weight_a"] = (a * a_std).to(parameter.device, dtype)
            initial["weight_b"] = (b * (size / (a_std * math.sqrt(spec.rank)))).to(parameter.device, dtype)
        else:
            full = _normal((spec.n_voters, *parameter.shape), generator) * size
            if spec.antithetic:
                _pair(full, -1)
            initial[name] = full.to(parameter.device, dtype)
    return {name: nn.Parameter(start) for name, start in initial.items()}


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that a seed means the same voters on every device.
    return torch.randn(shape, generator=generator)


def _pair(draws: Tensor, sign: int) -> None:
    """Give each second voter the draw of the one before it, times the sign, in place."""
    draws[1::2] = sign * draws[: len(draws) // 2 * 2 : 2]


def _float_dtype(base: nn.Module, parameter: Tensor) -> torch.dtype:
    if parameter.is_floating_point() and not compat.is_quantized(base):
        return parameter.dtype
    return getattr(base, "compute_dtype", None) or torch.get_default_dtype()


def _weight_std(base: nn.Module, parameter: Tensor) -> float:
    """Return the standard deviation of the leaf's weight, the unit of ``weight_noise`` for all its parameters."""
    weight = getattr(base, "weight", parameter)
    if compat.is_quantized(base):
        # Packed weights cannot be read without their library, but for x ~ N(0, 1) the mean of (W x)^2 is the
        # sum of squares of a row of W.
        x = torch.randn((256, kernels.count_features(base)[0]), generator=torch.Generator().manual_seed(0))
        x = x.to(weight.device, _float_dtype(base, parameter))
        with torch.no_grad():
            y = base(x).float() - base(torch.zeros_like(x[:1])).float()
        return float((y.square().mean() / x.shape[1]).sqrt())
    # A norm's weight is constant when new: then its mean size is the unit.
    std = float(weight.detach().float().std(correction=0)) if weight.numel() > 1 else 0.0
    return std or float(weight.detach().float().abs().mean())


def _redrawn(base: nn.Module, parameters: dict[str, nn.Parameter], generator: torch.Generator) -> dict[str, Tensor]:
    """Draw the leaf's parameters again, by its own initialisation where it has one.

    A layer whose weights are all equal, such as the last of a scale branch, was set so on purpose and stays as it is.
    """
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.numel() > 1 and bool((weight == weight.flatten()[0]).all()):
        return {name: p.detach() for name, p in parameters.items()}
    if callable(getattr(base, "reset_parameters", None)):
        new = copy.deepcopy(base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
            new.reset_parameters()  # type: ignore[operator]
        return {name: new.get_parameter(name).detach() for name in parameters}
    return {
        name: _normal(tuple(p.shape), generator).to(p.device, p.dtype) * _weight_std(base, p)
        for name, p in parameters.items()
    }
