"""Prefill and teacher forcing: reads token ids of prompts and texts in chunks, and scores each id.

It knows no text and no model library.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt import risk
from selfdoubt.lm.hidden_states import HiddenStatePooler
from selfdoubt.lm.scores import ANSWER_SIGNALS
from selfdoubt.lm.stepper import StepOutput, Stepper

T = TypeVar("T")


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


def prefill_in_chunks(
    stepper: Stepper, prompts: Sequence[Sequence[int]], alternatives: int = 0, pool: HiddenStatePooler | None = None
) -> Generator[None, None, tuple[list[list[ScoredId | None]], StepOutput]]:
    """Read prompts piece by piece, and score every token except the first, which nothing predicts (None).

    Args:
        stepper: A stepper without sequences in progress.
        prompts: Token ids of each prompt.
        alternatives: Number of the most probable tokens that come with each token.
        pool: Pooler of the hidden states, if the stepper has them.

    Yields:
        Nothing, after each piece but the last.

    Returns:
        The scored tokens of each prompt, and the logits after it, ``(members, batch, classes)``.
    """
    width = max(len(p) for p in prompts)
    scored: list[list[ScoredId | None]] = [[None] for _ in prompts]
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    last: StepOutput | None = None
    for first, piece in stepper.start(prompts):
        columns = piece.logits.shape[2]
        # Column c predicts the token at c + 1; the last column of all predicts the first new token.
        known = min(columns, width - 1 - first)
        if known > 0:
            chosen = ids[:, first + 1 : first + 1 + known].to(piece.logits.device)
            now = piece.at(slice(known))
            for sequence, tokens in enumerate(score_ids(now, chosen, alternatives)):
                start = width - len(prompts[sequence])
                scored[sequence] += [t for c, t in enumerate(tokens) if first + c >= start]
        if pool is not None and piece.states is not None:
            pool.add(first, piece.states[0])
        last = piece.at(-1)
        if first + columns < width:
            yield
    assert last is not None
    return scored, last


def prefill(
    stepper: Stepper, prompts: Sequence[Sequence[int]], alternatives: int = 0, pool: HiddenStatePooler | None = None
) -> tuple[list[list[ScoredId | None]], StepOutput]:
    """Run ``prefill_in_chunks`` in one go."""
    return run_to_end(prefill_in_chunks(stepper, prompts, alternatives, pool))


def run_to_end(pieces: Generator[None, None, T]) -> T:
    """Run a generator that works piece by piece to its end, and return its result."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return cast("T", end.value)


def teacher_force_in_chunks(
    stepper: Stepper,
    next_logits: StepOutput,
    texts: Sequence[Sequence[int]],
    alternatives: int = 0,
    pool: HiddenStatePooler | None = None,
    ends: Collection[int] = (),
    attention: list[Float[Tensor, "batch t attended heads"]] | None = None,
) -> Generator[None, None, list[list[ScoredId]]]:
    """Score a text after each prompt that was read, piece by piece. No token can be chosen afterwards.

    Args:
        stepper: A stepper that has read the prompts.
        next_logits: Logits after the prompts.
        texts: Token ids, at least one per prompt.
        alternatives: Number of the most probable tokens that come with each token.
        pool: Pooler of the hidden states in which the texts' tokens except the first are predicted, right-padded.
        ends: Ids that would end a text. With some, each text has one more token: the most probable of them, behind it.
        attention: Receives the attention of the positions that predict the texts' tokens, piece by piece, see
            ``StepOutput``; nothing where a piece has none.

    Yields:
        Nothing, after each piece but the last.

    Returns:
        The scored tokens of each text.
    """
    last = sorted(ends)
    width = max(len(t) for t in texts) + bool(last)
    ids = torch.tensor([list(t) + [0] * (width - len(t)) for t in texts]).to(next_logits.logits.device)
    scored = score_ids(next_logits.at(None), ids[:, :1], alternatives, next_logits.mixture[:, None])
    keep_attention(attention, next_logits.at(None))
    # Without ends the last token predicts nothing that is asked for.
    for first, piece in stepper.extend(texts if last else [t[:-1] for t in texts]) if width > 1 else ():
        if pool is not None and piece.states is not None:
            pool.add(first, piece.states[0])
        keep_attention(attention, piece)
        columns = piece.logits.shape[2]
        mixed = piece.mixture
        chosen = ids[:, first + 1 : first + 1 + columns]
        for row, text in enumerate(texts) if last else ():
            if 0 <= (place := len(text) - 1 - first) < columns:
                chosen[row, place] = last[int(mixed[row, place, last].argmax())]
        for tokens, more in zip(scored, score_ids(piece, chosen, alternatives, mixed), strict=True):
            tokens += more
        if first + columns < width - 1:
            yield
    return [tokens[: len(text) + bool(last)] for tokens, text in zip(scored, texts, strict=True)]


