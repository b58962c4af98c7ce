"""Members are rows: M variants of a model run as one M times larger batch.

``rows = members * batch``, member-major: row ``m * batch + b``. Frozen modules see an ordinary batch; only the replaced
leaves know that dimension 0 holds members. A wrapper (vote, sample, sculpt) chooses the leaves and their replacements;
``Wrapped`` repeats the inputs for every member, runs the module once, and folds the rows back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import update_wrapper
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from selfdoubt import targets
from selfdoubt.errors import CaptureError, ConfigError, ShapeError, WrapError
from selfdoubt.forecast import Forecast, OutputKind
from selfdoubt.messages import show_message
from selfdoubt.rows import ForwardContext, Replacement, expand, unfold
from selfdoubt.scales import pair_scales
from selfdoubt.sharing import share_module
from selfdoubt.targets import Leaf
from selfdoubt.tree import iter_tensors, tree_map


@runtime_checkable
class Spec(Protocol):
    """The interface of a wrapper: a frozen dataclass of settings that finds leaves and builds their replacements."""

    @property
    def verbose(self) -> int:
        """0 logs nothing, 1 a summary, 2 every matched parameter."""

    @property
    def compile(self) -> bool | None:
        """True to compile the wrapped forward as one graph."""

    @property
    def shared_inputs(self) -> tuple[str, ...]:
        """Names of inputs without a batch axis."""

    @property
    def output(self) -> Literal["auto", "values", "logits"]:
        """The kind of the outputs."""

    @property
    def goes_inside(self) -> bool:
        """True if a model wrapped by this can be wrapped again."""

    def find(self, model: nn.Module) -> list[Leaf]:
        """Find the leaves to replace."""

    def make_leaf(self, leaf: Leaf, index: int, call: ForwardContext) -> nn.Module:
        """Make the module that takes a leaf's place."""

    def freezes(self) -> bool:
        """Return True if the model's own parameters stop training."""

    def members(self, *, training: bool) -> int:
        """Return the number of members that run."""

    def splits(self, *, training: bool) -> bool:
        """Return True if a batch is split over the members instead of repeated for each."""

    @property
    def has_base(self) -> bool:
        """True if at evaluation member 0 is the base model, which answers alone."""


