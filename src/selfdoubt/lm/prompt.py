"""Text at the edge: from messages to token ids that know which of them a person wrote, and back to pieces of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from selfdoubt.errors import PromptError

Message = Mapping[str, str]

#: A private character that no template and no person writes.
_MARK = "\ue000"


class Prompt(NamedTuple):
    """Token ids, and whether each is part of the last message's own words rather than of the template."""

    ids: list[int]
    own: list[bool]


def encode(tokenizer: Any, prompt: str | Sequence[Message], *, raw: bool = False) -> Prompt:
    """Token ids of a question or of chat messages.

    Args:
        tokenizer: A Hugging Face tokenizer.
        prompt: A question, or messages with ``role`` and ``content``.
        raw: Take the text as it is, without the chat template.

    Raises:
        PromptError: If there is nothing to read, or a message lacks its parts.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise PromptError(f"a message needs a role and a content, both text, got {sorted(message)}")
    if not messages or not messages[-1]["content"].strip():
        raise PromptError("the question is empty; ask something")
    if raw or tokenizer.chat_template is None:
        text = messages[-1]["content"] if len(messages) == 1 else "\n".join(m["content"] for m in messages)
        return _encode_text(tokenizer, text)
    return _encode_chat(tokenizer, messages)


def _encode_text(tokenizer: Any, text: str) -> Prompt:
    """Plain text, after the beginning-of-text token where there is one: something must predict the first word."""
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    special = set(tokenizer.all_special_ids)
    return Prompt(ids, [i not in special for i in ids])


def _encode_chat(tokenizer: Any, messages: list[dict[str, str]]) -> Prompt:
    messages = [dict(m, content=m["content"].strip()) for m in messages]
    contents = [m["content"] for m in messages]
    specials = {str(t) for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    if tokenizer.is_fast and not any(s in c for c in contents for s in specials if s):
        # Where the words stand is asked of the template: they may stand elsewhere in it, too ("user", "assistant").
        before, _, after = _render(tokenizer, [*messages[:-1], dict(messages[-1], content=_MARK)]).partition(_MARK)
        rendered = _render(tokenizer, messages)
        if rendered == before + contents[-1] + after:
            start, end = len(before), len(before) + len(contents[-1])
            encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
            spans = encoded["offset_mapping"]
            return Prompt(list(encoded["input_ids"]), [a < end and b > start and b > a for a, b in spans])
    return _encode_apart(tokenizer, messages)


def _encode_apart(tokenizer: Any, messages: list[dict[str, str]]) -> Prompt:
    """Encode template and contents one by one, so that control tokens in a content stay plain text.

    Otherwise a person could end their own turn and speak as somebody else.
    """
    marks = [f"{_MARK}{i}{_MARK}" for i in range(len(messages))]
    rendered = _render(tokenizer, [dict(m, content=mark) for m, mark in zip(messages, marks, strict=True)])
    ids: list[int] = []
    own: list[bool] = []

    def add(text: str, *, is_own: bool, plain: bool) -> None:
        if text:
            piece = tokenizer(text, add_special_tokens=False, split_special_tokens=plain)["input_ids"]
            ids.extend(piece)
            own.extend([is_own] * len(piece))

    for i, mark in enumerate(marks):
        before, found, rendered = rendered.partition(mark)
        if not found:
            raise PromptError(f"the chat template leaves out message {i + 1} ({messages[i]['role']}); ask without it")
        add(before, is_own=False, plain=False)
        add(messages[i]["content"], is_own=i == len(marks) - 1, plain=True)
    add(rendered, is_own=False, plain=False)
    return Prompt(ids, own)


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are programs: they raise what they like
        raise PromptError(f"the model's chat template refuses these messages: {error}") from error


class Detokenizer:
    """Turns ids into pieces of text one by one; the pieces add up to the text of all ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # ids before this one no longer change the text
        self._emitted = ""

    def add(self, token: int) -> str:
        """The text that this token adds; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._emitted) :]
        # A few tokens stay in the window, because some tokenizers join words by their neighbours.
        if len(self._ids) - self._start > 16:
            self._start = len(self._ids) - 8
            self._emitted = self._decode(self._ids[self._start :])
        else:
            self._emitted = text
        return piece

    def flush(self) -> str:
        """What is left at the end: the remains of a character that never became whole."""
        return self._decode(self._ids[self._start :])[len(self._emitted) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)
