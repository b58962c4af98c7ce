"""Checks prompts as callers give them: a text, a chat, or a list, an array or a column of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AnySet
from typing import Any

from selfdoubt.errors import PromptError

PromptLike = str | Sequence[Mapping[str, str]]


def is_chat(item: Any) -> bool:
    """Return True for one chat: a list of messages."""
    return isinstance(item, Sequence) and not isinstance(item, str) and bool(item) and isinstance(item[0], Mapping)


def list_questions(prompt: Any) -> list[PromptLike]:
    """Return the questions of a list, a tuple, a generator, a pandas column, an Arrow column or an array.

    Args:
        prompt: Several questions; a single one is for ``check_question``.

    Raises:
        PromptError: If it is something else, or one item is neither a text nor a chat; the message names its place.
    """
    if hasattr(prompt, "columns"):
        raise PromptError(f"got a whole table ({type(prompt).__name__}); give the column with the questions")
    if isinstance(prompt, (bytes, Mapping, AnySet)) or not isinstance(prompt, Iterable):
        raise PromptError(f"{_WANTED}, got {_shown(prompt)}{_REPAIR.get(type(prompt), '')}")
    for name in ("to_pylist", "tolist"):  # Arrow; numpy, pandas
        if hasattr(prompt, name):
            prompt = getattr(prompt, name)()
            break
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Iterable):  # an array without an axis
        prompt = [prompt]
    return [check_question(item, f"question {number}: ") for number, item in enumerate(prompt, 1)]


def list_pairs(pairs: Any) -> list[tuple[PromptLike | None, str]]:
    """Return questions and texts, checked; a question may be None.

    Raises:
        PromptError: If one is not a pair, a question is neither a text nor a chat, or a text is not a text.
    """
    if isinstance(pairs, (str, bytes, Mapping, AnySet)) or not isinstance(pairs, Iterable):
        raise PromptError(f"wanted a list of pairs, each a question (or None) and a text, got {_shown(pairs)}")
    checked: list[tuple[PromptLike | None, str]] = []
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise PromptError(f"pair {number}: wanted a question (or None) and a text, got {_shown(pair)}")
        question, text = pair
        if not isinstance(text, str):
            raise PromptError(f"pair {number}: the text to score must be a text, got {_shown(text)}")
        checked.append((None if question is None else check_question(question, f"pair {number}: "), text))
    return checked


def check_question(item: Any, place: str = "") -> PromptLike:
    """Return a text or a chat as it is.

    Raises:
        PromptError: If it is neither, e.g. None, or the NaN that pandas writes for a missing text.
    """
    if isinstance(item, str):
        return item
    if is_chat(item):
        return [*item]
    raise PromptError(f"{place}{_WANTED}, got {_shown(item)}{_REPAIR.get(type(item), '')}")


_WANTED = "wanted a text or a list of messages with role and content"
_REPAIR = {
    dict: "; put a single message into a list",
    bytes: "; decode it first",
    set: "; a set has no order, so use a list",
    float: "; drop missing texts first",
}


def _shown(item: Any) -> str:
    text = repr(item)
    return text if len(text) <= 60 else f"{text[:60]}... ({type(item).__name__})"
