"""Ids and random orders of questions that depend on text and seed alone: the same on every machine and any subset."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from selfdoubt.data.questions import Question
from selfdoubt.data.readers import Row
from selfdoubt.errors import ConfigError, DataError

Draft = tuple[Question, Row]


def make_text_id(text: str, context: str | None = None) -> str:
    """Return an id made of a question's text (and context): 12 hexadecimal digits of its hash.

    Example:
        >>> make_text_id("What is the capital of France?")
        '6479a5612731'
    """
    return _digest(text, context or "")[:12]


def make_rank_key(seed: int, *keys: str) -> str:
    """Return a key to sort by, for a random order in which each item's key depends on itself and the seed alone."""
    return _digest(str(seed), *keys)


def check_limit(limit: int | None) -> None:
    """Check the number of questions to choose, before they are read.

    Raises:
        ConfigError: If it is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit must be at least 1 question, got {limit}; leave it out for all")


def choose_subset(drafts: list[Draft], limit: int | None, seed: int) -> list[Draft]:
    """Choose ``limit`` questions at random, in their order; a greater limit keeps those of a smaller one."""
    if limit is None or limit >= len(drafts):
        return drafts
    kept = sorted(range(len(drafts)), key=lambda i: make_rank_key(seed, drafts[i][0].id))[:limit]
    return [drafts[i] for i in sorted(kept)]


def assign_ids(source: str, drafts: list[Draft]) -> list[Draft]:
    """Give each question an id: its own, or one made of its text. Ids of repeated questions end in "-2", "-3", ...

    Raises:
        DataError: If two different questions have the same id.
    """
    seen: dict[str, str] = {}
    named = []
    for question, row in drafts:
        id_ = question.id or make_text_id(question.text, question.context)
        if id_ in seen and question.id and seen[id_] != question.text:
            raise DataError(
                f"{source}: the id {id_!r} comes twice, for {seen[id_][:60]!r} and {question.text[:60]!r}; "
                "give every question its own"
            )
        name, times = id_, 1
        while name in seen:
            times += 1
            name = f"{id_}-{times}"
        seen[name] = question.text
        named.append((replace(question, id=name), row))
    return named


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()
