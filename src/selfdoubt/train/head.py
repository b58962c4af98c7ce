"""Losses without logits of a whole batch: the head runs only on the positions of the loss, one piece at a time.

A causal model is its trunk and a head. While the trunk runs, the head is replaced by one that picks the positions that
count and passes their hidden states on; then the head itself runs on a few of them at a time, and the gradient of each
piece is computed with its loss, so that logits are never kept. Operations of a family on its
logits after the head (Gemma's soft cap, Granite's scale) would be lost that way: for these the head sees the chosen
positions only, and their logits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from selfdoubt import risk, sculpt
from selfdoubt.compat import get_output_head
from selfdoubt.errors import WrapError
from selfdoubt.members import Wrapped
from selfdoubt.rows import Replacement
from selfdoubt.train.likelihood import sum_expected_surprisals, sum_surprisals
from selfdoubt.wrapping import innermost

#: Logits of one piece are at most this many numbers (64 MiB in float32); on a GPU, whose products want many rows, more.
PIECE, PIECE_ON_GPU = 2**24, 2**26

#: Settings under which a family changes its logits after the head.
_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_soft_cap", "lm_head_multiplier")


class HeadInput(NamedTuple):
    """Hidden states at the positions that count, for the head; or finished logits."""

    hidden: Float[Tensor, "n d"]
    is_logits: bool


def get_head(model: nn.Module) -> nn.Module:
    """Return the output layer of a causal language model, with its replacement if it has one.

    Raises:
        WrapError: If the model names none.
    """
    head = get_output_head(innermost(model))
    if not isinstance(head, nn.Module):
        raise WrapError(f"{type(innermost(model)).__name__} names no output layer, which training needs")
    return head


def takes_single_positions(head: nn.Module) -> bool:
    """Return whether a head may run on single positions: members and noise in it belong to whole rows."""
    return not isinstance(head, Replacement) or isinstance(head, sculpt.ScaledHead)


def run_trunk(model: nn.Module, inputs: dict[str, Any], chosen: Int[Tensor, " n"], *, training: bool) -> HeadInput:
    """Run a model up to its head on the chosen positions; rows are member-major, or split in training.

    Args:
        model: A causal language model, wrapped or plain.
        inputs: Its inputs.
        chosen: Indices of positions, row after row. They are numbers and no mask, so that the work needs no wait for a
            GPU to count them.
        training: True if a batch is split over the members.
    """
    base, head = innermost(model), get_head(model)
    changes = any(getattr(base.config, name, None) not in (None, 1.0) for name in _AFTER_THE_HEAD)
    if not takes_single_positions(head):
        return HeadInput(_forward(model, inputs, training=training).flatten(0, 1).index_select(0, chosen), True)
    with _choosing_head(head, chosen, runs=changes):
        hidden = _forward(model, inputs, training=training)
    return HeadInput(hidden.flatten(0, 1), changes)


def _forward(model: nn.Module, inputs: dict[str, Any], *, training: bool) -> Tensor:
    output = model.forward_rows(training=training, **inputs)[0] if isinstance(model, Wrapped) else model(**inputs)
    return cast(Tensor, output.logits)


@contextmanager
def _choosing_head(head: nn.Module, chosen: Int[Tensor, " n"], *, runs: bool) -> Iterator[None]:
    """Let the head see only the chosen positions, and pass them on unless it ``runs``."""
    forward_of_head = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        picked = hidden.flatten(0, 1).index_select(0, chosen)[None]
        if runs:
            return forward_of_head(picked, *args, **kwargs)
        if isinstance(head, Replacement):
            head.call.reached = True
        return picked

    head.forward = forward
    try:
        yield
    finally:
        del head.forward  # the class's own shows again


def sum_losses(head_input: HeadInput, head: nn.Module, labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return the sum of the labels' surprisals, nats, of rows that each have one member."""
    if head_input.is_logits:
        return sum_surprisals(head_input.hidden, labels)

    def of_piece(hidden: Tensor, target: Tensor) -> Tensor:
        return sum_surprisals(head(hidden), target)

    return sum_in_pieces(of_piece, head, head_input.hidden, labels, _width(head))


