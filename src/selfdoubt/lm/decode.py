"""The token loop, on ids alone: no text, no model library.

``read`` scores a prompt while it is read; ``decode`` chooses the next tokens. All members follow the same tokens, those
of the mean distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt import risk
from selfdoubt.errors import ConfigError
from selfdoubt.lm.states import StatePool
from selfdoubt.lm.stepper import Logits, Stepper

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 takes the most probable token; above 0 sharpens or flattens the mean distribution.
        top_p: Draw from the smallest set of tokens that holds this share of probability, in (0, 1].
        max_tokens: Most tokens of an answer, at least 1.
        stop_ids: Tokens that end an answer; they are not part of it.
        alternatives: How many of the most probable tokens are told with each token.

    Raises:
        ConfigError: If a setting is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_ids: frozenset[int] = frozenset()
    alternatives: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be finite and at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.alternatives < 0:
            raise ConfigError(f"alternatives must not be negative, got {self.alternatives}")


class ScoredId(NamedTuple):
    """A token id with its scores (see ``risk.TokenScores``) and the most probable ids in its place."""

    id: int
    logprob: float
    total: float
    aleatoric: float
    epistemic: float
    disagreement: float
    spread: float
    scale: float | None
    alternatives: tuple[tuple[int, float], ...]  #: (id, log-probability), the most probable first


class Event(NamedTuple):
    """One step of one sequence: a token, or the end."""

    sequence: int
    token: ScoredId | None
    finish: Finish | None
    states: Float[Tensor, "layers width"] | None = None  #: hidden states in which this was chosen


def read(
    stepper: Stepper, prompts: Sequence[Sequence[int]], alternatives: int = 0, pool: StatePool | None = None
) -> tuple[list[list[ScoredId | None]], Logits]:
    """Read prompts and score every token of them but the first, which nothing predicts (None).

    Args:
        stepper: Fresh, or done with what it read before.
        prompts: Token ids.
        alternatives: How many of the most probable tokens are told with each token.
        pool: Takes the hidden states, where the stepper has them.

    Returns:
        The scored tokens of each prompt, and what comes next, ``(members, batch, classes)``.
    """
    width = max(len(p) for p in prompts)
    scored: list[list[ScoredId | None]] = [[None] for _ in prompts]
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    last: Logits | None = None
    for first, piece in stepper.start(prompts):
        columns = piece.logits.shape[2]
        # Column c predicts the token at c + 1; the last column of all predicts the first new token.
        known = min(columns, width - 1 - first)
        if known > 0:
            chosen = ids[:, first + 1 : first + 1 + known].to(piece.logits.device)
            now = piece.at(slice(known))
            for sequence, tokens in enumerate(_scored(now, chosen, risk.mix(now.logits), alternatives)):
                start = width - len(prompts[sequence])
                scored[sequence] += [t for c, t in enumerate(tokens) if first + c >= start]
        if pool is not None and piece.states is not None:
            pool.add(first, piece.states[0])
        last = piece.at(-1)
    assert last is not None
    return scored, last


def follow(
    stepper: Stepper,
    following: Logits,
    texts: Sequence[Sequence[int]],
    alternatives: int = 0,
    pool: StatePool | None = None,
) -> list[list[ScoredId]]:
    """Score a text after each prompt that was read. No token can be chosen afterwards.

    Args:
        stepper: Has read the prompts.
        following: What comes next after the prompts.
        texts: Token ids, at least one for each prompt.
        alternatives: How many of the most probable tokens are told with each token.
        pool: Takes the hidden states in which the texts' tokens but the first are predicted, right-padded.
    """
    width = max(len(t) for t in texts)
    ids = torch.tensor([list(t) + [0] * (width - len(t)) for t in texts]).to(following.logits.device)
    found = _scored(following.at(None), ids[:, :1], risk.mix(following.logits)[:, None], alternatives)
    # The last token predicts nothing that is asked for.
    for first, piece in stepper.extend([t[:-1] for t in texts]) if width > 1 else ():
        if pool is not None and piece.states is not None:
            pool.add(first, piece.states[0])
        chosen = ids[:, first + 1 : first + 1 + piece.logits.shape[2]]
        for tokens, more in zip(found, _scored(piece, chosen, risk.mix(piece.logits), alternatives), strict=True):
            tokens += more
    return [tokens[: len(text)] for tokens, text in zip(found, texts, strict=True)]


def decode(
    stepper: Stepper,
    following: Logits,
    lengths: Sequence[int],
    sampling: Sampling,
    seeds: Sequence[int],
    closed: Set[int] = frozenset(),
) -> Iterator[Event]:
    """Choose tokens until every sequence has ended.

    Args:
        stepper: Has read the prompts.
        following: What comes next after the prompts.
        lengths: Tokens in each prompt.
        sampling: How tokens are chosen.
        seeds: One for each sequence: its draws depend on its own seed only, not on the batch around it.
        closed: Sequences that whoever reads the events wants no more of; looked at after each event.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    alive = list(range(len(lengths)))
    room = [min(sampling.max_tokens, (stepper.context or 2**62) - n) for n in lengths]
    done = 0
    while True:
        draws = [torch.rand((), generator=generators[s], dtype=torch.float64) for s in alive]
        mixed = risk.mix(following.logits)
        chosen = choose(mixed, sampling, torch.stack(draws))
        ids = chosen.tolist()
        now = following.at(None)
        tokens = _scored(now, chosen[:, None], mixed[:, None], sampling.alternatives)
        done += 1
        survivors = []
        for position, sequence in enumerate(alive):
            states = None if following.states is None else following.states[0, position]
            if ids[position] in sampling.stop_ids:
                yield Event(sequence, None, "stop", states)
                continue
            ends = done >= room[sequence]
            yield Event(sequence, tokens[position][0], "length" if ends else None, states)
            if not ends and sequence not in closed:
                survivors.append(position)
        if not survivors:
            return
        if len(survivors) < len(alive):
            stepper.keep(survivors)
            alive = [alive[p] for p in survivors]
            chosen = chosen[survivors]
        following = stepper.step(chosen)


