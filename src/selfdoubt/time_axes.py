"""Checks that recurrent and attention layers read the rows of all members as rows, not as time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selfdoubt.errors import ShapeError
from selfdoubt.tree import iter_tensors


def find_time_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers that can read dimension 0 as time, with their names: all recurrent layers, as they take one
    sequence without a batch too, and attention with ``batch_first=False``."""
    kinds = (nn.RNNBase, nn.MultiheadAttention)
    layers = ((name, m) for name, m in model.named_modules() if isinstance(m, kinds))
    return [(name, m) for name, m in layers if isinstance(m, nn.RNNBase) or not m.batch_first]


@contextmanager
def check_time_layers(layers: Sequence[tuple[str, nn.Module]], rows: int, members: int) -> Iterator[None]:
    """Check the inputs of layers while the block runs.

    Args:
        layers: Layers from ``find_time_layers``.
        rows: Number of rows of all members.
        members: Number of members; one alone has its rows to itself.
    """
    if torch.compiler.is_compiling() or members == 1:
        yield
        return
    handles = [
        m.register_forward_pre_hook(partial(_check_input, name=name, rows=rows), with_kwargs=True) for name, m in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str, rows: int) -> None:
    """Check one input of a layer.

    Raises:
        ShapeError: If the rows lie along its time.
    """
    x: Tensor | None = next(iter_tensors((args, kwargs)), None)
    is_packed = bool(args) and isinstance(args[0], nn.utils.rnn.PackedSequence)
    if x is None or is_packed or x.ndim not in (2, 3) or (x.ndim == 3 and module.batch_first):
        return
    if len(x) == rows and (x.ndim == 2 or x.shape[1] % rows):
        reads = "one sequence without a batch" if x.ndim == 2 else "time in dimension 0, as batch_first=False has it"
        raise ShapeError(
            f"{name} ({type(module).__name__}) reads {reads}, and got shape {tuple(x.shape)}, where dimension 0 has "
            f"the {rows} rows of all members; give the model its batch in dimension 0, and transpose inside of it or "
            "build the layer with batch_first=True"
        )
