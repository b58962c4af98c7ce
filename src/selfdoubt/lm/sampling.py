"""The choice of the next tokens: greedy, or drawn from the most probable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.distributions import Distributions
from selfdoubt.errors import ConfigError
from selfdoubt.lm import defaults

#: Draws that a batch needs: none, plain ones, or also ones with a ``top_p``, which cost a sort.
Draws = Literal["greedy", "drawn", "top_p"]


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
    answer: Distributions, samplings: Sequence[Sampling], uniform: Float[Tensor, " batch"] | None
) -> Int[Tensor, " batch"]:
    """Choose the next token of each sequence: the most probable, or that at ``uniform`` of the distribution function.

    Args:
        answer: The distributions that answer, ``(batch, classes)``.
        samplings: Settings of each sequence.
        uniform: Draws in [0, 1), float64; ignored where the temperature is 0, and None where all are.
    """
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not drawn:
        return answer.top
    assert uniform is not None
    logits, chosen = answer.centred, answer.top.clone()
    # Sorting the classes costs most, and only a top_p needs it. A row's draw must not depend on the rows around it.
    for sorts in (False, True):
        rows = [row for row in drawn if (samplings[row].top_p < 1) == sorts]
        if rows:
            settings = uniform.new_tensor([[samplings[row].temperature, samplings[row].top_p] for row in rows])
            draws = uniform[rows].to(logits.device)
            settings = settings.to(logits.device)
            chosen[rows] = _draw(logits[rows], settings[:, 0], settings[:, 1] if sorts else None, draws)
    return chosen


def find_draws(samplings: Sequence[Sampling]) -> Draws:
    """Return the kind of draws that sequences with these settings need together."""
    drawn = [sampling for sampling in samplings if sampling.temperature > 0]
    if not drawn:
        return "greedy"
    return "top_p" if any(sampling.top_p < 1 for sampling in drawn) else "drawn"


def choose_on_device(
    answer: Distributions,
    temperature: Float[Tensor, " batch"],
    top_p: Float[Tensor, " batch"],
    uniform: Float[Tensor, " batch"],
    draws: Draws,
) -> Int[Tensor, " batch"]:
    """Choose the tokens that ``choose_tokens`` chooses, with the settings in tensors: nothing depends on their values.

    Logits that are not numbers give any token, and no error.

    Args:
        answer: The distributions that answer, ``(batch, classes)``.
        temperature: Temperature of each row, float64.
        top_p: Share of probability of each row, float64.
        uniform: Draws in [0, 1), float64.
        draws: Kind of draws that the rows need, see ``find_draws``.
    """
    if draws == "greedy":
        return answer.top
    logits = answer.centred
    is_drawn = temperature > 0
    safe = torch.where(is_drawn, temperature, 1.0)
    drawn = _draw(logits, safe, None, uniform)
    if draws == "top_p":
        drawn = torch.where(top_p < 1, _draw(logits, safe, top_p, uniform), drawn)
    return torch.where(is_drawn, drawn, answer.top)


def _draw(
    logits: Float[Tensor, "batch classes"],
    temperature: Float[Tensor, " batch"],
    top_p: Float[Tensor, " batch"] | None,
    uniform: Float[Tensor, " batch"],
) -> Int[Tensor, " batch"]:
    """Draw a token of each row, from the most probable ones where there is a ``top_p``."""
    # In float64 first: a difference in bfloat16 is another distribution. And less the largest: then the coldest
    # temperature gives infinity in the right direction only.
    wide = logits.double()
    probs = ((wide - wide.amax(-1, keepdim=True)) / temperature[:, None]).softmax(-1)
    order = None
    if top_p is not None:
        probs, order = probs.sort(stable=True, dim=-1, descending=True)
        below = probs.cumsum(-1) - probs
        probs = probs.masked_fill(below >= top_p[:, None], 0)
    cumulative = probs.cumsum(-1)
    whole = cumulative[:, -1:]
    # Strictly below the whole, whatever the rounding: then the place that is found has a probability.
    target = torch.minimum(uniform[:, None] * whole, whole.nextafter(torch.zeros_like(whole)))
    # The last place is for NaN, which has none.
    index = torch.searchsorted(cumulative, target, right=True).clamp_max(logits.shape[-1] - 1)
    drawn: Tensor = (index if order is None else order.gather(-1, index)).squeeze(-1)
    return drawn