def choose(
    logits: Float[Tensor, "batch classes"], sampling: Sampling, uniform: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The next token of each sequence: the most probable, or by inverting the distribution function at ``uniform``."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # Less the largest first: then the coldest temperature gives infinity in the right direction only.
    probs = ((logits - logits.amax(-1, keepdim=True)).double() / sampling.temperature).softmax(-1)
    ordered, order = probs.sort(stable=True, dim=-1, descending=True)
    below = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(below >= sampling.top_p, 0)
    cumulative = ordered.cumsum(-1)
    target = uniform.to(cumulative.device)[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp_max(logits.shape[-1] - 1)
    drawn: Tensor = order.gather(-1, index).squeeze(-1)
    return drawn


def _scored(
    following: Logits, chosen: Int[Tensor, "batch t"], mixed: Float[Tensor, "batch t classes"], alternatives: int
) -> list[list[ScoredId]]:
    """Scores of chosen tokens, moved to the host in one go."""
    scores = risk.token_scores(following.logits, chosen)
    columns = [s.double() for s in scores]
    if following.scale is not None:
        index = chosen[None, ..., None].expand(len(following.scale), -1, -1, 1)
        columns.append(following.scale.gather(-1, index).squeeze(-1).double().square().mean(0).sqrt())
    if alternatives:
        top = mixed.topk(min(alternatives, mixed.shape[-1]), -1)
        # The log-normaliser without a second pass over the classes: the chosen token's logit less its log-probability.
        normaliser = mixed.gather(-1, chosen[..., None]).double() - scores.logprob[..., None].double()
        columns += [*top.indices.double().unbind(-1), *(top.values.double() - normaliser).unbind(-1)]
    table = torch.stack([*columns, chosen.double()], -1).tolist()
    has_scale = following.scale is not None

    def token(row: list[float]) -> ScoredId:
        named = dict(zip(risk.TokenScores._fields, row, strict=False))
        rest = row[len(named) + has_scale : -1]
        half = len(rest) // 2
        options = tuple((int(i), p) for i, p in zip(rest[:half], rest[half:], strict=True))
        return ScoredId(id=int(row[-1]), **named, scale=row[len(named)] if has_scale else None, alternatives=options)

    return [[token(row) for row in rows] for rows in table]
