"""Disagreement of late layers: the model's last hidden states, read by its own head before it is done with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selfdoubt.compat import get_output_head
from selfdoubt.density import MeasuredLeaf
from selfdoubt.distributions import find_top
from selfdoubt.lm.hidden_states import OutputRecorder, find_decoder_layers
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.rows import expand

#: Tokens that are compared, the most probable ones.
TOKENS = 32
#: Depths of the layers that are compared with the output, as shares of all layers.
DEPTHS = (3 / 4, 5 / 6, 11 / 12)
#: Rows of the head that are gathered at a time are at most this many numbers.
_CHUNK = 2**22


def jensen_shannon(
    first: Float[Tensor, "*batch classes"], second: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    """Return the Jensen-Shannon divergence of two distributions, given as log-probabilities, in [0, log 2] nats.

    Example:
        >>> torch.set_printoptions(precision=4)
        >>> jensen_shannon(torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0]))
        tensor(0.6931)
    """
    middle = torch.logaddexp(first, second) - math.log(2)
    sides = [(p.exp() * (p - middle)).masked_fill(p == -torch.inf, 0).sum(-1) for p in (first, second)]
    return ((sides[0] + sides[1]) / 2).clamp(0, math.log(2))


class LateLayerProbe:
    """A probe of late layers, see ``step_output.Probe``: the signal ``layer_disagreement``.

    At each position it is the Jensen-Shannon divergence between two distributions over the 32 most probable tokens: the
    model's, and the one that its norm and head give for a late layer's hidden states; the mean over some late layers.
    (Chuang et al., 2024, "DoLa", compare layers by the same divergence, over all tokens.) Members are averaged first.

    At its first reading it compares the head's logits of the last layer with the model's. Where they differ, the model
    does more behind its layers than a norm and a head, and the signal is absent.

    Args:
        layers: Late decoder layers, and the last one.
        norm: The norm between the last layer and the head.
        head: The head.
    """

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module, head: nn.Linear) -> None:
        self._layers = list(layers)
        self._norm = norm
        self._head = head
        self._fits: bool | None = None  #: None until a first reading
        self._all, self._late = OutputRecorder(self._layers), OutputRecorder(self._layers[:-1])
        self._columns = 0

    @contextmanager
    def capture(self, columns: int, places: Int[Tensor, " batch"] | None = None) -> Iterator[None]:  # noqa: ARG002
        """Record the last ``columns`` positions while the model runs; see ``step_output.Probe``."""
        self._columns = columns
        if self._fits is False:
            yield
            return
        with (self._all if self._fits is None else self._late).record():
            yield

    def read(self, output: StepOutput) -> StepOutput:
        """Return the output with the signal."""
        outputs = [] if self._fits is False else (self._all if self._fits is None else self._late).take()
        captured = [x[:, -self._columns :].detach() for x in outputs if isinstance(x, Tensor) and x.ndim == 3]
        members, batch, t = output.logits.shape[:3]
        if len(captured) < len(self._layers) - 1 or any(len(x) not in (batch, members * batch) for x in captured):
            return output
        if output.has_base:
            captured, members = [x[:batch] for x in captured], 1
        captured = [expand(x, members * batch // len(x)) for x in captured]  # below a late fork members are one row
        states = self._norm(torch.stack(captured))
        states = states.view(len(captured), members, batch, *states.shape[2:])
        columns = states.shape[3]
        logits = output.logits[:members, :, -columns:]
        pieces = []
        size = max(1, _CHUNK // (batch * TOKENS * states.shape[-1]))
        for first in range(0, columns, size):
            span = slice(first, first + size)
            mean = logits[0, :, span] if members == 1 else logits[:, :, span].float().mean(0)
            ids = find_top(mean, min(TOKENS, logits.shape[-1]))
            rows = self._head.weight[ids]
            late = torch.einsum("lmbcw,bckw->lmbck", states[:, :, :, span], rows).float()
            if self._head.bias is not None:
                late = late + self._head.bias[ids].float()
            final = logits[:, :, span].gather(-1, ids.expand(members, *ids.shape)).float()
            if self._fits is None:
                self._fits = _agree(late[-1], final)
            if not self._fits:
                return output
            late_logp = _mean_distribution(late[: len(self._layers) - 1])
            pieces.append(jensen_shannon(_mean_distribution(final).expand_as(late_logp), late_logp).mean(0))
        signal = torch.cat(pieces, -1)[None]
        if columns < t:  # tokens of a prompt do not take this signal
            signal = torch.cat([signal.new_full((1, batch, t - columns), math.nan), signal], -1)
        return replace(output, signals={**output.signals, "layer_disagreement": signal})


def _mean_distribution(logits: Float[Tensor, "*layers members batch t classes"]) -> Tensor:
    """Return log-probabilities of the members' mean."""
    logp = logits.log_softmax(-1)
    members = logp.shape[-4]
    return logp.squeeze(-4) if members == 1 else logp.logsumexp(-4) - math.log(members)


def _agree(mine: Tensor, theirs: Tensor) -> bool:
    """Return whether logits are equal, up to a constant and the rounding of bfloat16."""
    difference = (mine - mine.mean(-1, keepdim=True)) - (theirs - theirs.mean(-1, keepdim=True))
    return bool(difference.abs().max() <= 0.02 * theirs.abs().max() + 1e-3)


def find_late_layers(base: nn.Module) -> LateLayerProbe | None:
    """Build the probe of a Hugging Face causal language model; None without a norm and a plain head."""
    head = get_output_head(base)
    while isinstance(head, MeasuredLeaf):  # a density changes nothing of its layer
        head = head.leaf
    stack = find_decoder_layers(base)
    owner = next(module for module in base.modules() if any(child is stack for child in module.children()))
    norms = [child for child in owner.children() if "norm" in type(child).__name__.lower()]
    last = len(stack) - 1
    places = sorted({int(depth * len(stack)) for depth in DEPTHS} - {last})
    if type(head) is not nn.Linear or not head.weight.is_floating_point() or len(norms) != 1 or not places:
        return None
    return LateLayerProbe([*(stack[place] for place in places), stack[last]], norms[0], head)
