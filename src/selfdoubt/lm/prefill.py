"""Prefill and teacher forcing: reads token ids of prompts and texts in chunks, and scores each id.

It knows no text and no model library.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from typing import TypeVar, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selfdoubt.lm.hidden_states import HiddenStatePooler
from selfdoubt.lm.reading import read_prompts
from selfdoubt.lm.step_output import StepOutput, Stepper
from selfdoubt.lm.token_table import ScoredId, read_table, score_ids, tabulate

T = TypeVar("T")


def prefill_in_chunks(
    stepper: Stepper,
    prompts: Sequence[Sequence[int]],
    alternatives: int = 0,
    pool: HiddenStatePooler | None = None,
    scored: Sequence[Sequence[bool]] | None = None,
) -> Generator[None, None, tuple[list[list[ScoredId | None]], StepOutput]]:
    """Read prompts piece by piece, and score their tokens.

    Args:
        stepper: A stepper without sequences in progress.
        prompts: Token ids of each prompt.
        alternatives: Number of the most probable tokens that come with each token.
        pool: Pooler of the hidden states, if the stepper has them.
        scored: For each token of each prompt, True to score it; None scores all. The head of the model runs only where
            it is needed for them.

    Yields:
        Nothing, after each piece but the last.

    Returns:
        The tokens of each prompt, None where one is not scored, as the first, which nothing predicts; and the logits
        after the prompts, ``(members, batch, classes)``.
    """
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    places = _find_places(prompts, scored)
    tokens: list[list[ScoredId | None]] = [[None] * len(p) for p in prompts]
    last: StepOutput | None = None
    for piece in read_prompts(stepper, prompts, places):
        tables = []
        for block in piece.blocks:
            # Column c predicts the token at c + 1.
            chosen = ids[block.sequences, block.columns + 1].to(block.output.logits.device)
            tables.append((block, tabulate(block.output.at(None), chosen[:, None], alternatives)))
        for block, table in tables:
            for sequence, column, (token,) in zip(
                block.sequences.tolist(), block.columns.tolist(), read_table(table), strict=True
            ):
                tokens[sequence][column + 1 - width + len(prompts[sequence])] = token
        if pool is not None and piece.states is not None:
            pool.add(piece.first, piece.states[0])
        last = piece.last
        if piece.first + piece.columns < width:
            yield
    assert last is not None
    return tokens, last


def _find_places(
    prompts: Sequence[Sequence[int]], scored: Sequence[Sequence[bool]] | None
) -> Bool[Tensor, "batch width"]:
    """Return the columns of left-padded prompts that predict tokens to score."""
    width = max(len(p) for p in prompts)
    places = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        if len(prompt) > 1:
            start = width - len(prompt)
            places[row, start:-1] = torch.tensor([True] * (len(prompt) - 1) if scored is None else scored[row][1:])
    return places


def prefill(
    stepper: Stepper,
    prompts: Sequence[Sequence[int]],
    alternatives: int = 0,
    pool: HiddenStatePooler | None = None,
    scored: Sequence[Sequence[bool]] | None = None,
) -> tuple[list[list[ScoredId | None]], StepOutput]:
    """Run ``prefill_in_chunks`` in one go."""
    return run_to_end(prefill_in_chunks(stepper, prompts, alternatives, pool, scored))


def skip_scores(prompts: Sequence[Sequence[int]]) -> list[list[bool]]:
    """Return the argument ``scored`` that scores no token of the prompts."""
    return [[False] * len(prompt) for prompt in prompts]


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
    scored = score_ids(next_logits.at(None), ids[:, :1], alternatives, is_answer=True)
    keep_attention(attention, next_logits.at(None))
    # Without ends the last token predicts nothing that is asked for.
    for first, piece in stepper.extend(texts if last else [t[:-1] for t in texts]) if width > 1 else ():
        if pool is not None and piece.states is not None:
            pool.add(first, piece.states[0])
        keep_attention(attention, piece)
        columns = piece.logits.shape[2]
        chosen = ids[:, first + 1 : first + 1 + columns]
        for row, text in enumerate(texts) if last else ():
            if 0 <= (place := len(text) - 1 - first) < columns:
                mixed = piece.select([row]).at(place).mixture
                chosen[row, place] = last[int(mixed[0, last].argmax())]
        for tokens, more in zip(scored, score_ids(piece, chosen, alternatives, is_answer=True), strict=True):
            tokens += more
        if first + columns < width - 1:
            yield
    return [tokens[: len(text) + bool(last)] for tokens, text in zip(scored, texts, strict=True)]


def keep_attention(kept: list[Tensor] | None, piece: StepOutput) -> None:
    """Append the attention of a piece to those that are kept, on the host."""
    if kept is not None and piece.attention is not None:
        kept.append(piece.attention[0].cpu())
