"""Renders tokens as HTML, each in its colour and with its numbers as data. All text is escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from html import escape

from selfdoubt.lm.answer import Token
from selfdoubt.lm.risk_levels import find_risk_level
from selfdoubt.serve.chat.phrases import LEVEL_NAMES, format_share

#: A user's words surprise a model more than its own: their surprisal counts a quarter, as on a terminal.
QUESTION_WEIGHT = 1 / 4


def render_token(token: Token, number: int, *, is_question: bool = False) -> str:
    """Return one token as HTML. Its numbers are in ``data-d``, in the order that ``chat.js`` reads.

    Args:
        token: The token.
        number: Its place, from 0; the first can be reached by the tab key, the others by arrows from there.
        is_question: It is part of the question.
    """
    rank = find_risk_level(token.nll * QUESTION_WEIGHT if is_question else token.risk)
    numbers = [
        token.logprob, token.total, token.epistemic, token.aleatoric, token.disagreement, token.risk, rank,
        [[other.text, other.probability, other.id == token.id] for other in token.alternatives],
    ]  # fmt: skip
    name = (
        f"{token.text.strip() or 'no letter'}: probability {format_share(math.exp(token.logprob))}, {LEVEL_NAMES[rank]}"
    )
    kind = f"t t{rank}" + ("" if token.text else " part")
    return (
        f'<span class="{kind}" role="button" tabindex="{0 if number == 0 else -1}" data-k="{number}" '
        f'aria-label="{escape(name)}" data-d="{escape(_short(numbers))}">{escape(token.text)}</span>'
    )


def render_tokens(tokens: Iterable[Token], *, is_question: bool = False) -> str:
    """Return tokens as HTML, one after the other."""
    return "".join(render_token(token, i, is_question=is_question) for i, token in enumerate(tokens))


def render_question(text: str, tokens: list[Token]) -> str:
    """Return a question in its colours: has the model met this subject? Text without a number (yet) stays plain."""
    text = text.strip()
    tokens = _find_last(tokens, text)
    joined = "".join(t.text for t in tokens)
    known = joined.strip()
    plain = text.removesuffix(known)
    gap = joined[: len(joined) - len(joined.lstrip())] if plain else ""
    if not known or not text.endswith(known) or not plain.endswith(gap):
        return escape(text)
    return escape(plain.removesuffix(gap)) + render_tokens(tokens, is_question=True)


def _find_last(tokens: list[Token], question: str) -> list[Token]:
    """Return the tokens of the question alone: without a chat template, earlier messages count as its own, too."""
    text = ""
    for first in range(len(tokens) - 1, -1, -1):
        text = tokens[first].text + text
        if text.strip() == question:
            return tokens[first:]
    return tokens


def render_legend(levels: Iterable[tuple[str, str]]) -> str:
    """Return the legend of the colours: each level's name and bound, the surest first."""
    items = "".join(
        f'<li><span class="t t{i}">{escape(name)}</span> <small>{escape(bound)}</small></li>'
        for i, (name, bound) in enumerate(levels)
    )
    return f'<ul class="legend" aria-label="Colours: how probable each word was to the model">{items}</ul>'


def _short(numbers: object) -> str:
    return json.dumps(_rounded(numbers), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [_rounded(v) for v in value] if isinstance(value, list) else value
