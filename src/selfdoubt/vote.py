"""Vote: an ensemble that shares its weights.

Every matched leaf keeps its weights and gets one deviation per voter, full or low rank:

    y_m = leaf(x_m) + alpha * delta_m(x_m)        m = 1 .. n_voters

A voter whose deviation is zero is the base model. Voters differ because they start apart (``weight_noise``) and because
in training each reads its own share of the batch (Lakshminarayanan et al., 2017, "Deep ensembles"; low rank:
Wang et al., 2023, "LoRA ensembles"). The risk is their disagreement. ``noise.py`` finds the size of deviations that
leaves a model's answers as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, replace
from typing import Any, ClassVar, Literal, ParamSpec, overload

import torch
from torch import Tensor, nn

from selfdoubt import compat, kernels, targets
from selfdoubt.errors import ConfigError, WrapError
from selfdoubt.fields import (
    MEMBERS,
    SCALE,
    SHARED,
    WIDTH,
    FieldCheck,
    check_settings,
    choice,
    either,
    flag,
    number,
    optional,
    resolve_compile,
    whole,
)
from selfdoubt.members import Wrapped, wrap
from selfdoubt.rows import ForwardContext, Replacement, expand
from selfdoubt.targets import Leaf

P = ParamSpec("P")

#: Size of the deviations of ``weight_noise="auto"``, relative to the weights, until a search has found one.
START_NOISE = 0.01


@dataclass(frozen=True)
class Wrapper:
    """Settings of an ensemble; call it with a model to wrap it, or use it as a decorator of a module class.

    Args:
        n_voters: Number of voters, at least 1.
        param_filter: A regex over full parameter names. None: query and value projections of a decoder, every
            parameter of any other model.
        rank: None gives full deviations. A number gives linear and embedding leaves deviations of that rank; other
            leaves are small and keep full ones.
        finetune: True starts from the model's weights and freezes them, so that only deviations train. False re-draws
            the matched weights independently for each voter, and lets the rest of the model train with them.
        weight_noise: Initial size of a deviation, relative to the standard deviation of the leaf's weight. "auto" is
            ``START_NOISE`` until ``fit_noise`` (any module) or ``search_noise`` (language models) finds the largest
            size that keeps the model's answers: then it is 1, and ``alpha`` the size relative to each leaf's output.
        alpha: Scale of the deviations.
        antithetic: Draw deviations in pairs: each second voter starts with the deviation of the one before it, with
            the opposite sign; the last of an odd number has no partner. Needs ``finetune=True``.
        output: "logits" averages probabilities over the last axis, "values" averages values. "auto" takes an output
            called ``logits`` (Hugging Face) as logits and anything else as values.
        shared_inputs: Names of inputs without a batch axis, passed to all voters as they are.
        compile: Compile the wrapped forward as one graph.
        verbose: 0 logs nothing, 1 a summary, 2 every matched parameter (``logging.getLogger("selfdoubt")``).
        seed: Seed of the initial deviations.
        answer_from: "mean" answers with the mean over voters. "base" adds the base model as one more row at evaluation
            without deviation: it alone answers, and the voters only say how far they disagree with it. None is "mean"
            here; a language model that loads an untrained wrapper takes "base" instead.
        symbolic_trace: Another name for ``compile``, as an argument only.

    Raises:
        ConfigError: If a setting is out of range.

    Example:
        >>> wrapped = Wrapper(n_voters=3, weight_noise=0.1)(nn.Sequential(nn.Linear(4, 2)))
        >>> y, risk = wrapped(torch.ones(5, 4), return_risk=True, training=False)
        >>> y.shape == risk.shape == (5, 2)
        True
    """

    n_voters: int = 3
    param_filter: str | None = None
    rank: int | None = None
    finetune: bool = True
    weight_noise: float | Literal["auto"] = 0.2
    alpha: float = 1.0
    antithetic: bool = False
    output: Literal["auto", "values", "logits"] = "auto"
    shared_inputs: tuple[str, ...] = ()
    compile: bool | None = None
    verbose: int = 0
    seed: int = 0
    answer_from: Literal["base", "mean"] | None = None
    symbolic_trace: InitVar[bool | None] = None

    goes_inside: ClassVar[bool] = False
    #: First and largest size that a search tries.
    start_noise: ClassVar[float] = START_NOISE
    largest_noise: ClassVar[float] = 1.0
    kinds: ClassVar[Mapping[str, FieldCheck]] = {
        "n_voters": whole(1, MEMBERS),
        "rank": optional(whole(1, WIDTH)),
        "finetune": flag,
        "weight_noise": either(number(0, SCALE), choice("auto")),
        "alpha": number(-SCALE, SCALE),
        "antithetic": flag,
        "output": choice("auto", "values", "logits"),
        "answer_from": optional(choice("base", "mean")),
        **SHARED,
    }
    newer: ClassVar[frozenset[str]] = frozenset({"answer_from", "antithetic"})  #: settings that older files lack

    def __post_init__(self, symbolic_trace: bool | None) -> None:
        object.__setattr__(self, "compile", resolve_compile(self.compile, symbolic_trace))
        check_settings(self, self.kinds)
        if self.alpha == 0:
            raise ConfigError("alpha must not be 0: voters could not differ; try alpha=1")
        if not self.finetune and self.rank is not None:
            raise ConfigError(f"finetune=False re-draws whole weights, got rank={self.rank}; leave rank=None")
        if not self.finetune and (self.antithetic or self.weight_noise == "auto"):
            raise ConfigError(
                "finetune=False re-draws whole weights, which have neither opposites nor a size to search; leave "
                "antithetic=False and a number as weight_noise"
            )

    @overload
    def __call__(self, model: nn.Module) -> Wrapped: ...
    @overload
    def __call__(self, model: Callable[P, nn.Module]) -> Callable[P, Wrapped]: ...
    def __call__(self, model: Any) -> Any:
        """Wrap a model; or decorate a class of models, whose calls then build wrapped ones."""
        return wrap(self, model)

    def find(self, model: nn.Module) -> list[Leaf]:
        """Return the leaves to replace."""
        leaves = targets.join_nested_leaves(targets.find_leaves(model, self.param_filter))
        for leaf in leaves:
            kernels.check_rows(model, leaf)
            base = compat.get_base_layer(leaf.module)
            if compat.is_quantized(base) and (self.rank is None or not self.finetune):
                raise WrapError(
                    f"{leaf.name} holds packed {type(base).__name__} weights, which cannot take a full deviation; "
                    f"use low-rank ones: vote.Wrapper(n_voters={self.n_voters}, rank=16, ...)"
                )
        return leaves

    def make_leaf(self, leaf: Leaf, index: int, call: ForwardContext) -> nn.Module:
        """Build a leaf with one deviation per voter."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
        return VotingLeaf(leaf, call, self, generator)

    def freezes(self) -> bool:
        """Return whether the model's own parameters stop training."""
        return self.finetune

    def members(self, *, training: bool) -> int:
        """Return the number of voters, which all run, always; at evaluation one more where the base model answers."""
        return self.n_voters + (self.has_base and not training)

    def splits(self, *, training: bool) -> bool:
        """Return whether a batch is split over the voters: True in training."""
        return training

    @property
    def seeks_noise(self) -> bool:
        """True if the size of the noise is still to be searched."""
        return self.weight_noise == "auto"

    def with_noise(self, size: float) -> Wrapper:
        """Return the settings of voters whose deviations have this scale."""
        return replace(self, alpha=size, weight_noise=1.0 if self.seeks_noise else self.weight_noise)

    @property
    def has_base(self) -> bool:
        """True if at evaluation member 0 is the base model, which answers alone."""
        return self.answer_from == "base"


