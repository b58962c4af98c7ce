"""Text at the edge: from messages to token ids that know which of them a person wrote, and back to pieces of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from selfdoubt.errors import PromptError
from selfdoubt.lm.form import CHAT, chat_form, text_form

Message = Mapping[str, str]

#: A private character that no template and no person writes.
_MARK = "\ue000"


class Prompt(NamedTuple):
    """Token ids, and whether each is part of the last message's own words rather than of the template."""

    ids: list[int]
    own: list[bool]
    form: str = CHAT  #: of all but the last message, see ``selfdoubt.lm.form``


class Turns(NamedTuple):
    """Token ids of a chat, and for each the number of the message whose words it is part of (-1: the template's)."""

    ids: list[int]
    turn: list[int]


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
    _check(messages)
    if not messages or not messages[-1]["content"].strip():
        raise PromptError("the question is empty; ask something")
    if raw or tokenizer.chat_template is None:
        text = messages[-1]["content"] if len(messages) == 1 else "\n".join(m["content"] for m in messages)
        return _encode_text(tokenizer, text)
    last = len(messages) - 1
    turns = _encode_chat(tokenizer, messages, {last}, answer_next=True)
    form = chat_form(messages)
    if last and form != CHAT and messages[last]["role"] == "user" and _is_alone(tokenizer, messages[last], turns.ids):
        form = CHAT
    return Prompt(turns.ids, [turn == last for turn in turns.turn], form)


def _is_alone(tokenizer: Any, message: dict[str, str], ids: list[int]) -> bool:
    """Return whether a chat reads like its last message alone, because the template leaves the others out."""
    try:
        return _encode_chat(tokenizer, [message], {0}, answer_next=True).ids == ids
    except PromptError:
        return False


def encode_turns(tokenizer: Any, messages: Sequence[Message]) -> Turns:
    """Token ids of a whole chat with its answers, as the chat template renders it, to learn from.

    Raises:
        PromptError: If a message lacks its parts, or the template refuses the chat.
    """
    own = [dict(m) for m in messages]
    _check(own)
    return _encode_chat(tokenizer, own, set(range(len(own))), answer_next=False)


def _check(messages: Sequence[Message]) -> None:
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise PromptError(f"a message needs a role and a content, both text, got {sorted(message)}")


def _encode_text(tokenizer: Any, text: str) -> Prompt:
    """Plain text, after the beginning-of-text token where there is one: something must predict the first word."""
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    special = set(tokenizer.all_special_ids)
    return Prompt(ids, [i not in special for i in ids], text_form(text))


def _encode_chat(tokenizer: Any, messages: list[dict[str, str]], wanted: set[int], *, answer_next: bool) -> Turns:
    """Ids of a chat; the turns in ``wanted`` are told apart, the words of others may count as the template's."""
    messages = [dict(m, content=m["content"].strip()) for m in messages]
    specials = {str(t) for t in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    if tokenizer.is_fast and not any(s in m["content"] for m in messages for s in specials if s):
        pieces = _pieces(tokenizer, messages, wanted, answer_next=answer_next)
        text = "".join(piece for piece, _ in pieces)
        if text == _render(tokenizer, messages, answer_next=answer_next):
            return _encode_whole(tokenizer, text, pieces)
    return _encode_apart(tokenizer, messages, answer_next=answer_next)


def _pieces(
    tokenizer: Any, messages: list[dict[str, str]], wanted: set[int], *, answer_next: bool
) -> list[tuple[str, int]]:
    """The rendered chat cut into the template's text (-1) and the words of the wanted turns, in their order.

    Where words stand is asked of the template, by marks in their place: the same words may stand elsewhere in it, too
    ("user", "assistant"). A turn that the template leaves out is left out.
    """
    marks = {i: f"{_MARK}{i}{_MARK}" for i in sorted(wanted)}
    marked = [dict(m, content=marks.get(i, m["content"])) for i, m in enumerate(messages)]
    rest = _render(tokenizer, marked, answer_next=answer_next)
    pieces: list[tuple[str, int]] = []
    for i, mark in marks.items():
        before, found, after = rest.partition(mark)
        if found:
            pieces += [(before, -1), (messages[i]["content"], i)]
            rest = after
    return [*pieces, (rest, -1)]


def _encode_whole(tokenizer: Any, text: str, pieces: list[tuple[str, int]]) -> Turns:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    owners = [owner for piece, owner in pieces for _ in piece]  # of each character
    turn = [max(owners[a:b], default=-1) for a, b in encoded["offset_mapping"]]
    return Turns(list(encoded["input_ids"]), turn)


def _encode_apart(tokenizer: Any, messages: list[dict[str, str]], *, answer_next: bool) -> Turns:
    """Encode template and contents one by one, so that control tokens in a content stay plain text.

    Otherwise a person could end their own turn and speak as somebody else.
    """
    pieces = _pieces(tokenizer, messages, set(range(len(messages))), answer_next=answer_next)
    absent = [i for i in range(len(messages)) if i not in {owner for _, owner in pieces}]
    if absent:
        role = messages[absent[0]]["role"]
        raise PromptError(f"the chat template leaves out message {absent[0] + 1} ({role}); ask without it")
    ids: list[int] = []
    turn: list[int] = []
    for text, owner in pieces:
        if text:
            piece = tokenizer(text, add_special_tokens=False, split_special_tokens=owner >= 0)["input_ids"]
            ids.extend(piece)
            turn.extend([owner] * len(piece))
    return Turns(ids, turn)


def _render(tokenizer: Any, messages: list[dict[str, str]], *, answer_next: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next))
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
