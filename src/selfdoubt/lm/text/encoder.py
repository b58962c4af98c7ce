"""Turns text into token ids, from any number of threads at once: no shared setting is ever changed.

A Hugging Face tokenizer sets padding, truncation and the treatment of control tokens on one shared Rust object in every
call. Here each treatment has a Rust object of its own, set up once; they share the vocabulary, so they take no memory.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from selfdoubt.errors import PromptError
from selfdoubt.lm.text.detokenizer import BYTE_TOKEN

_FLAGS = ("lstrip", "rstrip", "single_word")
#: Held while a tokenizer in Python works, and while a new encoder is made.
_LOCK = threading.RLock()


class Encoded(NamedTuple):
    """Token ids, and for each the characters ``[first, end)`` of the text that it stands for."""

    ids: list[int]
    spans: list[tuple[int, int]]


class Control(NamedTuple):
    """A control token; ``special`` says whether the tokenizer calls it so, or only the chat template writes it."""

    text: str
    id: int
    special: bool


class Encoder:
    """An encoder around a tokenizer in Rust. It is never changed, so threads may share it. See ``get_encoder``.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._added: dict[int, Any] = self._backend.get_added_tokens_decoder()
        self.control = _control(tokenizer)  #: by text
        self._plain = self._copy(())
        self._secret = secrets.token_hex(8)  # part of the text that stands for a real control token; not to be guessed

    @cached_property
    def by_id(self) -> dict[int, Control]:
        """The control tokens by id."""
        return {token.id: token for token in self.control.values()}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A pattern of the texts of control tokens; where several start at the same place, the longest."""
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str, borders: Sequence[int] = ()) -> Encoded:  # noqa: ARG002 - for tokenizers in Python
        """Encode a text in which control tokens count as such; nothing is put before or after it.

        Args:
            text: Any text.
            borders: Characters at which spans have to be right; here they are right everywhere.

        Raises:
            PromptError: If the text holds half a surrogate pair, which is not a character.
        """
        check_text(text)
        encoding = self._plain.encode(text, add_special_tokens=False)
        return Encoded(encoding.ids, encoding.offsets)

    def encode_letters(self, text: str, kept: Sequence[tuple[int, int]] = ()) -> Encoded:
        """Encode a text in which control tokens are plain letters, except for those at ``kept``.

        Args:
            text: Any text.
            kept: Characters ``[first, end)`` of control tokens that count as such, in their order.

        Raises:
            PromptError: If the text holds half a surrogate pair.
        """
        check_text(text)
        lettering, names, real = self._lettering
        pieces: list[str] = []
        back: list[int] = []  # for each character of the encoded text, and for its end, the place in the given text
        at = 0
        for first, end in kept:
            name = names[text[first:end]]
            pieces += [text[at:first], name]
            back += [*range(at, first), first, *[end] * (len(name) - 1)]
            at = end
        pieces.append(text[at:])
        back += range(at, len(text) + 1)
        encoding = lettering.encode("".join(pieces), add_special_tokens=False)
        return Encoded([real.get(i, i) for i in encoding.ids], [(back[a], back[b]) for a, b in encoding.offsets])

    def start_ids(self) -> list[int]:
        """Return the ids that the tokenizer puts before a text, usually the beginning-of-text token or none.

        Ids that it puts after a text are left out: a prompt that has ended cannot be continued.
        """
        processor = self._backend.post_processor
        if processor is None:
            return []
        whole = processor.process(self._plain.encode("a", add_special_tokens=False))
        count = next((i for i, added in enumerate(whole.special_tokens_mask) if not added), 0)
        return list(whole.ids[:count])

    @cached_property
    def _lettering(self) -> tuple[Any, dict[str, str], dict[int, int]]:
        """Takes control tokens for letters; knows each by another name; and which id is meant by that."""
        from tokenizers import AddedToken

        names = {text: f"\ue000{self._secret}:{i}\ue001" for i, text in enumerate(self.control)}
        copied = self._copy(self.control)
        known = {token.content: token for token in self._added.values()}
        copied.add_tokens([
            AddedToken(name, normalized=False, **{flag: getattr(known.get(text), flag, False) for flag in _FLAGS})
            for text, name in names.items()
        ])  # fmt: skip
        copied.encode_special_tokens = True
        return copied, names, {copied.token_to_id(name): self.control[text].id for text, name in names.items()}

    def _copy(self, special: Any) -> Any:
        """Make another object on the same vocabulary, without truncation, padding and post-processing."""
        from tokenizers import AddedToken, Tokenizer

        copied = Tokenizer(self._backend.model)
        for part in ("normalizer", "pre_tokenizer"):
            if (value := getattr(self._backend, part)) is not None:
                setattr(copied, part, value)
        copied.add_tokens([
            AddedToken(
                t.content, special=t.special or t.content in special, normalized=t.normalized,
                **{flag: getattr(t, flag) for flag in _FLAGS},
            )
            for _, t in sorted(self._added.items())
        ])  # fmt: skip
        if all(copied.token_to_id(t.content) == i for i, t in self._added.items()):
            return copied
        data = json.loads(self._backend.to_str()) | {"truncation": None, "padding": None, "post_processor": None}
        for token in data["added_tokens"]:
            token["special"] |= token["content"] in special
        return Tokenizer.from_str(json.dumps(data))


class SlowEncoder(Encoder):
    """An encoder around a tokenizer in Python, which one thread uses at a time.

    It does not say where its tokens stand: spans reach from border to border.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.control = _control(tokenizer)

    def encode(self, text: str, borders: Sequence[int] = ()) -> Encoded:
        """See ``Encoder``; each border costs another pass over the text before it."""
        check_text(text)
        edges = sorted({0, len(text), *borders})
        with _LOCK:
            ids = self._ids(text)
            counts = [0, *(_common(self._ids(text[:border]), ids) for border in edges[1:-1]), len(ids)]
        spans: list[tuple[int, int]] = []
        for span, count in zip(pairwise(edges), counts[1:], strict=False):
            spans += [span] * (count - len(spans))
        return Encoded(ids, spans)

    def encode_letters(self, text: str, kept: Sequence[tuple[int, int]] = ()) -> Encoded:
        """See ``Encoder``."""
        check_text(text)
        added = self._tokenizer.added_tokens_decoder
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        at, strip = 0, False
        with _LOCK:
            for first, end in [*kept, (len(text), len(text))]:
                token = added.get(self.control[text[first:end]].id) if end > first else None
                piece = text[at:first].lstrip() if strip else text[at:first]
                piece_ids = self._ids(piece.rstrip() if getattr(token, "lstrip", False) else piece, letters=True)
                ids += piece_ids
                spans += [(at, first)] * len(piece_ids)
                if end > first:
                    ids.append(self.control[text[first:end]].id)
                    spans.append((first, end))
                at, strip = end, bool(getattr(token, "rstrip", False))
        return Encoded(ids, spans)

    def start_ids(self) -> list[int]:
        """See ``Encoder``."""
        with _LOCK:
            bare, whole = self._ids("a"), list(self._tokenizer("a")["input_ids"])
        places = range(len(whole) - len(bare) + 1)
        return next((whole[:i] for i in places if whole[i : i + len(bare)] == bare), [])

    def _ids(self, text: str, *, letters: bool = False) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": letters}
        return list(self._tokenizer(text, **options)["input_ids"]) if text else []


