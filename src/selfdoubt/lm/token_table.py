"""Tables of token scores: computed where the logits are, without waiting for them, and read on the host in one go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt import risk
from selfdoubt.distributions import find_top, wide_dtype
from selfdoubt.lm.scores import ANSWER_SIGNALS
from selfdoubt.lm.step_output import StepOutput

#: Logits of a block of positions on a CPU are about this many numbers (2 MiB in float32).
_BLOCK = 2**19


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
    gap: float = 0.0  #: log-probability of the most probable id less this one's, nats; 0 for a prompt's without others
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

    @property
    def entropies(self) -> Float[Tensor, "batch t k"]:
        """The columns that are NaN or infinite wherever a logit is."""
        return self.numbers[..., [1 + i for i, name in enumerate(self.names) if name in ("total", "aleatoric")]]


def tabulate(
    step: StepOutput,
    chosen: Int[Tensor, "batch t"],
    alternatives: int,
    mixed: Float[Tensor, "batch t classes"] | None = None,
    *,
    is_answer: bool | None = None,
) -> TokenTable:
    """Compute the scores of chosen tokens on the device of the logits.

    Nothing waits for the device, and no shape or branch depends on a value: a CUDA graph can capture it, and
    ``torch.compile`` can trace it as one graph. So logits that are NaN or infinite are no error here: they make the
    ``total`` or ``aleatoric`` of their position NaN, and ``read_table`` raises.

    On a CPU it works on a few positions at a time, so that their logits stay in the cache from pass to pass.

    Args:
        step: Logits of the positions where the tokens were chosen.
        chosen: The chosen ids.
        alternatives: Number of the most probable tokens that come with each token.
        mixed: The mixture of the logits, if it is computed already.
        is_answer: True scores the distributions, too, as an answer's tokens take it and a prompt's do not. None: True
            if there is a mixture.

    Raises:
        ShapeError: If the logits have no member axis.
    """
    is_answer = mixed is not None if is_answer is None else is_answer
    members, batch, t, classes = step.logits.shape
    size = batch * t if step.logits.device.type != "cpu" else max(1, _BLOCK // (members * classes))
    logits, scale = step.logits.flatten(1, 2), None if step.scale is None else step.scale.flatten(1, 2)
    ids, mixed = chosen.flatten(), None if mixed is None else mixed.flatten(0, 1)
    columns: dict[str, Tensor] = {}
    tables = []
    for first in range(0, batch * t, size):
        span = slice(first, first + size)
        columns, options = _score_block(
            logits[:, span], ids[span], alternatives, None if mixed is None else mixed[span],
            None if scale is None else scale[:, span], has_base=step.has_base, is_answer=is_answer,
        )  # fmt: skip
        scores = torch.stack([column.double() for column in columns.values()], -1)
        tables.append(torch.cat([scores, *options], -1))
    numbers, count = torch.cat(tables), len(columns)
    signals = {name: x[0] for name, x in step.signals.items() if is_answer or name not in ANSWER_SIGNALS}
    before = torch.cat([ids.double()[:, None], numbers[:, :count]], -1)
    known = [signal.flatten().double()[:, None] for signal in signals.values()]
    numbers = torch.cat([before, *known, numbers[:, count:]], -1)
    return TokenTable(
        numbers.unflatten(0, (batch, t)),  # type: ignore[no-untyped-call]
        (*columns, *signals),
        min(alternatives, classes),
    )


def _score_block(
    logits: Float[Tensor, "members n classes"],
    chosen: Int[Tensor, " n"],
    alternatives: int,
    mixed: Float[Tensor, "n classes"] | None,
    scale: Float[Tensor, "answering n classes"] | None,
    *,
    has_base: bool,
    is_answer: bool,
) -> tuple[dict[str, Tensor], list[Float[Tensor, "n k"]]]:
    """Return the scores of some positions by name, and the ids and log-probabilities of their alternatives."""
    options: Tensor | None = None
    others: Tensor | None = None
    confidence: dict[str, Tensor] = {}
    if mixed is None and (is_answer or alternatives):
        mixed = risk.mixture(logits, has_base=has_base)
    if alternatives and mixed is not None:
        options = find_top(mixed, min(alternatives, mixed.shape[-1]))
    if mixed is not None:
        wide = wide_dtype(mixed)
        confidence["gap"] = mixed.amax(-1).to(wide) - mixed.gather(-1, chosen[:, None]).squeeze(-1).to(wide)
    if is_answer and mixed is not None:
        scores, sure, others = risk.score_answer_tokens(logits, chosen, mixed, options, has_base=has_base, check=False)
        confidence |= dict(zip(risk.ConfidenceScores._fields, sure, strict=True))
    elif options is not None and mixed is not None:
        scores, others = risk.score_among(logits, chosen, options, mixed, has_base=has_base, check=False)
    else:
        scores = risk.token_scores(logits, chosen, has_base=has_base, check=False)
    columns = {n: x for n, x in zip(risk.TokenScores._fields, scores, strict=True) if x is not None}
    if scale is not None:
        index = chosen[None, :, None].expand(len(scale), -1, 1)
        columns["scale"] = scale.gather(-1, index).squeeze(-1).double().square().mean(0).sqrt()
    columns |= confidence
    return columns, [] if options is None or others is None else [options.double(), others]


def read_table(table: TokenTable) -> list[list[ScoredId]]:
    """Copy a table to the host in one go, and return its tokens, ``(batch, t)``.

    Raises:
        NonFiniteError: If logits were NaN or infinite.
    """
    numbers = table.numbers.cpu()
    risk.check_finite(replace(table, numbers=numbers).entropies.sum(-1))
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
    *,
    is_answer: bool | None = None,
) -> list[list[ScoredId]]:
    """Return the scores of chosen tokens, moved to the host in one go. The arguments are those of ``tabulate``.

    Raises:
        ShapeError: If the logits have no member axis.
        NonFiniteError: If a logit is NaN or infinite.
    """
    return read_table(tabulate(step, chosen, alternatives, mixed, is_answer=is_answer))
