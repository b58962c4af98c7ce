"""Formats log-probabilities as OpenAI defines them, in the newer shape of chats and the older one of completions."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from selfdoubt.lm.answer import Token
from selfdoubt.lm.text.detokenizer import BYTE_TOKEN, decode_between

#: OpenAI's number for a token that is as good as impossible.
IMPOSSIBLE = -9999.0


def format_chat_logprobs(tokenizer: Any, token: Token, top: int) -> dict[str, Any]:
    """Return one token of ``logprobs.content``, with the ``top`` most probable ones in its place."""
    return {
        **_entry(tokenizer, token.id, token.text, token.logprob),
        "top_logprobs": [
            _entry(tokenizer, token.id, token.text, token.logprob)
            if a.id == token.id
            else _entry(tokenizer, a.id, a.text, _log(a.probability))
            for a in token.alternatives[:top]
        ],
    }


def format_completion_logprobs(tokenizer: Any, tokens: list[Token], top: int, offset: int = 0) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion; ``offset`` is where its text begins."""
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        entry = _entry(tokenizer, token.id, token.text, token.logprob)
        columns["tokens"].append(entry["token"])
        columns["token_logprobs"].append(entry["logprob"])
        others = [
            _entry(tokenizer, a.id, a.text, _log(a.probability)) for a in token.alternatives[:top] if a.id != token.id
        ]
        named = {e["token"]: e["logprob"] for e in reversed(others)}  # of two with the same text the first counts
        columns["top_logprobs"].append({**named, entry["token"]: entry["logprob"]})
        columns["text_offset"].append(offset)
        offset += len(token.text)
    return {**columns, "top_logprobs": columns["top_logprobs"] if top else None}


def find_token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """Return the UTF-8 bytes of a token among others, or of its part of a character; None where they are unknown."""
    text = decode_between(tokenizer, token)
    if "\ufffd" not in text:
        return text.encode()
    piece = tokenizer.convert_ids_to_tokens(token)
    if match := BYTE_TOKEN.fullmatch(piece):
        return bytes([int(match[1], 16)])
    table = _byte_alphabet()
    if all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return None


def _entry(tokenizer: Any, token: int, text: str, logprob: float) -> dict[str, Any]:
    """Return a token; ``text`` is the text that it adds where it stands, with remains of others before it."""
    raw = find_token_bytes(tokenizer, token)
    whole = None if raw is None else _text(raw)
    if text and whole is not None and (whole == f" {text}" or whole.startswith(text)):
        whole, raw = text, text.encode()  # as it stands in the answer: without its space, or cut at a stop
    if whole is None:
        whole = "\ufffd" if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return {"token": whole, "logprob": max(logprob, IMPOSSIBLE), "bytes": None if raw is None else list(raw)}


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else IMPOSSIBLE


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE (Radford et al., 2019): printable ones are their own."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
