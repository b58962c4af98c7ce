"""Solved examples to show before each question."""

from __future__ import annotations

from collections.abc import Sequence

from selfdoubt.data.order import make_rank_key
from selfdoubt.data.questions import Question
from selfdoubt.errors import ConfigError
from selfdoubt.eval.judges.text import fold


def choose_examples(
    questions: Sequence[Question], n: int, *, asked: Sequence[Question], seed: int = 0
) -> list[Question]:
    """Choose ``n`` examples to show before each question, at random by ``seed``, from questions that are not asked.

    Args:
        questions: Questions to choose from.
        n: Number of examples; 0 gives none.
        asked: Questions that are asked, and so left out by id and by text.
        seed: Same seed, same examples.

    Raises:
        ConfigError: If ``n`` is negative, or fewer are left.
    """
    if n < 0:
        raise ConfigError(f"the number of examples must be at least 0, got {n}")
    ids, words = {q.id for q in asked}, {_key(q) for q in asked}
    left = list({_key(q): q for q in questions if q.id not in ids and _key(q) not in words}.values())
    if len(left) < n:
        raise ConfigError(
            f"wanted {n} examples that are not asked themselves, found {len(left)}; give a larger file of them"
        )
    return sorted(left, key=lambda q: make_rank_key(seed, "shot", q.id))[:n]


def _key(question: Question) -> tuple[str, str]:
    return fold(question.text), fold(question.context or "")