class EagerWrapper(Wrapper):
    """``Wrapper`` under another name."""


class VotingLeaf(Replacement):
    """A leaf and one deviation of its matched parameters per voter."""

    def __init__(self, leaf: Leaf, call: ForwardContext, spec: Wrapper, generator: torch.Generator) -> None:
        super().__init__(leaf.module, call)
        self.alpha = spec.alpha
        self.kernel = kernels.find_kernel(compat.get_base_layer(leaf.module))
        self.deviations = nn.ParameterDict(_initial(leaf, spec, generator))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the leaf on member-major rows, each voter with its own deviation and the base model with none."""
        self.call.reached = True
        if self.call.only_base:
            return self.leaf(*args, **kwargs)
        if args:
            args = (x := self.call.per_row(args[0]), *args[1:])
        else:
            name, value = next(iter(kwargs.items()))
            kwargs = kwargs | {name: (x := self.call.per_row(value))}
        if self.kernel is None:
            has_base = self.call.has_base
            return kernels.loop(self.leaf, self.deviations, self.alpha, args, kwargs, has_base=has_base)
        y = self.leaf(*args, **kwargs)
        first = self.call.count_base(x)
        theirs, voters = (x[first:], y[first:]) if first else (x, y)
        delta = self.kernel(compat.get_base_layer(self.leaf), self._as_deviation(theirs), self.deviations)
        moved = torch.add(voters, delta.to(y.dtype), alpha=self.alpha)
        # The base's rows are kept as they are: adding zero could change a bit (-0.0 + 0.0).
        return torch.cat([y[:first], moved]) if first else moved

    def set_noise(self, size: float) -> None:
        """Set the scale of the deviations."""
        self.alpha = size

    @torch.no_grad()
    def measure(self, x: Tensor) -> tuple[float, float] | None:
        """Return the sums of squares of all voters' deviations and of the leaf's output without its bias.

        Both are over the same rows and features: the first is also a mean over voters. None for a leaf without a
        kernel.

        Args:
            x: An input of the leaf, in its rows; deviations are measured before ``alpha``.
        """
        if self.kernel is None:
            return None
        base = compat.get_base_layer(self.leaf)
        voters = len(next(iter(self.deviations.values())))
        delta = self.kernel(base, expand(self._as_deviation(x), voters), self.deviations)
        y = self.leaf(x)
        bias = getattr(base, "bias", None)
        if isinstance(bias, Tensor):
            y = y - bias.view(-1, *[1] * (x.ndim - 2)) if self.kernel is kernels.convolution else y - bias
        return float(delta.double().square().sum()) / voters, float(y.double().square().sum())

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Multiply all deviations."""
        for name, deviation in self.deviations.items():
            if name != "weight_a":  # the product of both factors counts
                deviation.mul_(factor)

    def _as_deviation(self, x: Tensor) -> Tensor:
        dtype = next(iter(self.deviations.values())).dtype
        autocast = torch.is_autocast_enabled(x.device.type)
        return x if autocast or not x.is_floating_point() else x.to(dtype)


def _initial(leaf: Leaf, spec: Wrapper, generator: torch.Generator) -> dict[str, nn.Parameter]:
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
    """Draw the leaf's parameters again, by its own initialisation where it has one."""
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
