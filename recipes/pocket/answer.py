"""Greedy answers of the pocket model to a list of questions, and counts of the right ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from recipes.pocket.evaluation import Question, is_right
from recipes.pocket.tokenizer import ASSISTANT, END, USER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 48  # tokens of an answer


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], *, batch: int = 128
) -> list[str]:
    """Return the most probable answer to each question, in the order of the questions.

    Questions of equal length share a batch, so nothing is padded and a batch changes no answer.
    """
    vocabulary = tokenizer.get_vocab()
    user, end, assistant = (vocabulary[token] for token in (USER, END, ASSISTANT))
    encoded = tokenizer(list(questions), add_special_tokens=False)["input_ids"]
    answers = [""] * len(questions)
    for numbers in _batches([len(ids) for ids in encoded], batch):
        ids = torch.tensor([[user, *encoded[i], end, assistant] for i in numbers])
        with torch.inference_mode():
            out = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=LONGEST,
            )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = text
    return answers


def _batches(lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for number, length in enumerate(lengths):
        groups[length].append(number)
    for group in groups.values():
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """Count right answers and questions, by category and relation; ``"all"`` stands for all relations."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        for relation in ("all", question.relation):
            right, asked = counts.get((question.category, relation), (0, 0))
            counts[question.category, relation] = (right + is_right(question, answer), asked + 1)
    return counts
