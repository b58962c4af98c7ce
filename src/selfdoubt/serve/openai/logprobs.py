"""Log-probabilities as OpenAI defines them, in the newer shape of chats and the older one of completions."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Any

from selfdoubt.lm.answer import Token
from selfdoubt.lm.text.detokenizer import decode_between

#: OpenAI's number for what is as good as impossible.
IMPOSSIBLE = -9999.0
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def of_chat(tokenizer: Any, token: Token, top: int) -> dict[str, Any]:
    """One token of ``logprobs.content``, with the ``top`` most probable ones in its place."""
    return {
        **_entry(tokenizer, token.id, token.text, token.logprob),
        "top_logprobs": [
            _entry(tokenizer, token.id, token.text, token.logprob)
            if a.id == token.id
            else _entry(tokenizer, a.id, a.text, _log(a.probability))
            for a in token.alternatives[:top]
        ],
    }


def of_text(tokenizer: Any, tokens: list[Token], top: int, offset: int = 0) -> dict[str, Any]:
    """``logprobs`` of a completion; ``offset`` is where its text begins."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        entry = _entry(tokenizer, token.id, token.text, token.logprob)
        found["tokens"].append(entry["token"])
        found["token_logprobs"].append(entry["logprob"])
        others = [
            _entry(tokenizer, a.id, a.text, _log(a.probability)) for a in token.alternatives[:top] if a.id != token.id
        ]
        named = {e["token"]: e["logprob"] for e in reversed(others)}  # of two with the same text the first counts
        found["top_logprobs"].append({**named, entry["token"]: entry["logprob"]})
        found["text_offset"].append(offset)
        offset += len(token.text)
    return {**found, "top_logprobs": found["top_logprobs"] if top else None}


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """Return the UTF-8 bytes of a token among others, or of its part of a character; None where they are unknown."""
    text = decode_between(tokenizer, token)
    if "\ufffd" not in text:
        return text.encode()
    piece = tokenizer.convert_ids_to_tokens(token)
    if found := _BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    table = _byte_alphabet()
    if all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return None


def _entry(tokenizer: Any, token: int, text: str, logprob: float) -> dict[str, Any]:
    """A token; ``text`` is what it adds where it stands, with remains of others before it."""
    raw = token_bytes(tokenizer, token)
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
    """Which byte each character of byte-level BPE stands for (Radford et al., 2019): printable ones for themselves."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
