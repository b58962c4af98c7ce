"""Token ids of pairs: one with the borders of question and answer, or many packed into rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.pocket.questions import Pair
from recipes.pocket.tokenizer import ASSISTANT, END, USER
from selfdoubt.errors import ConfigError


@dataclass(frozen=True)
class Encoded:
    """One pair as the chat template renders it: user, question, end, assistant, answer, end.

    ``ids[question]`` are the question's own tokens; ``ids[answer]`` the answer's and the end that closes it.
    """

    ids: list[int]
    question: slice
    answer: slice


@dataclass(frozen=True)
class Rows:
    """Packed pairs, each (rows, length); ``segments`` numbers the pairs of a row from 1, 0 is padding."""

    ids: Tensor
    positions: Tensor
    segments: Tensor

    def mask(self) -> Tensor:
        """Return the attention mask, (rows, 1, length, length): earlier tokens of the same pair."""
        same = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        length = self.ids.shape[1]
        return same & torch.ones(length, length, dtype=torch.bool).tril()

    def targets(self) -> Tensor:
        """Return the next token of the same pair, -100 where there is none, (rows, length - 1)."""
        same = (self.segments[:, 1:] == self.segments[:, :-1]) & (self.segments[:, 1:] > 0)
        return self.ids[:, 1:].where(same, -100)


def encode(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> list[Encoded]:
    """Encode pairs; equal to ``apply_chat_template`` on the same two messages."""
    user, assistant, end = (_special(tokenizer, t) for t in (USER, ASSISTANT, END))
    questions = tokenizer.encode_batch([p.question for p in pairs], add_special_tokens=False)
    answers = tokenizer.encode_batch([p.answer for p in pairs], add_special_tokens=False)
    encoded = []
    for q, a in zip(questions, answers, strict=True):
        ids = [user, *q.ids, end, assistant, *a.ids, end]
        encoded.append(Encoded(ids, slice(1, 1 + len(q.ids)), slice(len(q.ids) + 3, len(ids))))
    return encoded


def _special(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ConfigError(f"wanted the pocket model's tokenizer, found one without {token}; load folder()")
    return int(number)


def padded(pairs: Sequence[Encoded], *, answers_only: bool = False) -> dict[str, Tensor]:
    """Return one row for each pair, padded on the right: ``input_ids``, ``attention_mask`` and ``labels``.

    The labels are -100 at padding, and at everything but the answer with ``answers_only``.
    """
    shape = len(pairs), max(len(pair.ids) for pair in pairs)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, pair in enumerate(pairs):
        ids[row, : len(pair.ids)] = torch.tensor(pair.ids)
        mask[row, : len(pair.ids)] = 1
        counted = pair.answer if answers_only else slice(0, len(pair.ids))
        labels[row, counted] = ids[row, counted]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed(tokenizer: Tokenizer, stream: Iterator[Pair], rows: int, length: int) -> Iterator[Rows]:
    """Fill rows with whole pairs, in the order they come; a pair that does not fit opens the next row."""
    waiting: list[list[int]] = []
    while True:
        batch: list[list[list[int]]] = []
        while len(batch) < rows:
            row: list[list[int]] = []
            room = length
            while True:
                if len(waiting) < 96:
                    drawn = encode(tokenizer, [next(stream) for _ in range(512)])
                    waiting += [e.ids for e in drawn if len(e.ids) <= length]
                fits = next((i for i, ids in enumerate(waiting[:96]) if len(ids) <= room), None)
                if fits is None:
                    break
                row.append(waiting.pop(fits))
                room -= len(row[-1])
            batch.append(row)
        yield _rows(batch, length)


def _rows(batch: list[list[list[int]]], length: int) -> Rows:
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    positions, segments = torch.zeros_like(ids), torch.zeros_like(ids)
    for r, row in enumerate(batch):
        start = 0
        for number, pair in enumerate(row, 1):
            stop = start + len(pair)
            ids[r, start:stop] = torch.tensor(pair)
            positions[r, start:stop] = torch.arange(len(pair))
            segments[r, start:stop] = number
            start = stop
    return Rows(ids, positions, segments)
