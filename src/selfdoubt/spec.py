"""``Spec``: the interface of a wrapper's settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from selfdoubt.errors import ConfigError, WrapError
from selfdoubt.rows import ForwardContext
from selfdoubt.targets import Leaf


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


def get_name(spec: Spec) -> str:
    """Return the name of a wrapper as its users write it: ``vote.Wrapper``."""
    return f"{type(spec).__module__.rpartition('.')[2]}.{type(spec).__name__}"


def describe_wrapping(spec: Spec, wrapped: nn.Module, leaves: list[Leaf]) -> str:
    """Return what a wrapper has done to a model, in as many lines as ``verbose`` asks for."""
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in wrapped.parameters())
    name = get_name(spec).partition(".")[0]
    lines = [f"{name}: {len(leaves)} leaves replaced, {trainable:,} of {everything:,} parameters train"]
    if spec.verbose > 1:
        lines += [f"  {leaf.name}.{param}" for leaf in leaves for param in leaf.params]
    return "\n".join(lines)


def check_order(inside: Sequence[Spec], spec: Spec) -> None:
    """Check that the wrappers of a model can be inside of another one.

    Raises:
        WrapError: If one cannot.
    """
    for inner in inside:
        if not inner.goes_inside or type(inner) is type(spec):
            raise WrapError(
                f"the model is wrapped by {get_name(inner)}, which cannot be inside of {get_name(spec)}; the order is "
                "vote.Wrapper(...)(sample.Wrapper(...)(sculpt.Wrapper(...)(model))), each once"
            )


def check_spec(wrapper: Any) -> None:
    """Check that a value is a wrapper.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(wrapper, type) or not isinstance(wrapper, Spec):
        raise ConfigError(f"wrapper must be one such as vote.Wrapper(n_voters=3), 'auto' or None, got {wrapper!r}")
