"""Surprisals of labels under logits, plain or with a predicted spread, and their gradients, in one pass over memory.

Written with torch's operations, a likelihood over a vocabulary reads and writes its logits a dozen times, which takes
longer than the products around it. Here loss and gradient of a few rows are computed together, in float32, in a buffer
that stays in the processor's cache; only the gradient leaves it, in the dtype of the logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Numbers of a block on a CPU: five buffers of them fit a core's second-level cache. A GPU takes all rows at once.
BLOCK_NUMBERS = 2**16


def sum_surprisals(logits: Float[Tensor, "n classes"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the sum of the labels' surprisals, nats: ``F.cross_entropy(logits.float(), labels, reduction="sum")``."""
    total: Tensor = _Surprisals.apply(logits, None, labels, 0.0)  # type: ignore[no-untyped-call]
    return total


def sum_expected_surprisals(
    logits: Float[Tensor, "n classes"],
    raw_scales: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    std_per_scale: float,
) -> Float[Tensor, ""]:
    """Return the sum of the labels' surprisals under random logits, nats.

    They are those of ``softmax(y / sqrt(1 + pi / 8 * std^2))``, the closed approximation of an expected softmax
    (MacKay, 1992; for several classes Lu et al., 2021, "Mean-field approximation to Gaussian-softmax integral").

    Args:
        logits: Means y.
        raw_scales: Scales before their softplus.
        labels: Classes.
        std_per_scale: Standard deviation of the distribution of scale 1: 1 for a normal one, ``sqrt(2)`` for Laplace's.
    """
    total: Tensor = _Surprisals.apply(logits, raw_scales, labels, std_per_scale)  # type: ignore[no-untyped-call]
    return total


class _Surprisals(torch.autograd.Function):
    """The sum of surprisals of ``softmax(r y)``, ``r = 1 / sqrt(1 + c std^2)``, ``std = k softplus(s)``.

    With p the softmax minus the label's one-hot vector,

        d/dy = p r,        d/ds = -c k p r^3 y std sigmoid(s).
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor | None, labels: Tensor, k: float) -> Tensor:
        total = torch.zeros((), device=y.device)
        has_grad = any(ctx.needs_input_grad[:2])
        grads = [None if x is None or not has_grad else torch.empty_like(x) for x in (y, s)]
        rows = max(1, BLOCK_NUMBERS // y.shape[1]) if y.device.type == "cpu" else max(1, len(y))
        buffers: list[Tensor] = []
        for first in range(0, len(y), rows):
            part = slice(first, first + rows)
            total += _run_block(
                y[part], None if s is None else s[part], labels[part, None], k,
                [None if g is None else g[part] for g in grads], buffers,
            )  # fmt: skip
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dy, ds = (None if grad is None else grad * weight.to(grad.dtype) for grad in ctx.saved_tensors)
        return dy, ds, None, None


def _run_block(
    y: Tensor, s: Tensor | None, labels: Tensor, k: float, grads: list[Tensor | None], buffers: list[Tensor]
) -> Tensor:
    """Return the sum over some rows, and write their gradients; buffers are made at the first call, and kept."""
    if not buffers or buffers[0].shape != y.shape:
        buffers[:] = [torch.empty(y.shape, device=y.device) for _ in range(1 if s is None else 4)]
    z = buffers[0].copy_(y)
    if s is not None:
        raw, std, r = (buffer for buffer in buffers[1:])
        torch.logaddexp(raw.copy_(s), raw.new_zeros(()), out=std)  # softplus
        std.add_(torch.finfo(std.dtype).tiny).mul_(k)
        torch.mul(std, std, out=r).mul_(_C).add_(1).rsqrt_()
        z.mul_(r)
    highest = z.amax(-1, keepdim=True)
    at_label = z.gather(1, labels)
    dy, ds = grads
    if dy is None:
        return (z.sub_(highest).exp_().sum(-1, keepdim=True).log_() + highest - at_label).sum()
    if s is not None:
        # -c k r^2 y std sigmoid(s), to be multiplied by p r; r y is z.
        slope = raw.sigmoid_().mul_(std).mul_(z).mul_(r).mul_(-_C * k)
    p = z.sub_(highest).exp_()
    mass = p.sum(-1, keepdim=True)
    p.div_(mass)
    p.scatter_add_(1, labels, torch.full_like(mass, -1.0))
    if ds is not None:
        p.mul_(r)
        ds.copy_(slope.mul_(p))
    dy.copy_(p)
    return (mass.log_() + highest - at_label).sum()


_C = math.pi / 8
