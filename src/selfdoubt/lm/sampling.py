"""The choice of the next tokens: greedy, or drawn from the most probable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.errors import ConfigError
from selfdoubt.lm import defaults


@dataclass(frozen=True)
class Sampling:
    """Settings of the choice of tokens.

    Args:
        temperature: 0 takes the most probable token; above 0 sharpens or flattens the mean distribution.
        top_p: Draw from the smallest set of tokens that holds this share of probability, in (0, 1].
        max_tokens: Most tokens of an answer, at least 1.
        stop_ids: Tokens that end an answer; they are not part of it.
        alternatives: Number of the most probable tokens that come with each token.

    Raises:
        ConfigError: If a setting is out of range.
    """

    temperature: float = defaults.TEMPERATURE
    top_p: float = defaults.TOP_P
    max_tokens: int = defaults.MAX_TOKENS
    stop_ids: frozenset[int] = frozenset()
    alternatives: int = defaults.ALTERNATIVES

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.alternatives < 0:
            raise ConfigError(f"alternatives must not be negative, got {self.alternatives}")


def choose_tokens(
    logits: Float[Tensor, "batch classes"], samplings: Sequence[Sampling], uniform: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """Choose the next token of each sequence: the most probable, or that at ``uniform`` of the distribution function.

    Args:
        logits: Logits of the mean distribution.
        samplings: Settings of each sequence.
        uniform: Draws in [0, 1), float64; ignored where the temperature is 0.
    """
    chosen = logits.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    # Sorting the classes costs most, and only a top_p needs it. A row's draw must not depend on the rows around it.
    for sorts in (False, True):
        rows = [row for row in drawn if (samplings[row].top_p < 1) == sorts]
        if rows:
            chosen[rows] = _drawn(logits[rows], [samplings[row] for row in rows], uniform[rows].to(logits.device))
    return chosen


def _drawn(
    logits: Float[Tensor, "batch classes"], samplings: Sequence[Sampling], uniform: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """Draw for rows that all have a ``top_p`` below 1, or all have none."""
    settings = uniform.new_tensor([[s.temperature, s.top_p] for s in samplings])
    temperature, top_p = settings[:, :1], settings[:, 1:]
    # In float64 first: a difference in bfloat16 is another distribution. And less the largest: then the coldest
    # temperature gives infinity in the right direction only.
    wide = logits.double()
    probs = ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)
    order = None
    if samplings[0].top_p < 1:
        probs, order = probs.sort(stable=True, dim=-1, descending=True)
        below = probs.cumsum(-1) - probs
        probs = probs.masked_fill(below >= top_p, 0)
    cumulative = probs.cumsum(-1)
    whole = cumulative[:, -1:]
    # Strictly below the whole, whatever the rounding: then the place that is found has a probability.
    target = torch.minimum(uniform[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
    index = torch.searchsorted(cumulative, target, right=True)
    drawn: Tensor = (index if order is None else order.gather(-1, index)).squeeze(-1)
    return drawn