def keep_attention(kept: list[Tensor] | None, piece: StepOutput) -> None:
    """Append the attention of a piece to those that are kept, on the host."""
    if kept is not None and piece.attention is not None:
        kept.append(piece.attention[0].cpu())


def score_ids(
    next_logits: StepOutput,
    chosen: Int[Tensor, "batch t"],
    alternatives: int,
    mixed: Float[Tensor, "batch t classes"] | None = None,
) -> list[list[ScoredId]]:
    """Return the scores of chosen tokens, moved to the host in one go.

    Args:
        next_logits: Logits of the positions where they were chosen.
        chosen: The chosen ids.
        alternatives: Number of the most probable tokens that come with each token.
        mixed: The mixture of the logits, if it is computed already; without it the ids are a prompt's, whose
            distributions are not scored.
    """
    has_base = next_logits.has_base
    options: Tensor | None = None
    others: Tensor | None = None
    is_answer, confidence = mixed is not None, {}
    if alternatives:
        mixed = next_logits.mixture if mixed is None else mixed
        options = mixed.topk(min(alternatives, mixed.shape[-1]), -1).indices
    if mixed is not None:
        confidence["gap"] = mixed.amax(-1) - mixed.gather(-1, chosen[..., None]).squeeze(-1)
    if is_answer and mixed is not None:
        scores, sure, others = risk.score_answer_tokens(next_logits.logits, chosen, mixed, options, has_base=has_base)
        confidence |= sure._asdict()
    elif options is not None and mixed is not None:
        scores, others = risk.score_among(next_logits.logits, chosen, options, mixed, has_base=has_base)
    else:
        scores = risk.token_scores(next_logits.logits, chosen, has_base=has_base)
    columns = {name: column for name, column in scores._asdict().items() if column is not None}
    if next_logits.scale is not None:
        index = chosen[None, ..., None].expand(len(next_logits.scale), -1, -1, 1)
        columns["scale"] = next_logits.scale.gather(-1, index).squeeze(-1).double().square().mean(0).sqrt()
    columns |= confidence
    known = {name: signal[0] for name, signal in next_logits.signals.items()}
    columns |= {name: x for name, x in known.items() if is_answer or name not in ANSWER_SIGNALS}
    numbers = torch.stack([chosen.double(), *(column.double() for column in columns.values())], -1)
    half = 0
    if options is not None and others is not None:
        half = options.shape[-1]
        numbers = torch.cat([numbers, options.double(), others], -1)
    table = numbers.tolist()

    def token(row: list[float]) -> ScoredId:
        named: dict[str, Any] = dict(zip(columns, row[1:], strict=False))
        first = 1 + len(columns)
        pairs = zip(row[first : first + half], row[first + half :], strict=True)
        return ScoredId(int(row[0]), **named, alternatives=tuple((int(i), p) for i, p in pairs))

    return [[token(row) for row in rows] for rows in table]
