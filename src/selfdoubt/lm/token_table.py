"""Tables of token scores: computed where the logits are, without waiting for them, and read on the host in one go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt import risk
from selfdoubt.distributions import Distributions, find_top
from selfdoubt.lm.scores import ANSWER_SIGNALS
from selfdoubt.lm.step_output import StepOutput

#: Logits of a block of positions on a CPU are about this many numbers (2 MiB in float32).
_BLOCK = 2**19
#: Chooses the ids of a span of sequences from the distributions that answer there, ``(n, classes)``; None where these
#: are not needed for a score.
TokenChoice: TypeAlias = Callable[[slice, Distributions | None], Tensor]


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
    step: StepOutput, chosen: Int[Tensor, "batch t"], alternatives: int, *, is_answer: bool = False
) -> TokenTable:
    """Compute the scores of chosen tokens on the device of the logits.

    Nothing waits for the device, and no shape or branch depends on a value: a CUDA graph can capture it, and
    ``torch.compile`` can trace it as one graph. So logits that are NaN or infinite are no error here: they make the
    ``total`` or ``aleatoric`` of their position NaN, and ``read_table`` raises.

    On a CPU it works on a few positions at a time, so that their logits stay in the cache from pass to pass.

    Args:
        step: Logits of the positions where the tokens were chosen, ``(members, batch, t, classes)``.
        chosen: The chosen ids.
        alternatives: Number of the most probable tokens that come with each token.
        is_answer: Score the distributions, too, as an answer's tokens take it and a prompt's do not.

    Raises:
        ShapeError: If the logits have no member axis.
    """
    ids = chosen.flatten()
    numbers, names, _ = _score_blocks(step.flatten(), lambda span, _: ids[span], alternatives, is_answer=is_answer)
    return TokenTable(numbers.view(*chosen.shape, -1), names, min(alternatives, step.logits.shape[-1]))


def choose_and_tabulate(
    step: StepOutput, choose: TokenChoice, alternatives: int
) -> tuple[TokenTable, Int[Tensor, " batch"]]:
    """Choose the next token of each sequence, and compute its scores: both of distributions that are measured once.

    Args:
        step: Logits of the positions where the tokens are chosen, ``(members, batch, classes)``.
        choose: Function that chooses the ids of some sequences, see ``TokenChoice``.
        alternatives: As for ``tabulate``.

    Returns:
        A table of one token per sequence, and its ids.
    """
    numbers, names, chosen = _score_blocks(step, choose, alternatives, is_answer=True)
    return TokenTable(numbers[:, None], names, min(alternatives, step.logits.shape[-1])), chosen


def _score_blocks(
    step: StepOutput, choose: TokenChoice, alternatives: int, *, is_answer: bool
) -> tuple[Float[Tensor, "n columns"], tuple[str, ...], Int[Tensor, " n"]]:
    """Return the rows of a table, the names of its scores and the ids, on a CPU block by block."""
    members, positions, classes = step.logits.shape
    size = positions if step.logits.device.type != "cpu" else max(1, _BLOCK // (members * classes))
    if size >= positions:
        return _score_block(step, choose, slice(0, positions), alternatives, is_answer=is_answer)
    spans = [slice(first, first + size) for first in range(0, positions, size)]
    blocks = [_score_block(step.span(span), choose, span, alternatives, is_answer=is_answer) for span in spans]
    numbers, names, chosen = zip(*blocks, strict=True)
    return torch.cat(numbers), names[0], torch.cat(chosen)


def _score_block(
    step: StepOutput, choose: TokenChoice, span: slice, alternatives: int, *, is_answer: bool
) -> tuple[Float[Tensor, "n columns"], tuple[str, ...], Int[Tensor, " n"]]:
    """Return the rows of some positions, whose tokens are those of ``span`` in ``choose``."""
    each = risk.measure_members(step.logits, has_base=step.has_base)
    answer = risk.find_answer(each, has_base=step.has_base) if is_answer or alternatives else None
    chosen = choose(span, answer)
    scores = risk.score_members(each, chosen, answer, has_base=step.has_base)
    columns: dict[str, Tensor] = {}
    options: list[Tensor] = []
    if step.scale is not None:
        index = chosen[None, :, None].expand(len(step.scale), -1, 1)
        columns["scale"] = step.scale.gather(-1, index).squeeze(-1).double().square().mean(0).sqrt()
    if answer is not None:
        columns["gap"] = -answer.centred.gather(-1, chosen[:, None]).squeeze(-1)
        top = find_top(answer.centred, min(max(alternatives, 2), answer.centred.shape[-1]))
        if is_answer:
            columns |= risk.score_confidence(answer, top)._asdict()
        if alternatives:
            others = top[:, :alternatives]
            logprob, logprobs = risk.fit_logprobs(answer, chosen, others)
            scores, options = scores._replace(logprob=logprob), [others, logprobs]
    signals = {name: x[0] for name, x in step.signals.items() if is_answer or name not in ANSWER_SIGNALS}
    columns = {name: x for name, x in scores._asdict().items() if x is not None} | columns | signals
    numbers = torch.cat([chosen.double()[:, None], torch.stack(list(columns.values()), -1), *options], -1)
    return numbers, tuple(columns), chosen


def read_table(table: TokenTable) -> list[list[ScoredId]]:
    """Copy a table to the host in one go, and return its tokens, ``(batch, t)``.

    Raises:
        NonFiniteError: If logits were NaN or infinite.
    """
    rows, first, half = table.numbers.tolist(), 1 + len(table.names), table.alternatives

    def read(row: list[float]) -> ScoredId:
        named: dict[str, Any] = dict(zip(table.names, row[1:first], strict=True))
        pairs = zip(row[first : first + half], row[first + half :], strict=True)
        return ScoredId(int(row[0]), **named, alternatives=tuple((int(i), p) for i, p in pairs))

    tokens = [[read(row) for row in sequence] for sequence in rows]
    if not all(math.isfinite(token.total + token.aleatoric) for sequence in tokens for token in sequence):
        risk.check_finite(table.entropies.sum(-1))
    return tokens


def score_ids(
    step: StepOutput,
    chosen: Int[Tensor, "batch t"],
    alternatives: int,
    *,
    is_answer: bool = False,
) -> list[list[ScoredId]]:
    """Return the scores of chosen tokens, moved to the host in one go. The arguments are those of ``tabulate``.

    Raises:
        ShapeError: If the logits have no member axis.
        NonFiniteError: If a logit is NaN or infinite.
    """
    return read_table(tabulate(step, chosen, alternatives, is_answer=is_answer))
