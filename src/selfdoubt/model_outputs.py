"""Checks that a model's output has the batch in dimension 0, where members can be separated."""

from __future__ import annotations

from typing import Any

from selfdoubt.errors import ShapeError
from selfdoubt.tree import iter_tensors


def check_batch_axis(output: Any, rows: int, members: int) -> None:
    """Check that one of the outputs, at least, has one entry per row.

    Args:
        output: The output of a run on all members' rows.
        rows: Number of rows.
        members: Number of members in them, with the base model.

    Raises:
        ShapeError: If none has: then no output would have a risk, and members would be mixed within it.
    """
    shapes = [tuple(tensor.shape) for tensor in iter_tensors(output)]
    if any(shape[:1] == (rows,) for shape in shapes):
        return
    given = f"shapes {shapes}" if shapes else f"{type(output).__name__}, in which there is no tensor"
    raise ShapeError(
        f"the {rows} rows of {members} members must be in dimension 0 of an output, and the model gives {given}; "
        "return one entry per row of the batch, and compute losses or sums over it outside"
    )