class Wrapped(nn.Module):
    """A model whose matched leaves are replaced. Call it like the model; ask for ``return_risk=True``.

    Modules that are not replaced share their memory with the original model, which stays as it was: nothing is copied.
    """

    def __init__(self, model: nn.Module, spec: Spec) -> None:
        super().__init__()
        self.spec: Spec = spec
        if isinstance(model, Wrapped) and not model.spec.goes_inside:
            raise WrapError(
                "only a sculpt or a density can be wrapped again, and this model is wrapped by "
                f"{model.spec!r}; put it inside: vote.Wrapper(...)(sculpt.Wrapper(...)(model))"
            )
        leaves = spec.find(model)
        self.call = ForwardContext()
        self.module = share_module(model, freeze=spec.freezes())
        self.leaf_names = [leaf.name for leaf in leaves]
        for index, leaf in reversed(list(enumerate(leaves))):  # leaves inside others first
            shared = replace(leaf, module=self.module.get_submodule(leaf.name))
            targets.replace_module(self.module, leaf.name, spec.make_leaf(shared, index, self.call))
        self.training = model.training
        self._inputs = _input_names(model)
        self._batch_norms = [m for m in self.modules() if isinstance(m, _BatchNorm)]
        # The fused path of nn.TransformerEncoderLayer reads its layers' weights and would step over replaced leaves.
        self._has_fused_path = any(isinstance(m, nn.TransformerEncoderLayer) for m in self.modules())
        self._is_compiled = bool(spec.compile)
        if isinstance(self.module, Wrapped):  # the innermost runs the model
            self.module._is_compiled |= self._is_compiled
        self._graph: Callable[..., Any] | None = None
        if spec.verbose:
            show_message(_summary(self, leaves))

    def forward(self, *args: Any, return_risk: bool = False, training: bool | None = None, **kwargs: Any) -> Any:
        """Return the model's own output structure: the mean over members or, in training, each row's own member.

        With ``answer_from="base"`` the output is the base model's.

        Args:
            *args: The model's own inputs. Tensors as long as the first one share its batch axis.
            return_risk: Return ``(output, risk)``; the risk has the output's structure: the standard deviation over
                members (around the base, where that answers), sculpt's scale, or density's distance. It is None where
                an output has none.
            training: None follows ``self.training``. True: vote splits the batch over its voters, sample runs once.
            **kwargs: The model's own keyword inputs.

        Raises:
            ShapeError: If a training batch does not divide over the voters.
            ConfigError: If a risk is asked for in training, where each row meets one member only.
            WrapError: If BatchNorm in training mode would mix members.
        """
        training = self.training if training is None else training
        if self.spec.splits(training=training) or self.spec.members(training=training) == 1:
            self._check_split(args, kwargs, training)
            y, scales = self.forward_rows(*args, training=training, **kwargs)
            if not return_risk:
                return y
            measure = getattr(self.spec, "measure", None)
            if measure is not None:
                return y, measure(self, y, kwargs.get("attention_mask"))
            if scales is not None:
                return y, scales
            if training:
                raise ConfigError(
                    "in training each row meets one member, so members cannot disagree; "
                    "ask for return_risk=True with training=False"
                )
        forecast = self.forecast(*args, **kwargs)
        mean = tree_map(lambda f: f.mean if isinstance(f, Forecast) else f, forecast)
        if not return_risk:
            return mean
        return mean, tree_map(lambda f: f.std if isinstance(f, Forecast) else None, forecast)

    def forecast(self, *args: Any, **kwargs: Any) -> Any:
        """Return every member's prediction: a ``Forecast`` in place of each output tensor that has a batch axis."""
        members = self.spec.members(training=False)
        batch = self._batch_size(args, kwargs)

        def grow(x: Any) -> Any:
            return expand(x, members) if isinstance(x, Tensor) and x.ndim and len(x) == batch else x

        shared = self.spec.shared_inputs
        args = tuple(a if n in shared else tree_map(grow, a) for n, a in self._named(args).items())
        kwargs = {n: a if n in shared else tree_map(grow, a) for n, a in kwargs.items()}
        y, scales = self.forward_rows(*args, training=False, **kwargs)

        def fold(x: Any, scale: Tensor | None) -> Any:
            if not isinstance(x, Tensor) or not x.ndim or len(x) != members * batch:
                return x
            std = None if scale is None else unfold(self.distribution.std((x, scale)), members)
            kind: OutputKind = "logits" if self.spec.output == "logits" else "values"
            rows = unfold(x, members)
            if not self.spec.has_base:
                return Forecast(rows, std, kind)
            return Forecast(rows[1:], None if std is None else std[:1], kind, rows[0])

        forecast = tree_map(fold, y, scales)
        logits = forecast.get("logits") if isinstance(forecast, Mapping) else None
        if self.spec.output == "auto" and isinstance(logits, Forecast):
            forecast["logits"] = replace(logits, kind="logits")
        return forecast

    def forward_rows(
        self,
        *args: Any,
        training: bool = False,
        same_weights: bool = False,
        only_base: bool = False,
        active: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run on rows that are already member-major.

        Args:
            *args: The model's own inputs.
            training: True runs the members of training.
            same_weights: True if no parameter has changed since the run before, as between the steps of an answer:
                leaves go on with copies that they keep of parameters.
            only_base: True runs the base model alone, on one row per entry of the batch.
            active: Positions at which voters deviate, ``(rows, t)``; None for all.
            **kwargs: The model's own keyword inputs.

        Returns:
            The module's output on rows, and sculpt's scales in the same structure (None without a sculpt).

        Raises:
            WrapError: If BatchNorm in training mode would mix members, or if no replaced leaf was called.
        """
        self.call.members = 1 if only_base else self.spec.members(training=training)
        self.call.rows = self._batch_size(args, kwargs)
        self.call.training = training
        self.call.has_base = only_base or (self.spec.has_base and not training)
        self.call.active = active
        self.call.reached = False
        if not torch.compiler.is_compiling():  # a graph would be compiled again for each number
            self.call.forwards += 1
            if not same_weights:
                self.call.epoch = self.call.forwards
        self.call.scales.clear()
        self.call.features.clear()
        if self.call.members > 1 and any(norm.training for norm in self._batch_norms):
            raise WrapError(
                f"BatchNorm in training mode would mix the statistics of {self.call.members} members; "
                "call .eval() on the BatchNorm layers, or use GroupNorm or LayerNorm"
            )
        if isinstance(self.module, Wrapped):
            return self.module.forward_rows(
                *args, training=training, same_weights=same_weights, only_base=only_base, active=active, **kwargs
            )
        fused = torch.backends.mha.get_fastpath_enabled()
        if self._has_fused_path:
            torch.backends.mha.set_fastpath_enabled(False)
        try:
            y = self._run_graph(*args, **kwargs) if self._is_compiled else self.module(*args, **kwargs)
        finally:
            if self._has_fused_path:
                torch.backends.mha.set_fastpath_enabled(fused)
        if not self.call.reached:
            raise WrapError(
                f"none of the {len(self.leaf_names)} replaced leaves was called ({self.leaf_names[0]}, ...): "
                "the model reads their weights itself; choose other layers with param_filter"
            )
        return y, pair_scales(y, self.call.scales) if self.call.scales else None

    @property
    def distribution(self) -> Any:
        """The distribution of the sculpt in or under this wrapper."""
        distribution = getattr(self.spec, "distribution", None)
        return self.module.distribution if isinstance(self.module, Wrapped) else distribution

    def extra_repr(self) -> str:
        """Return the settings, which ``print(wrapped)`` shows."""
        return repr(self.spec)

    def _run_graph(self, *args: Any, **kwargs: Any) -> Any:
        if self._graph is None:
            self._graph = torch.compile(self.module, fullgraph=True)
        try:
            return self._graph(*args, **kwargs)
        except torch._dynamo.exc.Unsupported as error:
            where = error.real_stack[-1] if getattr(error, "real_stack", None) else None
            source_line = f"{where.filename}:{where.lineno}: {where.line}" if where else "an unknown line"
            reason = str(error).strip().splitlines()[0]
            raise CaptureError(
                f"compile=True needs one graph, and {source_line} cannot be captured ({reason}); "
                "use compile=False, the default"
            ) from None

    def _named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        names = [*self._inputs[: len(args)], *(f"*{i}" for i in range(len(self._inputs), len(args)))]
        return dict(zip(names, args, strict=True))

    def _batch_size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        named = self._named(args) | kwargs
        unknown = [n for n in self.spec.shared_inputs if n not in named and n not in self._inputs]
        if unknown:
            raise ConfigError(f"shared_inputs names {unknown}, and the inputs are {list(named)}")
        batched = [v for n, v in named.items() if n not in self.spec.shared_inputs]
        first = next((t for t in iter_tensors(batched) if t.ndim), None)
        if first is None:
            raise ShapeError("a wrapped model needs at least one input tensor with a batch axis, got none")
        return len(first)

    def _check_split(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> None:
        members, batch = self.spec.members(training=training), self._batch_size(args, kwargs)
        if batch % members:
            raise ShapeError(
                f"in training a batch is split over the {members} members, and {batch} rows do not divide by "
                f"{members}; use a multiple of {members}, or training=False (or .eval()) to predict"
            )


def wrap(spec: Spec, model: Any) -> Any:
    """Wrap a model; or, used as a decorator, make a class build wrapped models.

    Raises:
        WrapError: If it is neither an ``nn.Module`` nor a class of them.
    """
    if isinstance(model, type) and issubclass(model, nn.Module):

        def build(*args: Any, **kwargs: Any) -> Wrapped:
            return Wrapped(model(*args, **kwargs), spec)

        return update_wrapper(build, model, updated=())
    if not isinstance(model, nn.Module):
        raise WrapError(f"only an nn.Module, or a class of them, can be wrapped, got {type(model).__name__}")
    return Wrapped(model, spec)


def check_spec(wrapper: Any) -> None:
    """Check that a value is a wrapper.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(wrapper, type) or not isinstance(wrapper, Spec):
        raise ConfigError(f"wrapper must be one such as vote.Wrapper(n_voters=3), 'auto' or None, got {wrapper!r}")


def innermost(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers, with its replaced leaves; a plain model itself."""
    return innermost(model.module) if isinstance(model, Wrapped) else model


def get_source(model: nn.Module) -> str | None:
    """Return the folder, file or hub name of a Hugging Face model, as its config has it; None where it has none."""
    return getattr(getattr(innermost(model), "config", None), "name_or_path", None) or None


def get_base_name(model: nn.Module, name: str) -> str:
    """Return the name that a module or parameter of a wrapped model has in the model that was wrapped."""
    kept: list[str] = []
    module: Any = model
    for part in name.split("."):
        ours = {Wrapped: "module", Replacement: "leaf"}
        if not any(isinstance(module, kind) and part == inside for kind, inside in ours.items()):
            kept.append(part)
        module = getattr(module, part, None)
    return ".".join(kept)


def _input_names(model: nn.Module) -> list[str]:
    if isinstance(model, Wrapped):
        return model._inputs
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]


def _summary(wrapped: Wrapped, leaves: list[Leaf]) -> str:
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in wrapped.parameters())
    name = type(wrapped.spec).__module__.rpartition(".")[2]
    lines = [f"{name}: {len(leaves)} leaves replaced, {trainable:,} of {everything:,} parameters train"]
    if wrapped.spec.verbose > 1:
        lines += [f"  {leaf.name}.{param}" for leaf in leaves for param in leaf.params]
    return "\n".join(lines)
