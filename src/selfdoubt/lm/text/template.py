"""Renders chats with a chat template, and finds the message that each character of the text comes from.

A template is a program. It may trim contents, print one twice, drop thoughts from the history, or look for a switch in
the question. So the text is always the one that it makes of the true messages. Who wrote which character is found by
rendering once more with stand-ins, private characters that each stand for one character of a content: where the result
is the true text again once they are put back, a stand-in's place is its character's place. A template that looks into
contents gives another text then; for it, what it can look for (white space, its own string literals) stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from os.path import commonprefix
from typing import Any, NamedTuple

import numpy as np

from selfdoubt.errors import PromptError
from selfdoubt.lm.text.encoder import Encoder, check_text, get_encoder
from selfdoubt.lm.text.placeholders import (
    ChatText,
    Codes,
    Ints,
    Standing,
    find_free_characters,
    find_hidden,
    find_literals,
    get_codes,
    limit_places,
)


class Rendered(NamedTuple):
    """The text of a chat, and for each character the number of the message that wrote it (-1: the template).

    Where the template rewrites a message (``| upper``), characters of -1 may be that message's, too.
    """

    text: str
    owners: Ints


class _End(NamedTuple):
    """Characters next to a stand-in that are as in the content: how far they reach, in the text and in the content."""

    message: int
    side: int  #: 0: before the stand-in, 1: after it
    at: int  #: place of the stand-in in the text
    place: int  #: place of the stand-in in the content
    length: int


def render_chat(tokenizer: Any, messages: ChatText, numbers: Sequence[int], *, answer_next: bool) -> Rendered:
    """Render a chat with the tokenizer's template, and find the message that each character comes from.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: Objects with ``role`` and ``content``, both text.
        numbers: Numbers of the messages whose characters must be located; the last of them must be in the text.
        answer_next: End with the opening of the assistant's next turn.

    Returns:
        The text, in which each special token that has no owner is the template's.

    Raises:
        PromptError: If the template refuses the messages, leaves out the last one in ``numbers``, or rewrites its text.
    """
    for message in messages:
        check_text(message["role"] + message["content"])
    last = max(numbers)
    role = messages[last]["role"]
    rewritten = False
    # Some templates read contents only as lists of parts, and print nothing of a text.
    for as_parts in (False, True):
        chat = _Chat(tokenizer, messages, answer_next, as_parts)
        try:
            text = chat.render([m["content"] for m in messages])
        except PromptError:
            if as_parts:
                break
            raise
        rendered = _located(chat, text, numbers)
        if rendered is not None and ((rendered.owners == last).any() or not messages[last]["content"].strip()):
            return rendered
        rewritten |= rendered is None
    if rewritten:
        raise PromptError(
            f"the chat template rewrites message {last + 1} ({role}), so that its words cannot be distinguished "
            "from the template's own; ask with raw=True, or use a template that leaves contents as they are"
        )
    raise PromptError(f"the chat template leaves out message {last + 1} ({role}); ask without it, or with raw=True")


class _Chat(NamedTuple):
    tokenizer: Any
    messages: ChatText
    answer_next: bool
    as_parts: bool

    def render(self, contents: Sequence[str]) -> str:
        """Return the text with these contents in place of the messages' own."""
        messages: list[dict[str, Any]] = [
            dict(m, content=[{"type": "text", "text": c}] if self.as_parts else c)
            for m, c in zip(self.messages, contents, strict=True)
        ]
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=self.answer_next)
            )
        except Exception as error:  # templates are programs, and raise any kind of error
            why = " ".join(str(error).split())[:300]
            raise PromptError(f"the model's chat template refuses these messages: {why}") from error

    def rendered(self, standing: Standing) -> str:
        """Return the text with stand-ins; empty where the template refuses them."""
        try:
            return self.render(standing.contents)
        except PromptError:
            return ""


def _located(chat: _Chat, text: str, message_numbers: Sequence[int]) -> Rendered | None:
    """Find the message of each character; None if the template rewrites the text of one that must be located."""
    encoder = get_encoder(chat.tokenizer)
    contents = [m["content"] for m in chat.messages]
    pool = find_free_characters(text)
    literals = find_literals(str(chat.tokenizer.chat_template))
    neutral = ""
    tried: list[Ints] = []
    for level in range(4):
        hidden = [find_hidden(content, level, literals, encoder) for content in contents]
        if level and all(map(np.array_equal, hidden, tried)):
            continue
        tried = hidden
        standing = Standing(chat.messages, limit_places(hidden, len(pool)), pool)
        rendered = chat.rendered(standing)
        neutral = rendered if level == 0 else neutral
        numbers = standing.put_back(rendered, text)
        if numbers is None:
            continue
        owners, ends = _owners(contents, text, numbers, standing)
        for end in ends if level else ():
            if end.message in message_numbers:
                _doubt(chat, text, owners, standing, pool, end)
        bare = [i for i in message_numbers if not len(hidden[i])]
        result = _searched(encoder, contents, text, bare, owners) if bare else Rendered(text, owners)
        break
    else:
        result = _searched(encoder, contents, text, message_numbers, np.full(len(text), -1))
    if result is not None and level > 1:  # not all that a message wrote is known to be its
        _check_control(encoder, result, neutral)
    return result


