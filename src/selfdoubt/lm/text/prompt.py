"""Turns questions and chats into token ids, and marks which of them are the user's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from selfdoubt.errors import PromptError
from selfdoubt.lm.text.encoder import Encoded, Encoder, get_encoder
from selfdoubt.lm.text.placeholders import Ints
from selfdoubt.lm.text.prompt_form import CHAT, describe_chat_form, describe_text_form
from selfdoubt.lm.text.template import render_chat

MessageLike = Mapping[str, str]

#: A byte order mark: what some editors write before a text; it is not part of it.
BOM = "\ufeff"


class Prompt(NamedTuple):
    """Token ids of a prompt, each marked as part of the last message's text or not (of the template, say)."""

    ids: list[int]
    is_user_token: list[bool]
    form: str = CHAT  #: form of all but the last message, see ``selfdoubt.lm.text.prompt_form``


class Turns(NamedTuple):
    """Token ids of a chat, and for each the number of the message whose text it is part of (-1: the template's)."""

    ids: list[int]
    turn: list[int]


def encode(tokenizer: Any, prompt: str | Sequence[MessageLike], *, raw: bool = False) -> Prompt:
    """Return the token ids of a question or of chat messages.

    They are those of ``tokenizer.apply_chat_template``, except that control tokens in a message are plain letters:
    otherwise a user could end their own turn and speak as another role.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt: A question, or messages with ``role`` and ``content``.
        raw: Take the text as it is, without the chat template; control tokens in it count as such.

    Raises:
        PromptError: If there is nothing to read, a message lacks its parts, or the chat template refuses the messages,
            leaves out the last one or rewrites it.
    """
    messages = _messages(prompt)
    if is_plain(tokenizer, raw=raw):
        return _encode_plain(tokenizer, _joined(messages))
    last = len(messages) - 1
    turns = _encode_chat(tokenizer, messages, [last], answer_next=True)
    form = describe_chat_form(messages)
    if last and form != CHAT and messages[last]["role"] == "user" and _is_alone(tokenizer, messages[last], turns.ids):
        form = CHAT
    return Prompt(turns.ids, [turn == last for turn in turns.turn], form)


def _is_alone(tokenizer: Any, message: dict[str, str], ids: list[int]) -> bool:
    """Return whether a chat reads like its last message alone, because the template leaves the others out."""
    try:
        return _encode_chat(tokenizer, [message], [0], answer_next=True).ids == ids
    except PromptError:
        return False


def encode_turns(tokenizer: Any, messages: Sequence[MessageLike]) -> Turns:
    """Return the token ids of a whole chat with its answers, as the chat template renders it, to learn from.

    Raises:
        PromptError: If a message lacks its parts, or the template refuses the chat.
    """
    turns = [dict(m) for m in messages]
    _check(turns)
    return _encode_chat(tokenizer, turns, list(range(len(turns))), answer_next=False)


def encode_pair(
    tokenizer: Any, question: str | Sequence[MessageLike], text: str, *, raw: bool = False
) -> tuple[Prompt, list[int]]:
    """Return a prompt, and the ids of a text that follows it.

    Without a chat template both are encoded as one text, as the model would have read them, and cut where the text
    begins. White space at the end of the question goes to the text, as in lm-evaluation-harness. Where a token reaches
    over the border ("http" before "s://"), it counts as the text's: its first characters are in it.

    Args:
        tokenizer: A Hugging Face tokenizer.
        question: A question, or messages.
        text: Text after the question.
        raw: Put the text right after the question, without the chat template.

    Raises:
        PromptError: As ``encode``, and if the tokenizer makes nothing of the text.
    """
    if is_plain(tokenizer, raw=raw):
        before = _joined(_messages(question))
        prompt, ids = _encode_border(tokenizer, before.rstrip(), before[len(before.rstrip()) :] + text)
    else:
        prompt, ids = encode(tokenizer, question), get_encoder(tokenizer).encode_letters(text).ids
    if not ids:
        raise PromptError("the tokenizer makes no token of the text to score; score a text with words")
    return prompt, ids


def count_tokens(tokenizer: Any, text: str) -> int:
    """Return the number of tokens of a text by itself, with those that the tokenizer puts before it."""
    return len(_encode_plain(tokenizer, text).ids)


def is_plain(tokenizer: Any, *, raw: bool) -> bool:
    """Return whether a question is read as plain text, without a chat template."""
    return raw or tokenizer.chat_template is None


