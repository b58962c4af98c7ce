"""Members are rows: expands a batch by members, folds it back, and defines the module that replaces a leaf.

``rows = members * batch``, member-major: row ``m * batch + b``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from selfdoubt.errors import ShapeError


def expand(x: Shaped[Tensor, "batch *rest"], members: int) -> Shaped[Tensor, "rows *rest"]:
    """Repeat a batch for every member: row ``m * batch + b`` is ``x[b]``."""
    return x.repeat(members, *[1] * (x.ndim - 1)) if members > 1 else x


def unfold(x: Shaped[Tensor, "rows *rest"], members: int) -> Shaped[Tensor, "members batch *rest"]:
    """Give the member axis back: ``out[m, b]`` is row ``m * batch + b``.

    Raises:
        ShapeError: If the rows do not divide by the members.
    """
    if x.shape[0] % members:
        raise ShapeError(
            f"the rows must be a multiple of the {members} members, got {x.shape[0]} rows; a training batch is split "
            f"over the members: use a multiple of {members}, or training=False (or .eval()) to predict"
        )
    return x.reshape(members, x.shape[0] // members, *x.shape[1:])


def is_autocasting(x: Tensor) -> bool:
    """Return True if layers choose the type of numbers themselves here; a tensor without memory has no such mode."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


@dataclass(eq=False)
class ForwardContext:
    """The state that the replaced leaves of one model share in a call: the members that run, predicted
    scales, and features whose density is measured.

    It keeps its values until the next call, because gradient checkpointing runs leaves again during backward.
    """

    members: int = 1  #: with the base model, and those of all wrappers
    rows: int = 1  #: members times the size of the batch
    training: bool = False
    has_base: bool = False  #: member 0 is the base model: leaves run its rows without deviation or noise
    reached: bool = False
    many_lines: str | None = None  #: name of a leaf that got several lines for each row, of windows for example
    is_running: bool = False
    active: Bool[Tensor, "rows t"] | None = None  #: positions at which members deviate; None for all
    forwards: int = 0  #: number of this run of the model
    epoch: int = 0  #: number of the first run whose parameters are known to be those of this one
    groups: dict[tuple[str, int], Any] = field(default_factory=dict)  #: leaves that may read the same input
    scales: list[tuple[Tensor, Tensor]] = field(default_factory=list)  #: (a head's output, its predicted scale)
    features: list[Tensor] = field(default_factory=list)  #: inputs of a measured leaf, without gradients
    inputs: tuple[Tensor, ...] = ()  #: lists of whole numbers among the model's inputs

    def __reduce__(self) -> tuple[type[ForwardContext], tuple[()]]:
        """Return a fresh context for copies: tensors of an earlier call are part of a graph, which cannot be copied."""
        return ForwardContext, ()

    def start(
        self, *, members: int, rows: int, training: bool, has_base: bool, active: Tensor | None, same_weights: bool,
        inputs: Iterable[Tensor] = (),
    ) -> None:  # fmt: skip
        """Take the state of a new call, and drop what the one before has left."""
        self.inputs = () if torch.compiler.is_compiling() else tuple(x for x in inputs if is_list_of_ids(x))
        self.members, self.rows, self.training, self.has_base, self.active = members, rows, training, has_base, active
        self.reached, self.many_lines, self.is_running = False, None, True
        if not torch.compiler.is_compiling():  # a graph would be compiled again for each number
            self.forwards += 1
            if not same_weights:
                self.epoch = self.forwards
        self.scales.clear()
        self.features.clear()

    @property
    def only_base(self) -> bool:
        """True if no other member runs than the base model."""
        return self.has_base and self.members == 1

    def count_base(self, x: Tensor) -> int:
        """Return the number of leading entries of a leaf's input that belong to the base model; 0 without its rows."""
        return len(x) // self.members if self.has_base else 0

    def choose_active(self, moved: Any, base: Any) -> Any:
        """Return a leaf's output with deviations where members are active, and without them elsewhere.

        Raises:
            ShapeError: If the output is not one tensor with the positions in dimension 1.
        """
        active = self.active
        assert active is not None
        if not isinstance(moved, Tensor) or moved.ndim < 2 or moved.shape[1] != active.shape[1]:
            shape = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
            raise ShapeError(
                f"members that are active at some of {active.shape[1]} positions need them in dimension 1 of what a "
                f"replaced layer gives, got {shape}; leave it out with param_filter, or use start='prompt'"
            )
        return torch.where(active[-len(moved) :].view(*moved.shape[:2], *[1] * (moved.ndim - 2)), moved, base)

    def per_row(self, x: Any, name: str) -> Any:
        """Return a leaf's input with one entry per row; a single entry (position ids, say) is repeated for every row.

        So is a list of ids that is not one per row, or that counts up from 0 and is none of the model's inputs: such
        are the positions in ``embedding(torch.arange(length))``.

        Args:
            x: The input.
            name: Name of the leaf, for the message.

        Raises:
            ShapeError: If the number of entries is neither 1 nor that of the rows.
        """
        if not isinstance(x, Tensor) or not x.ndim or not self.rows:
            return x
        if x.shape[0] == self.rows and x.ndim > 1:  # almost always
            return x
        if len(x) == 1:
            return x.expand(self.rows, *x.shape[1:])
        if is_list_of_ids(x) and (len(x) % self.rows or self._are_positions(x)):
            return x.expand(self.rows, len(x))
        if len(x) % self.rows:
            raise ShapeError(
                f"{name} got {len(x)} lines of input, and the batch of all members has {self.rows} rows; a layer that "
                f"sees something else than rows cannot have members: leave it out, e.g. with {leave_out(name)}"
            )
        self.many_lines = self.many_lines or name
        return x

    def _are_positions(self, ids: Tensor) -> bool:
        """Return True if a list of ids counts up from 0 and is none of the inputs; a graph cannot look."""
        if self.members == 1 or torch.compiler.is_compiling() or ids.is_meta:
            return False
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        given = any(x.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr() for x in self.inputs)
        return not given and torch.equal(ids, torch.arange(len(ids), device=ids.device, dtype=ids.dtype))


def is_list_of_ids(x: Tensor) -> bool:
    """Return True for a tensor of one dimension with whole numbers."""
    return x.ndim == 1 and not (x.is_floating_point() or x.is_complex())


def leave_out(*names: str) -> str:
    """Return a setting of a wrapper that leaves leaves out."""
    escaped = "|".join(re.escape(name) for name in names)
    return f"param_filter=r'^(?!{escaped if len(names) == 1 else f'({escaped})'}\\.)'"


class Replacement(nn.Module):
    """A module in a leaf's place: it holds the leaf, as ``leaf``, and the parameters that a wrapper adds.

    Other attributes are the leaf's, since models and libraries read ``layer.weight`` or ``layer.in_features``.
    """

    leaf_name: str = ""  #: name of the leaf, as a filter reads it, where members change it

    def __init__(self, leaf: nn.Module, call: ForwardContext) -> None:
        super().__init__()
        self.leaf = leaf
        self.call = call
        self.train(leaf.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("leaf"), name)


def list_added_names(model: nn.Module) -> list[str]:
    """Return the names in ``model.state_dict()`` that wrapping added: under a replacement, and not under its leaf."""
    replaced = [name for name, module in model.named_modules() if isinstance(module, Replacement)]

    def is_added(key: str) -> bool:
        return any(key.startswith(f"{r}.") and not key.startswith(f"{r}.leaf.") for r in replaced)

    return [key for key in model.state_dict() if is_added(key)]