_KNOWN: WeakKeyDictionary[Any, tuple[Any, Encoder]] = WeakKeyDictionary()


def get_encoder(tokenizer: Any) -> Encoder:
    """Return the encoder of a tokenizer, the same one until the tokenizer gets other tokens or another template."""
    if not tokenizer.is_fast:
        return SlowEncoder(tokenizer)
    key = len(tokenizer), tokenizer.chat_template, tokenizer.all_special_tokens
    with _LOCK:
        known, encoder = _KNOWN.get(tokenizer, (None, None))
        if encoder is None or known != key:
            encoder = Encoder(tokenizer)
            _KNOWN[tokenizer] = key, encoder
        return encoder


def check_text(text: str) -> None:
    """Check that a text can be encoded as UTF-8.

    Raises:
        PromptError: If it holds half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text holds half a surrogate pair at character {error.start + 1}, which is not a character; remove it"
        ) from None


def _control(tokenizer: Any) -> dict[str, Control]:
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    template = str(tokenizer.chat_template or "")
    tokens = {text: Control(text, i, True) for text, i in named.items()}
    for i, token in tokenizer.added_tokens_decoder.items():
        text = str(token)
        # A token for white space or a letter is text, also where a template writes it.
        written = len(text) > 2 and text in template and not text.replace("▁", " ").isspace()
        if token.special or text in named or written:
            tokens[text] = Control(text, i, bool(token.special) or text in named)
    return {text: token for text, token in tokens.items() if text and not BYTE_TOKEN.fullmatch(text)}


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the leading ids that both have."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
