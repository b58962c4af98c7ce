"""Linear layers on three rows in float32 on a CPU, where the usual product takes two to three times as long as on one.

Three rows are a token of three voters. The transposed product takes 0.75 of the time on the whole at 135 million
parameters, and 0.9 at the layers of a billion; for two, four or five rows it depends on the width which is faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selfdoubt.members import Wrapped

#: The number of rows for which the transposed product is faster.
_ROWS = 3


def multiply_few_rows(
    x: Float[Tensor, "*rows width"], weight: Float[Tensor, "out width"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*rows out"]:
    """Return ``F.linear``; of three rows as the transpose of ``weight @ x.T``, equal up to rounding."""
    if x.shape[:-1].numel() != _ROWS or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return F.linear(x, weight, bias)
    y = torch.mm(weight, x.reshape(-1, x.shape[-1]).T).T
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], len(weight))


def find_linears(model: nn.Module) -> list[nn.Linear]:
    """Return the plain linear layers in float32 on a CPU; none where the model runs as one graph."""
    modules = list(model.modules())
    if any(isinstance(module, Wrapped) and module.spec.compile for module in modules):
        return []
    layers = [module for module in modules if type(module) is nn.Linear and "forward" not in vars(module)]
    return [x for x in layers if x.weight.dtype == torch.float32 and x.weight.device.type == "cpu"]


@contextmanager
def use_few_rows(layers: Sequence[nn.Linear], rows: int) -> Iterator[None]:
    """Let linear layers run by ``multiply_few_rows`` within the block, if it is for this number of rows."""
    layers = layers if rows == _ROWS else []

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        return multiply_few_rows(x, layer.weight, layer.bias)

    for layer in layers:
        layer.forward = partial(forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)  # the class's own shows again
