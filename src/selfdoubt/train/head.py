"""Losses without logits of a whole batch: the head runs only on the positions of the loss, one piece at a time.

A causal model is its trunk and a head. While the trunk runs, the head is replaced by one that picks the positions that
count and passes their hidden states on; then the head itself runs on a few of them at a time, and the gradient of each
piece is computed with it or again in the backward pass, so that logits are never kept. Operations of a family on its
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
from torch.utils.checkpoint import checkpoint

from selfdoubt import risk, sculpt
from selfdoubt.compat import get_output_head
from selfdoubt.errors import WrapError
from selfdoubt.members import Wrapped, innermost
from selfdoubt.rows import Replacement

#: Logits of one piece are at most this many numbers (64 MiB in float32).
PIECE = 2**24

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
        return F.cross_entropy(head_input.hidden.float(), labels, reduction="sum")

    def of_piece(hidden: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), target, reduction="sum")

    return _in_pieces(of_piece, head_input.hidden, labels, _width(head))


def sum_sculpted_losses(
    head_input: HeadInput, head: nn.Module, labels: Int[Tensor, " n"], *, distribution: Any, draws: int | None
) -> Float[Tensor, ""]:
    """Return the sum of the labels' surprisals under random logits: ``-log E[softmax(y + scale * noise)]``.

    With ``draws`` the expectation is a mean over that many draws of ``distribution.sample`` (Kendall & Gal, 2017, eq.
    12); None takes its closed approximation, ``softmax(y / sqrt(1 + pi / 8 * std^2))`` (MacKay, 1992; for several
    classes Lu et al., 2021, "Mean-field approximation to Gaussian-softmax integral").
    """
    assert isinstance(head, sculpt.ScaledHead)

    def of_piece(hidden: Tensor, target: Tensor) -> Tensor:
        y, scale = head.leaf(hidden).float(), head.scale(hidden).float()
        if draws is None:
            std = distribution.std((y, scale))
            return F.cross_entropy(y / (1 + math.pi / 8 * std.square()).sqrt(), target, reduction="sum")
        drawn = [distribution.sample((y, scale)).log_softmax(-1).gather(-1, target[:, None]) for _ in range(draws)]
        return -(torch.cat(drawn, -1).logsumexp(-1) - math.log(draws)).sum()

    return _in_pieces(of_piece, head_input.hidden, labels, _width(head) * (draws or 1))


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


def _in_pieces(of_piece: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, labels: Tensor, width: int) -> Tensor:
    """Sum a loss over pieces; with several, each one's logits are computed again in the backward pass, never kept."""
    piece = max(1, PIECE // width)
    if len(labels) <= piece:
        return of_piece(hidden, labels)
    losses = [
        checkpoint(of_piece, h, t, use_reentrant=False)
        for h, t in zip(torch.split(hidden, piece), torch.split(labels, piece), strict=True)
    ]
    return torch.stack(cast(list[Tensor], losses)).sum()
