"""Pairs predicted scales with a model's outputs by their place in the output, never by shape alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from selfdoubt.errors import WrapError
from selfdoubt.tree import iter_tensors, tree_map

_BASE = "_base"  #: torch's name for the tensor of which another one is a view; graphs read it


def pair_scales(output: Any, scales: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """Return the scales in the structure of a model's output, None where an output has none.

    A scale's place is that of its head's own tensor, or of another view of its values in the same order (``squeeze``,
    ``unflatten``). Where the model has changed the head's output (a soft cap, another dtype), it is the entry
    ``logits``, or the only tensor of the output.

    Args:
        output: A model's output.
        scales: Each head's output and its scale.

    Raises:
        WrapError: If no scale has a place, or one of another shape.
    """
    present = list(iter_tensors(output))
    scales = [_reshape(y, scale, present) for y, scale in scales]
    by_tensor = {id(y): scale for y, scale in scales}
    placed = tree_map(lambda x: by_tensor.get(id(x)) if isinstance(x, Tensor) else None, output)
    identical = {id(x) for x in present}
    changed = [scale for y, scale in scales if id(y) not in identical]
    if not changed:
        return placed
    place = _place_of_changed(output, present)
    if place is not None and id(place) not in by_tensor:
        fitting = [scale for scale in changed if scale.shape == place.shape]
        if len(changed) == 1 and fitting:
            placed = tree_map(lambda x, old: fitting[0] if x is place else old, output, placed)
    if not any(True for _ in iter_tensors(placed)):
        raise WrapError(_explain(output, scales))
    return placed


def _reshape(y: Tensor, scale: Tensor, present: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the one output that holds a head's values in another shape, with the scale in it; the pair as it is, if
    there is none."""
    if any(x is y for x in present):
        return y, scale
    views = [x for x in present if x.numel() == y.numel() and _is_view(x, y)]
    return (views[0], scale.reshape(views[0].shape)) if len(views) == 1 else (y, scale)


def _is_view(x: Tensor, y: Tensor) -> bool:
    """Return True if two tensors of the same number of values are the same values in the same order."""
    if not (x.is_contiguous() and y.is_contiguous()) or x.dtype != y.dtype:
        return False
    if torch.compiler.is_compiling():  # a graph knows views, and no memory
        roots = getattr(x, _BASE), getattr(y, _BASE)
        return (x if roots[0] is None else roots[0]) is (y if roots[1] is None else roots[1])
    return x.data_ptr() == y.data_ptr()


def _place_of_changed(output: Any, present: Sequence[Tensor]) -> Tensor | None:
    """Return the output tensor that a head's output became, or None where it could be several."""
    logits = output.get("logits") if isinstance(output, Mapping) else None
    if isinstance(logits, Tensor):
        return logits
    return present[0] if len(present) == 1 else None


def _explain(output: Any, scales: Sequence[tuple[Tensor, Tensor]]) -> str:
    given, present = [tuple(scale.shape) for _, scale in scales], [tuple(x.shape) for x in iter_tensors(output)]
    if set(given) & set(present):
        return (
            f"the wrapped head gives {given}, and none of the outputs {present} is its own tensor, so it cannot be "
            "known which of them it became; return the head's output as it is, or as the entry logits"
        )
    return (
        f"the wrapped head gives {given}, and no output has that shape: {present}; "
        "name the last layer with param_filter"
    )
