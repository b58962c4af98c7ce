"""Turns token ids into text piece by piece; the pieces add up to the text that the tokenizer decodes from all ids."""

from __future__ import annotations

import codecs
import re
from collections.abc import Generator, Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
#: A token of one byte, as tokenizers with byte fallback write it.
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: Number of tokens that are decoded again with each new one, because some tokenizers join words by their neighbours: at
#: most the first, cut to the second. Bytes of a character of UTF-8 before and behind a cut are fewer.
_MOST, _KEPT = 16, 8
#: Number of ids that are decoded per chunk.
TEXTS = 256
#: Number of ids before a text among which a token with visible text is looked for.
_REACH = 32


class Detokenizer:
    """A decoder of token ids that come one by one.

    A piece is released when no later token can change it. A character whose bytes are several tokens waits until it is
    complete. Where a tokenizer falls back to bytes (``<0xE6>``), a whole run of them waits for its end, because one
    wrong byte turns all of the run into U+FFFD.

    Args:
        tokenizer: A Hugging Face tokenizer.
        before: Ids of a text that this one continues, so that its first token keeps the space between the two. Without
            them the text stands by itself: tokenizers that write a space before a first word leave it out.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.pending = False  #: the last tokens have text that later ones decide
        self.ahead = ""  #: the characters of the pending text that the last token completed, if no wrong byte follows
        self._tokenizer = tokenizer
        self._ids = _last_word(tokenizer, before)
        self._bytes = [False] * len(self._ids)
        self._emitted = self._decode(self._ids)  # the part of the ids' text that was released
        self._run: list[str] = []  # of the run of bytes, the characters that each token completes
        self._utf8: codecs.IncrementalDecoder | None = None  # of the run; None where it is not UTF-8

    def add(self, token: int) -> str:
        """Add a token; return the text that is certain now, empty while a character or a run is incomplete."""
        late, text = self.push(token)
        return "".join(late) + text

    def push(self, token: int) -> tuple[list[str], str]:
        """Add a token; return the texts that are certain now: of the tokens right before it, and its own."""
        self.ahead = ""
        piece = get_piece(self._tokenizer, token)
        if piece is None:  # beyond the vocabulary: decoding leaves it out
            if self._run:
                self._run.append("")
            return [], ""
        if byte := BYTE_TOKEN.fullmatch(piece):
            self._ids.append(token)
            self._bytes.append(True)
            self.pending = True
            self._hear(bytes([int(byte[1], 16)]))
            return [], ""
        late = self.rest() if self._run else []
        self._run = []
        self._emitted += "".join(late)
        self._ids.append(token)
        self._bytes.append(False)
        text = self._decode(self._ids)
        self.pending = text.endswith(_REPLACEMENT) and len(text) > len(self._emitted)
        certain = text[: len(text) - self.pending]
        piece_text = certain[len(self._emitted) :]
        self._emitted = certain if piece_text else self._emitted
        self._forget()
        return late, piece_text

    def flush(self) -> str:
        """Return the pending text at the end, as it is decoded when nothing follows."""
        return self._decode(self._ids)[len(self._emitted) :]

    def rest(self) -> list[str]:
        """Return the pending text split into the texts of the last tokens; empty if nothing is pending."""
        text = self.flush()
        if "".join(self._run) == text:
            return list(self._run)
        if len(self._run) == len(text):  # a wrong byte among them: each has become U+FFFD
            return list(text)
        return [""] * (len(self._run) - 1) + [text]

    def _hear(self, byte: bytes) -> None:
        """Follow the characters of a run of bytes as long as it is UTF-8."""
        if not self._run:
            self._utf8 = codecs.getincrementaldecoder("utf-8")()
        if self._utf8 is not None:
            try:
                self.ahead = self._utf8.decode(byte)
            except UnicodeDecodeError:
                self._utf8 = None
        self._run.append(self.ahead)

    def _forget(self) -> None:
        """Cut the window, never inside of a run of bytes."""
        if len(self._ids) > _MOST:
            places = [i for i in range(len(self._ids) - _KEPT, len(self._ids)) if not self._bytes[i]]
            # A first token that shows nothing, a mere space, would take the space after it along.
            first = next((i for i in places if self._decode([self._ids[i]])), None)
            if first is None:
                if len(self._ids) < 4 * _MOST:
                    return
                first = places[0]
            self._ids, self._bytes = self._ids[first:], self._bytes[first:]
            text = self._decode(self._ids)
            self._emitted = text[: len(text) - self.pending]

    def _decode(self, ids: list[int]) -> str:
        return _decode(self._tokenizer, ids)


def detokenize_in_chunks(
    tokenizer: Any, ids: Sequence[int], before: Sequence[int] = ()
) -> Generator[None, None, list[str]]:
    """Decode each id to its piece of text, some hundreds at a time; the pieces add up to the text of all.

    Args:
        tokenizer: A Hugging Face tokenizer.
        ids: Token ids of a text.
        before: Ids that the text continues, see ``Detokenizer``.

    Yields:
        Nothing, after each ``TEXTS`` ids.

    Returns:
        A text per id.
    """
    pieces = Detokenizer(tokenizer, before)
    texts: list[str] = []
    for token in ids:
        late, text = pieces.push(token)
        _add_last(texts, late)
        texts.append(text)
        if not len(texts) % TEXTS:
            yield
    _add_last(texts, pieces.rest())
    return texts


def _add_last(texts: list[str], late: list[str]) -> None:
    for place, text in enumerate(late, len(texts) - len(late)):
        texts[place] += text


def decode_between(tokenizer: Any, token: int) -> str:
    """Return the text of one token as it stands among others: with its space. U+FFFD stands for parts of characters."""
    if get_piece(tokenizer, token) is None:
        return ""
    alone = _decode(tokenizer, [token])
    return _decode(tokenizer, [token, token])[len(alone) :] or alone


class TextsBetween(dict[int, str]):
    """A cache of ``decode_between`` by token id."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        """Decode the token, once."""
        self[token] = decode_between(self._tokenizer, token)
        return self[token]


def _last_word(tokenizer: Any, before: Sequence[int]) -> list[int]:
    """Return the last of these ids with a visible text, as a list; empty if there is none within ``_REACH``."""
    for token in reversed(before[-_REACH:]):
        piece = get_piece(tokenizer, token)
        if piece is not None and not BYTE_TOKEN.fullmatch(piece):
            text = _decode(tokenizer, [token])
            if text and _REPLACEMENT not in text:
                return [token]
    return []


def get_piece(tokenizer: Any, token: int) -> str | None:
    """Return a token's name in the vocabulary; None beyond its end, where sentencepiece raises."""
    try:
        piece: str | None = tokenizer.convert_ids_to_tokens(token)
    except IndexError:
        return None
    return piece


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # transformers 5 decodes no ids to "", but a tokenizer of one's own may not.
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""
