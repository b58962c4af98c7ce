"""Vote: an ensemble that shares its weights.

Every matched leaf keeps its weights and gets one deviation per voter, full or low rank:

    y_m = leaf(x_m) + alpha * delta_m(x_m)        m = 1 .. n_voters

A voter whose deviation is zero is the base model. Voters differ because they start apart (``weight_noise``) and because
in training each reads its own share of the batch (Lakshminarayanan et al., 2017, "Deep ensembles"; low rank:
Wang et al., 2023, "LoRA ensembles"). The risk is their disagreement. ``noise.py`` finds the size of deviations that
leaves a model's answers as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, replace
from typing import Any, ClassVar, Literal, ParamSpec, overload

import torch
from torch import Tensor, nn

from selfdoubt import compat, kernels, targets
from selfdoubt.deviations import START_NOISE, draw_deviations
from selfdoubt.errors import ConfigError, WrapError
from selfdoubt.factors import find_group
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
from selfdoubt.members import Wrapped
from selfdoubt.merging import merge_deviation, run_merged, takes_merged
from selfdoubt.rows import ForwardContext, Replacement, expand, is_autocasting
from selfdoubt.sharing import share_module
from selfdoubt.targets import Leaf
from selfdoubt.wrapping import wrap

P = ParamSpec("P")


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
            without deviation: it alone answers, and the voters only say how far they disagree with it. None is "base"
            until the voters are trained, then "mean".
        start: The first token of a language model's text that voters read. "prompt": the first of all. "answer": the
            last of the prompt, which predicts the answer's first; all before is read by the base model once for all
            voters, so that a prompt costs what it costs without voters, and nothing says how far they disagree about
            the question. Other models have no answer, and their voters read everything.
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
    start: Literal["prompt", "answer"] = "prompt"
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
        "start": choice("prompt", "answer"),
        **SHARED,
    }
    #: Settings that older files lack.
    newer: ClassVar[frozenset[str]] = frozenset({"answer_from", "antithetic", "start"})

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
        leaves = targets.find_leaves(model, self.param_filter)
        # What a replacement adds for itself, such as a trainable noise, has no deviations; what it adds as layers has.
        leaves = targets.join_nested_leaves([leaf for leaf in leaves if not isinstance(leaf.module, Replacement)])
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


def merge_voter(wrapped: Wrapped, voter: int) -> nn.Module:
    """Return one voter as a model of its own, with ``W + alpha * delta`` in place of each changed weight.

    It has the structure of the model that was wrapped, with nothing of this library inside, so that it can be exported
    and served as any other; its output is ``wrapped.forecast(x).members[voter]``. Weights that voters do not change are
    shared with ``wrapped``. Voters around another wrapper give a model in that wrapper: with a sculpt inside it
    predicts that voter's scale too, with a density it measures that voter's features, and with samples inside it draws
    its own.

    Args:
        wrapped: A model that ``vote.Wrapper`` has wrapped.
        voter: Number of the voter, from 0.

    Raises:
        ConfigError: If there is no such voter.
        WrapError: If the model has no voters, or if a changed weight is packed.

    Example:
        >>> wrapped, x = Wrapper(n_voters=3)(nn.Sequential(nn.Linear(4, 2))), torch.ones(5, 4)
        >>> alone = merge_voter(wrapped, 1)
        >>> alone, torch.allclose(alone(x), wrapped.forecast(x).members[1])
        (Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
        ), True)
    """
    spec = wrapped.spec if isinstance(wrapped, Wrapped) else None
    if not isinstance(spec, Wrapper):
        raise WrapError(
            f"only a model that vote.Wrapper has wrapped has voters, got {type(wrapped).__name__}"
            + (f" of {spec!r}" if spec else "")
        )
    if type(voter) is not int or voter not in range(spec.n_voters):
        raise ConfigError(f"voter must be a number from 0 to {spec.n_voters - 1}, got {voter!r}")
    twin = share_module(wrapped, freeze=False)
    assert isinstance(twin, Wrapped)
    for name in twin.leaf_names:
        leaf = twin.module.get_submodule(name)
        if not isinstance(leaf, VotingLeaf):
            raise WrapError(
                f"{name} computes its weight from others ({type(leaf).__name__}), which no deviation can be merged "
                "into; remove the parametrization from the model before wrapping it"
            )
        targets.replace_module(twin.module, name, merge_deviation(leaf, name, voter))
    if isinstance(twin.module, Wrapped):
        twin.module.is_trained = wrapped.is_trained
    return twin.module


class VotingLeaf(Replacement):
    """A leaf and one deviation of its matched parameters per voter."""

    def __init__(self, leaf: Leaf, call: ForwardContext, spec: Wrapper, generator: torch.Generator) -> None:
        super().__init__(leaf.module, call)
        self.leaf_name = leaf.name
        self.alpha = spec.alpha
        self.kernel = kernels.find_kernel(compat.get_base_layer(leaf.module))
        self.deviations = nn.ParameterDict(draw_deviations(leaf, spec, generator))
        self.group = find_group(leaf.name, call.groups)
        self.place = self.group.add(self)
        self._is_plain = type(leaf.module) in (nn.Linear, nn.Conv1d, nn.Conv2d) and "weight" in self.deviations

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the leaf on member-major rows, each voter with its own deviation and the base model with none."""
        self.call.reached = True
        if self.call.only_base:
            return self.leaf(*args, **kwargs)
        if args:
            args = (x := self.call.per_row(args[0], self.leaf_name), *args[1:])
        else:
            name, value = next(iter(kwargs.items()))
            kwargs = kwargs | {name: (x := self.call.per_row(value, self.leaf_name))}
        if self.kernel is None:
            base_rows = self.call.count_base(kernels.find_rows(self.leaf, args, kwargs))
            # Graphs have no recurrent layers: they end before one, and go on after it.
            has_graph = torch.compiler.is_dynamo_compiling() or "torch._dynamo" in sys.modules
            loop = kernels.loop
            if has_graph and isinstance(self.leaf, nn.RNNBase):
                loop = torch.compiler.disable(loop)  # type: ignore[no-untyped-call]
            moved = loop(self.leaf, self.deviations, self.alpha, args, kwargs, base_rows=base_rows)
            return moved if self.call.active is None else self.call.choose_active(moved, self.leaf(*args, **kwargs))
        can_merge = self._is_plain and self.call.training and self.call.active is None
        if can_merge and self.kernel is not None and takes_merged(self.leaf, x):
            return run_merged(self.leaf, self.kernel, self.deviations, self.alpha, x)
        y = self.leaf(*args, **kwargs)
        if self.group.move(self.place, x, y, self.alpha, self.call):
            return y
        first = self.call.count_base(x)
        theirs, voters = (x[first:], y[first:]) if first else (x, y)
        delta = self.kernel(compat.get_base_layer(self.leaf), self._as_deviation(theirs), self.deviations)
        moved = torch.add(voters, delta.to(y.dtype), alpha=self.alpha)
        if self.call.active is not None:
            moved = self.call.choose_active(moved, voters)
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VotingLeaf:
        """Move or cast as usual; deviations of a convolution keep the member axis out of their memory format."""

        def apply(x: Tensor) -> Tensor:
            return fn(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if x.ndim == 5 else fn(x)  # type: ignore[no-untyped-call]

        if recurse:
            self.leaf._apply(fn)  # type: ignore[no-untyped-call]
            self.deviations._apply(apply)  # type: ignore[no-untyped-call]
        return self

    def _as_deviation(self, x: Tensor) -> Tensor:
        dtype = next(iter(self.deviations.values())).dtype
        return x if is_autocasting(x) or not x.is_floating_point() else x.to(dtype)
