"""Stand-ins: private-use characters that replace characters of a message, to see where a chat template puts them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from selfdoubt.errors import PromptError
from selfdoubt.lm.text.encoder import Encoder

Ints = np.ndarray[Any, np.dtype[np.intp]]
Codes = np.ndarray[Any, np.dtype[np.uint32]]
ChatText = Sequence[Mapping[str, str]]

_RANGES = (0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE)
_PRIVATE: Codes = np.concatenate([np.arange(first, end, dtype="<u4") for first, end in _RANGES])
_ANY = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")
_BLOCK = re.compile(r"\{[{%].*?[%}]\}", re.S)
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.S)


class Standing:
    """Contents of messages in which stand-ins replace the characters at some places.

    Stand-ins are numbered through all contents; ``message`` and ``place`` say of each what it stands for.
    """

    def __init__(self, messages: ChatText, places: Sequence[Ints], pool: Codes) -> None:
        counts = [len(hidden) for hidden in places]
        ends = np.cumsum(counts).tolist()
        self.places = places
        self.message = np.repeat(np.arange(len(counts)), counts)
        self.place = np.concatenate(places)
        self._stand_ins = pool[: ends[-1]]
        self._true = np.zeros(ends[-1], dtype="<u4")
        self.contents: list[str] = []
        for message, hidden, count, end in zip(messages, places, counts, ends, strict=True):
            codes = get_codes(message["content"]).copy()
            self._true[end - count : end] = codes[hidden]
            codes[hidden] = self._stand_ins[end - count : end]
            self.contents.append(codes.tobytes().decode("utf-32-le"))

    def neighbours(self, number: int) -> tuple[int, int | None]:
        """Return the place after the stand-in before, and that of the stand-in after, in the content of this one."""
        message = self.message[number]
        before = number and self.message[number - 1] == message
        after = number + 1 < len(self.message) and self.message[number + 1] == message
        return int(self.place[number - 1]) + 1 if before else 0, int(self.place[number + 1]) if after else None

    def put_back(self, rendered: str, text: str) -> Ints | None:
        """Return the number of the stand-in at each place of the text, or -1.

        None if the rendering with all stand-ins put back is not the text.
        """
        codes, true = get_codes(rendered), get_codes(text)
        if len(codes) != len(true):
            return None
        numbers = np.full(len(codes), -1)
        if len(self._stand_ins):
            near = np.searchsorted(self._stand_ins, codes).clip(max=len(self._stand_ins) - 1)
            numbers = np.where(self._stand_ins[near] == codes, near, -1)
            codes = np.where(numbers >= 0, self._true[near], codes)
        return numbers if np.array_equal(codes, true) else None


def find_free_characters(text: str) -> Codes:
    """Return the private-use characters that do not occur in a text."""
    return _PRIVATE[~np.isin(_PRIVATE, get_codes(text))] if _ANY.search(text) else _PRIVATE


def find_hidden(content: str, level: int, literals: Sequence[str], encoder: Encoder) -> Ints:
    """Return the places of a content's characters that stand-ins may replace.

    Level 0: all. 1: all but white space at its edges. 2, 3: none that a template may look for; but a content of nothing
    else as on level 1, or with no stand-in.
    """
    if level == 0:
        return np.arange(len(content))
    trimmed = np.arange(len(content) - len(content.lstrip()), len(content.rstrip()))
    if level == 1:
        return trimmed
    hidden = np.array([not (c.isspace() or c in '"\\' or ord(c) < 32) for c in content], dtype=bool)
    for literal in literals:
        for at in _places(literal, content):
            hidden[at : at + len(literal)] = False
    for match in encoder.pattern.finditer(content):  # or somebody's words could pass for the template's
        hidden[match.start() : match.end()] = True
    return np.flatnonzero(hidden) if hidden.any() or level == 3 else trimmed


def limit_places(hidden: Sequence[Ints], pool: int) -> Sequence[Ints]:
    """Limit the places to half the number of private-use characters: of long contents, keep those at both ends.

    Raises:
        PromptError: If there are too many messages.
    """
    most = pool // 2
    if sum(map(len, hidden)) <= most:
        return hidden
    half = most // (2 * len(hidden))
    if not half:
        raise PromptError(f"the chat has {len(hidden)} messages, and only {most // 2} can be distinguished; shorten it")
    return [p if len(p) <= 2 * half else np.concatenate([p[:half], p[-half:]]) for p in hidden]


def get_codes(text: str) -> Codes:
    """Return the code points of a text."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


@lru_cache(maxsize=16)
def find_literals(source: str) -> tuple[str, ...]:
    """Return the string literals of a template, which it may look for in a content."""
    literals = set()
    for match in (string for block in _BLOCK.findall(source) for string in _STRING.finditer(block)):
        try:
            literals.add(str(ast.literal_eval(match[0])))
        except (SyntaxError, ValueError):  # such as one over several lines
            literals.add(match[0][1:-1])
    return tuple(literals - {""})


def _places(part: str, text: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)