def sum_sculpted_losses(
    head_input: HeadInput, head: nn.Module, labels: Int[Tensor, " n"], *, distribution: Any, draws: int | None
) -> Float[Tensor, ""]:
    """Return the sum of the labels' surprisals under random logits: ``-log E[softmax(y + scale * noise)]``.

    With ``draws`` the expectation is a mean over that many draws of ``distribution.sample`` (Kendall & Gal, 2017, eq.
    12); None takes its closed approximation, see ``sum_expected_surprisals``.
    """
    assert isinstance(head, sculpt.ScaledHead)
    std_per_scale = float(distribution.std((torch.zeros(()), torch.ones(()))))

    def of_piece(hidden: Tensor, target: Tensor) -> Tensor:
        if draws is None:
            return sum_expected_surprisals(head.leaf(hidden), head.raw_scale(hidden), target, std_per_scale)
        y, scale = head.leaf(hidden).float(), head.scale(hidden).float()
        drawn = [distribution.sample((y, scale)).log_softmax(-1).gather(-1, target[:, None]) for _ in range(draws)]
        return -(torch.cat(drawn, -1).logsumexp(-1) - math.log(draws)).sum()

    return sum_in_pieces(of_piece, head, head_input.hidden, labels, _width(head) * (draws or 1))


@torch.no_grad()
def compute_mixture_losses(
    head_input: HeadInput, head: nn.Module, labels: Int[Tensor, " n"], members: int
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Return each label's surprisal under the mean of the members' probabilities, and if it is the most probable."""
    nll, right = [], []
    piece = max(1, PIECE // (_width(head) * members))
    leaf = head.leaf if isinstance(head, sculpt.ScaledHead) else head
    by_member = head_input.hidden.view(members, len(labels), -1)
    for hidden, target in zip(torch.split(by_member, piece, 1), torch.split(labels, piece), strict=True):
        logits = hidden if head_input.is_logits else leaf(hidden)
        mixed = risk.mix(logits.float())
        nll.append(F.cross_entropy(mixed, target, reduction="none"))
        right.append(mixed.argmax(-1) == target)
    return torch.cat(nll), torch.cat(right)


def _width(head: nn.Module) -> int:
    leaf = head.leaf if isinstance(head, Replacement) else head
    return int(getattr(leaf, "out_features", 0)) or len(leaf.get_parameter("weight"))


def sum_in_pieces(
    of_piece: Callable[[Tensor, Tensor], Tensor], head: nn.Module, hidden: Tensor, labels: Tensor, width: int
) -> Tensor:
    """Sum a loss over pieces of the positions, each with its gradient at once, so that no logits are kept.

    Args:
        of_piece: Loss of hidden states and labels.
        head: The layer that it runs; gradients of its parameters that train are summed over the pieces.
        hidden: Hidden states.
        labels: Labels.
        width: Numbers per position that the loss computes; a piece has at most ``PIECE`` or ``PIECE_ON_GPU``.
    """
    trained = [p for p in head.parameters() if p.requires_grad]
    largest = PIECE_ON_GPU if hidden.device.type == "cuda" else PIECE
    total: Tensor = _SumInPieces.apply(of_piece, max(1, largest // width), labels, hidden, *trained)  # type: ignore[no-untyped-call]
    return total


class _SumInPieces(torch.autograd.Function):
    """A sum of losses whose gradients are computed along with it: a piece's logits live until its gradient is known."""

    @staticmethod
    def forward(
        ctx: Any, of_piece: Callable[[Tensor, Tensor], Tensor], piece: int, labels: Tensor, hidden: Tensor,
        *trained: Tensor,
    ) -> Tensor:  # fmt: skip
        needed = ctx.needs_input_grad[3:]
        total = torch.zeros((), device=hidden.device)
        grads: list[Tensor | None] = [torch.empty_like(hidden) if needed[0] else None, *[None] * len(trained)]
        for first in range(0, len(labels), piece):
            part = slice(first, first + piece)
            rows = hidden[part].detach().requires_grad_(needed[0])
            by = [x for x, is_needed in zip((rows, *trained), needed, strict=True) if is_needed]
            with torch.set_grad_enabled(bool(by)):
                loss = of_piece(rows, labels[part])
            total += loss.detach()
            if not by:
                continue
            with torch.autocast(hidden.device.type, enabled=False):  # as in any backward pass
                new = iter(torch.autograd.grad(loss, by))
            if grads[0] is not None:
                grads[0][part] = next(new)
            for i, is_needed in enumerate(needed[1:], 1):
                if is_needed:
                    old = grads[i]
                    grads[i] = next(new) if old is None else old.add_(next(new))
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if grad is None else grad * weight.to(grad.dtype) for grad in ctx.saved_tensors)
        return None, None, None, *scaled
