"""Names a model's inputs, and finds the batch among them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from selfdoubt.errors import ConfigError, ShapeError
from selfdoubt.tree import iter_tensors

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class InputNames:
    """The names of a model's inputs, as its ``forward`` has them."""

    positional: tuple[str, ...]
    keyword_only: tuple[str, ...] = ()

    @classmethod
    def read(cls, model: nn.Module) -> InputNames:
        """Read the signature of a model."""
        parameters = inspect.signature(model.forward).parameters.values()
        keywords = (p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY)
        return cls(tuple(p.name for p in parameters if p.kind in _POSITIONAL), tuple(keywords))

    def match(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """Return positional inputs by name; those of ``*args`` are called ``*0``, ``*1``, ..."""
        names = self.positional
        return dict(zip((*names[: len(args)], *(f"*{i}" for i in range(len(names), len(args)))), args, strict=True))


def find_batch_size(inputs: Mapping[str, Any], shared: tuple[str, ...], names: InputNames) -> int:
    """Return the length of the first input tensor: dimension 0 is the batch.

    Args:
        inputs: The inputs of a call, by name.
        shared: Names of inputs without a batch axis.
        names: Names of the inputs that the model knows.

    Raises:
        ConfigError: If a shared input is not one of the model's.
        ShapeError: If no input has a batch axis.
    """
    known = (inputs, names.positional, names.keyword_only)
    unknown = [name for name in shared if not any(name in some for some in known)]
    if unknown:
        raise ConfigError(f"shared_inputs names {unknown}, and the inputs are {list(inputs)}")
    batched = [value for name, value in inputs.items() if name not in shared]
    first = next((tensor for tensor in iter_tensors(batched) if tensor.ndim), None)
    if first is None:
        raise ShapeError("a wrapped model needs at least one input tensor with a batch axis, got none")
    return len(first)


def check_batch(inputs: Mapping[str, Any], shared: tuple[str, ...], batch: int) -> None:
    """Check that a batch can be repeated for members, or split over them.

    Raises:
        ShapeError: If an input numbers rows of the batch, or packs them.
    """
    for name, value in inputs.items():
        if name in shared:
            continue
        if isinstance(value, PackedSequence):
            raise ShapeError(
                f"the input {name} is a packed sequence, which has no batch axis; give the padded batch and its "
                "lengths to the model, and pack inside of it with enforce_sorted=False"
            )
        if isinstance(value, Tensor) and _is_edge_list(value, batch):
            raise ShapeError(
                f"the input {name} has shape {tuple(value.shape)} and looks like a list of edges, which number the "
                f"nodes of one graph; with nodes in dimension 1, (batch, nodes, features), use "
                f"shared_inputs=({name!r},); nodes of several graphs in one line have no batch axis: see Graphs in "
                "docs/gotchas.md"
            )


def _is_edge_list(x: Tensor, batch: int) -> bool:
    is_integer = not (x.is_floating_point() or x.is_complex()) and x.element_size() > 1
    return is_integer and x.ndim == 2 and len(x) == 2 and batch != 2