def _check_control(encoder: Encoder, rendered: Rendered, neutral: str) -> None:
    """Check that the template made no control token of a message's text.

    Args:
        encoder: The tokenizer's.
        rendered: The text, not all of whose owners are known.
        neutral: The text in which all contents are stand-ins: the control tokens in it are the template's.
    """
    matches = [m for m in encoder.pattern.finditer(rendered.text) if encoder.control[m[0]].special]
    from_template = Counter(m[0] for m in matches if (rendered.owners[m.start() : m.end()] == -1).all())
    from_template.subtract(m[0] for m in encoder.pattern.finditer(neutral))
    made = [token for token, count in from_template.items() if count > 0]
    if made:
        raise PromptError(
            f"the chat template rewrites the messages, and a {made[0]!r} in it may come from one of them; ask without "
            "such words, or with raw=True"
        )


def _owners(contents: Sequence[str], text: str, numbers: Ints, standing: Standing) -> tuple[Ints, list[_End]]:
    """Find the message that each character comes from, and the ends of its text that no stand-in closes.

    All between two stand-ins that are neighbours in a content is that content's.
    """
    owners = np.full(len(text), -1)
    places = np.flatnonzero(numbers >= 0)
    if not len(places):
        return owners, []
    result = numbers[places]
    owners[places] = standing.message[result]
    joined = (np.diff(result) == 1) & (np.diff(standing.message[result]) == 0)
    for k in np.flatnonzero(joined & (np.diff(places) > 1)).tolist():
        owners[places[k] : places[k + 1]] = owners[places[k]]
    ends: list[_End] = []
    firsts = [0, *(np.flatnonzero(~joined) + 1).tolist()]  # of stretches of a content
    free = 0  # characters before this one have their owner
    for first, after in pairwise([*firsts, len(places)]):
        at, last = int(places[first]), int(places[after - 1])
        limit = len(text) if after == len(places) else int(places[after])
        message = int(owners[at])
        content = contents[message]
        left, right = (int(standing.place[result[k]]) for k in (first, after - 1))
        start, end = standing.neighbours(int(result[first]))[0], standing.neighbours(int(result[after - 1]))[1]
        end = len(content) if end is None else end
        length = _alike(text[max(free, at - (left - start)) : at][::-1], content[start:left][::-1])
        ends.append(_End(message, 0, at, left, length))
        owners[at - length : at] = message
        length = _alike(text[last + 1 : min(limit, last + end - right)], content[right + 1 : end])
        ends.append(_End(message, 1, last, right, length))
        free = last + 1 + length
        owners[last:free] = message
    return owners, [end for end in ends if end.length]


def _alike(text: str, content: str) -> int:
    """Count the leading characters that both share, without a part of a word of the content, such as ">" of a tag."""
    length = len(commonprefix([text, content]))
    if length < len(content) and not content[length].isspace():
        while length and not content[length - 1].isspace():
            length -= 1
    return length


def _doubt(chat: _Chat, text: str, owners: Ints, standing: Standing, pool: Codes, end: _End) -> None:
    """Assign white space at the ends of a message's text to the template, unless stand-ins for it are rendered, too.

    A line feed before trimmed words may be the template's or the content's: they look the same.
    """
    content = chat.messages[end.message]["content"]
    if end.side == 0:
        outer = content[end.place - end.length : end.place]
        most = len(outer) - len(outer.lstrip())
        inner = end.place - end.length + most
    else:
        outer = content[end.place + 1 : end.place + 1 + end.length]
        most = len(outer) - len(outer.rstrip())
        inner = end.place + 1 + end.length - most
    low, high = 0, min(most, len(pool) // 4)
    while low < high:
        middle = (low + high + 1) // 2
        more = np.arange(inner - middle, inner) if end.side == 0 else np.arange(inner, inner + middle)
        places = [np.union1d(p, more) if i == end.message else p for i, p in enumerate(standing.places)]
        tried = Standing(chat.messages, places, pool)
        if tried.put_back(chat.rendered(tried), text) is not None:
            low = middle
        else:
            high = middle - 1
    lost = most - low
    first = end.at - end.length if end.side == 0 else end.at + 1 + end.length - lost
    owners[first : first + lost] = -1


def _searched(
    encoder: Encoder, contents: Sequence[str], text: str, numbers: Sequence[int], owners: Ints
) -> Rendered | None:
    """Search for messages that stand-ins cannot locate, in their order, the last from the end; None if one is missing.

    The template's control tokens are skipped: "assistant" is part of one of them.
    """
    theirs = {m[0] for content in contents for m in encoder.pattern.finditer(content)}
    codes = np.where(owners == -1, get_codes(text), 0)
    for match in encoder.pattern.finditer(text):
        if match[0] not in theirs:
            codes[match.start() : match.end()] = 0
    left = codes.astype("<u4").tobytes().decode("utf-32-le")
    at = 0
    for i in sorted(numbers):
        words = contents[i].strip()
        first = left.rfind(words, at) if i == max(numbers) else left.find(words, at)
        if first < 0:
            return None
        at = first + len(words)
        owners[first:at] = i
    return Rendered(text, owners)