def strip_answer(text: str, *, joined: bool = False) -> str:
    r"""Return an answer without white space and byte order mark around it, as ``evaluate`` takes the model's own.

    Args:
        text: An answer, or any text.
        joined: Keep white space before it, because it is where the text joins the text before.

    Example:
        >>> strip_answer("\ufeff Paris.\n")
        'Paris.'
        >>> strip_answer("\ufeff Paris.\n", joined=True)
        ' Paris.'
    """
    ends = "".join(sorted({c for c in text if c.isspace()})) + BOM
    return text.strip(BOM).rstrip(ends) if joined else text.strip(ends)


def _messages(prompt: str | Sequence[MessageLike]) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    _check(messages)
    if not messages or not strip_answer(messages[-1]["content"]):
        raise PromptError("the question is empty; ask something")
    return messages


def _check(messages: Sequence[MessageLike]) -> None:
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise PromptError(f"a message needs a role and a content, both text, got {sorted(message)}")


def _joined(messages: Sequence[MessageLike]) -> str:
    return "\n".join(m["content"] for m in messages)


def _encode_plain(tokenizer: Any, text: str) -> Prompt:
    """Encode plain text after the beginning-of-text token, where there is one, and without one that would end it."""
    ids = _start(tokenizer, text) + get_encoder(tokenizer).encode(text).ids
    special = set(tokenizer.all_special_ids)
    return Prompt(ids, [i not in special for i in ids], describe_text_form(text))


def _start(tokenizer: Any, text: str) -> list[int]:
    """Return the ids before a text, from which its first token is predicted."""
    ids, bos = get_encoder(tokenizer).start_ids(), tokenizer.bos_token_id
    if bos is None or ids[:1] == [bos] or (not ids and text.startswith(tokenizer.bos_token)):
        return ids
    return [bos, *ids]


def _encode_border(tokenizer: Any, before: str, text: str) -> tuple[Prompt, list[int]]:
    ids, spans = get_encoder(tokenizer).encode(before + text, (len(before),))
    start = _start(tokenizer, before + text)
    border = next((i for i, (_, end) in enumerate(spans) if end > len(before)), len(ids))
    if not start and not border:  # one token holds all of the question, and nothing would predict it
        return _encode_plain(tokenizer, before), get_encoder(tokenizer).encode(text).ids
    special = set(tokenizer.all_special_ids)
    read = [*start, *ids[:border]]
    return Prompt(read, [i not in special for i in read], describe_text_form(before)), ids[border:]


def _encode_chat(tokenizer: Any, messages: list[dict[str, str]], numbers: list[int], *, answer_next: bool) -> Turns:
    """Encode a chat and locate the words of the messages in ``numbers``; others' may count as the template's."""
    text, owners = render_chat(tokenizer, messages, numbers, answer_next=answer_next)
    encoder = get_encoder(tokenizer)
    edges = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
    answers = {i for i, m in enumerate(messages) if m["role"] == "assistant"}
    encoded = encoder.encode(text, edges)
    theirs, usurped = _control_of(tokenizer, encoder, encoded, text, owners, answers)
    if usurped:
        kept = [
            match.span()
            for first, end in pairwise(edges)
            for match in encoder.pattern.finditer(text, first, end)
            if owners[first] == -1 or (owners[first] in answers and not encoder.control[match[0]].special)
        ]
        encoded = encoder.encode_letters(text, kept)
        again, usurped = _control_of(tokenizer, encoder, encoded, text, owners, answers)
        if usurped or not again >= theirs:
            raise PromptError("a message holds the text of a control token that cannot be read as letters; remove it")
    turn = np.where(np.isin(owners, numbers), owners, -1).tolist()
    return Turns(encoded.ids, [max(turn[a:b], default=-1) for a, b in encoded.spans])


def _control_of(
    tokenizer: Any, encoder: Encoder, encoded: Encoded, text: str, owners: Ints, answers: set[int]
) -> tuple[Counter[int], bool]:
    """Count the control tokens of the template, and return whether a message's text became one.

    The assistant may write those that are not special, such as what parts its thoughts from its answer.
    """
    theirs: Counter[int] = Counter()
    usurped, unknown = False, tokenizer.unk_token_id
    for i, (a, b) in zip(encoded.ids, encoded.spans, strict=True):
        token = encoder.by_id.get(i)
        if token is None or (i == unknown and token.text not in text[a:b]):  # of an unknown character
            continue
        piece = text[a:b]
        first = a + len(piece) - len(piece.lstrip())  # some tokens include white space next to them
        writers = {*owners[first : max(first + 1, a + len(piece.rstrip()))].tolist()} - {-1}
        if writers:
            usurped |= token.special or not writers <= answers
        else:
            theirs[i] += 1
    return theirs, usurped
