"""Tables of token scores: computed where the logits are, without waiting for them, and read on the host in one go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt import risk
from selfdoubt.lm.scores import ANSWER_SIGNALS
from selfdoubt.lm.step_output import StepOutput


class ScoredId(NamedTuple):
    """A token id with its scores (see ``risk.TokenScores``) and the most probable ids in its place."""

    id: int
    logprob: float
    total: float
    aleatoric: float
    epistemic: float
    disagreement: float
    spread: float
    scale: float | None = None
    gap: float = 0.0  #: log-probability of the most probable id less this one's, nats, >= 0; 0 for ids of a prompt
    alternatives: tuple[tuple[int, float], ...] = ()  #: (id, log-probability), the most probable first
    divergence: float | None = None
    margin: float | None = None  #: None for ids of a prompt, as the following
    self_certainty: float | None = None
    layer_disagreement: float | None = None
    density: float | None = None
    relative_density: float | None = None


@dataclass(frozen=True)
class TokenTable:
    """Scores of the tokens of a batch: one tensor of numbers, and the names of its columns."""

    #: The id, the scores by name, the ids of the alternatives and their log-probabilities, float64.
    numbers: Float[Tensor, "batch t columns"]
    names: tuple[str, ...]  #: fields of ``ScoredId``, one per score
    alternatives: int = 0  #: number of alternatives per token


def tabulate(
    step: StepOutput,
    chosen: Int[Tensor, "batch t"],
    alternatives: int,
    mixed: Float[Tensor, "batch t classes"] | None = None,
) -> TokenTable:
    """Compute the scores of chosen tokens on the device of the logits.

    Nothing waits for the device, and no shape or branch depends on a value: a CUDA graph can capture it, and
    ``torch.compile`` can trace it as one graph. So logits that are NaN or infinite are no error here: they make the
    ``total`` or ``aleatoric`` of their position NaN, and ``read_table`` raises.

    Args:
        step: Logits of the positions where the tokens were chosen.
        chosen: The chosen ids.
        alternatives: Number of the most probable tokens that come with each token.
        mixed: The mixture of the logits, if it is computed already; without it the ids are a prompt's, whose
            distributions are not scored.

    Raises:
        ShapeError: If the logits have no member axis.
    """
    has_base, is_answer = step.has_base, mixed is not None
    options: Tensor | None = None
    others: Tensor | None = None
    if alternatives:
        mixed = step.mixture if mixed is None else mixed
        options = mixed.topk(min(alternatives, mixed.shape[-1]), -1).indices
    confidence: dict[str, Tensor] = {}
    if is_answer and mixed is not None:
        confidence["gap"] = mixed.amax(-1) - mixed.gather(-1, chosen[..., None]).squeeze(-1)
        scores, sure, others = risk.score_answer_tokens(
            step.logits, chosen, mixed, options, has_base=has_base, check=False
        )
        confidence |= dict(zip(risk.ConfidenceScores._fields, sure, strict=True))
    elif options is not None and mixed is not None:
        scores, others = risk.score_among(step.logits, chosen, options, mixed, has_base=has_base, check=False)
    else:
        scores = risk.token_scores(step.logits, chosen, has_base=has_base, check=False)
    columns = {n: x for n, x in zip(risk.TokenScores._fields, scores, strict=True) if x is not None}
    if step.scale is not None:
        index = chosen[None, ..., None].expand(len(step.scale), -1, -1, 1)
        columns["scale"] = step.scale.gather(-1, index).squeeze(-1).double().square().mean(0).sqrt()
    columns |= confidence
    columns |= {name: x[0] for name, x in step.signals.items() if is_answer or name not in ANSWER_SIGNALS}
    numbers = torch.stack([chosen.double(), *(column.double() for column in columns.values())], -1)
    if options is not None and others is not None:
        numbers = torch.cat([numbers, options.double(), others], -1)
    return TokenTable(numbers, tuple(columns), 0 if options is None else options.shape[-1])


def read_table(table: TokenTable) -> list[list[ScoredId]]:
    """Copy a table to the host in one go, and return its tokens, ``(batch, t)``.

    Raises:
        NonFiniteError: If logits were NaN or infinite.
    """
    numbers = table.numbers.cpu()
    entropies = [1 + place for place, name in enumerate(table.names) if name in ("total", "aleatoric")]
    risk.check_finite(numbers[..., entropies].sum(-1))
    first, half = 1 + len(table.names), table.alternatives

    def read(row: list[float]) -> ScoredId:
        named: dict[str, Any] = dict(zip(table.names, row[1:first], strict=True))
        pairs = zip(row[first : first + half], row[first + half :], strict=True)
        return ScoredId(int(row[0]), **named, alternatives=tuple((int(i), p) for i, p in pairs))

    return [[read(row) for row in rows] for rows in numbers.tolist()]


def score_ids(
    step: StepOutput,
    chosen: Int[Tensor, "batch t"],
    alternatives: int,
    mixed: Float[Tensor, "batch t classes"] | None = None,
) -> list[list[ScoredId]]:
    """Return the scores of chosen tokens, moved to the host in one go. The arguments are those of ``tabulate``.

    Raises:
        ShapeError: If the logits have no member axis.
        NonFiniteError: If a logit is NaN or infinite.
    """
    return read_table(tabulate(step, chosen, alternatives, mixed))
