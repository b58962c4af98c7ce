"""Checks a model's outputs: the batch is in dimension 0, where members can be separated, and gradients have a use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selfdoubt.errors import ConfigError, ShapeError
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


def refuse_training(outputs: Any, inputs: Any) -> None:
    """Make ``backward`` through the answers of a frozen base an error: it has nothing to learn, and members would not.

    Gradients of inputs are free, as for saliency maps.

    Args:
        outputs: The answers.
        inputs: The inputs of the call.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if any(x.requires_grad for x in iter_tensors(inputs)):
        return
    for x in iter_tensors(outputs):
        if x.requires_grad:
            x.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]


def _refuse_gradient(gradient: Tensor) -> None:  # noqa: ARG001
    raise ConfigError(
        "until members are trained the frozen base answers in evaluation mode, and no weight has a gradient; "
        "call wrapped.train() before training"
    )
