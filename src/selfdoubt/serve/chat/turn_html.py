"""Renders one turn as HTML: a frame with named places, and the content of each.

While an answer grows only its end is new: HTML is appended to a place whose new content begins with the old one, so
that the rest is neither sent nor replaced. So a keyboard's focus and a selection stay where they are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from html import escape
from typing import Any

from selfdoubt.lm.calibration import Calibration
from selfdoubt.serve.chat import phrases, tokens_html
from selfdoubt.serve.chat.conversation import Attempt, Turn, get_confidence
from selfdoubt.serve.chat.plot import render_risk_plot

#: Seconds between two drawings of a plot that grows.
REDRAW_SECONDS = 0.25


@dataclass(frozen=True)
class RenderedTurn:
    """A turn as HTML."""

    id: int
    state: str
    frame: str  #: elements that have a ``data-part``
    places: dict[str, str]  #: the content of each
    spoken: str  #: text for a screen reader at the end

    def to_json(self) -> dict[str, Any]:
        """Return the turn as ``chat.js`` reads it."""
        return {
            "id": self.id,
            "state": self.state,
            "frame": self.frame,
            "parts": self.places,
            "spoken": self.spoken,
        }


class TurnView:
    """A view of one turn, which caches what has not changed between two drawings."""

    def __init__(self, turn: Turn, calibration: Calibration | None = None) -> None:
        self.turn = turn
        self.calibration = calibration
        self._pieces: dict[int, list[str]] = {}
        self._question = ""
        self._plot = ""
        self._drawn = float("-inf")

    def draw(self) -> RenderedTurn:
        """Return the turn as it is now."""
        turn = self.turn
        if turn.question_tokens and not self._question:
            self._question = tokens_html.render_question(turn.question, turn.question_tokens)
        places = {"ask": self._question or tokens_html.render_question(turn.question, [])}
        if turn.state == "running" and all(turn.hides(t) for t in turn.attempts):
            places["status"] = (
                f'<span class="pulse" aria-hidden="true"></span>{escape(phrases.describe_progress(turn))}'
            )
        elif turn.is_hidden and turn.attempts:
            why = escape(phrases.explain_abstention(turn))
            places["unsure"] = f'<p class="unsure">{escape(turn.shown)}</p><p class="why">{why}</p>'
        elif turn.mode == "until":
            places["status"] = escape(phrases.describe_attempts(turn))
        elif turn.mode == "candidates" and turn.state == "done":
            places["status"] = escape(phrases.describe_candidates(turn))
        elif turn.state == "stopped":
            places["status"] = "Stopped"
        seen = self._find_visible()
        for attempt in seen:
            places[f"say{attempt.seed}"] = self._render_tokens(attempt)
            if attempt.answer is not None:
                places[f"verdict{attempt.seed}"] = self._render_verdict(attempt)
        places["plot"] = self._render_plot()
        if turn.state != "running":
            places["tools"] = self._render_tools()
        spoken = phrases.describe_aloud(turn, self.calibration)
        return RenderedTurn(turn.id, turn.state, _render_frame(turn, seen), places, spoken)

    def _find_visible(self) -> list[Attempt]:
        turn = self.turn
        attempts = turn.attempts if turn.state == "running" else turn.ranked
        if turn.mode != "candidates":
            attempts = [turn.best] if turn.best is not None else []
        return [t for t in attempts if not turn.hides(t)]

    def _render_tokens(self, attempt: Attempt) -> str:
        pieces = self._pieces.setdefault(attempt.seed, [])
        pieces += [
            tokens_html.render_token(token, i) for i, token in enumerate(attempt.tokens[len(pieces) :], len(pieces))
        ]
        html = "".join(pieces)
        if attempt.answer is not None:
            rest = attempt.answer.text.removeprefix("".join(t.text for t in attempt.tokens))
            html += escape(rest) or ("" if attempt.answer.text else "<em>an empty answer</em>")
        return html

    def _render_verdict(self, attempt: Attempt) -> str:
        answer = attempt.answer
        assert answer is not None
        several = self.turn.mode == "candidates"
        statements = phrases.describe_answer(answer, self.calibration, short=several)
        sure = get_confidence(answer)
        text = f"<strong>{escape(statements[0])}</strong>" + "".join(f" · {escape(s)}" for s in statements[1:])
        if several:
            text += f" · seed {attempt.seed}"
        elif self.turn.temperature:
            text += f" · drawn at temperature {self.turn.temperature:g}, seed {attempt.seed}"
        if caveat := phrases.warn_conversation(self.turn, answer):
            text += f" · {escape(caveat)}"
        if sure is None:
            return f'<p class="words">{text}</p>'
        threshold = None if self.calibration is None else self.calibration.threshold
        marks = "" if threshold is None else f'<b style="left:{threshold:.1%}"></b>'
        return (
            f'<div class="gauge" aria-hidden="true"><i style="width:{sure:.1%}"></i>{marks}</div>'
            f'<p class="words">{text}</p>'
        )

    def _render_plot(self) -> str:
        turn = self.turn
        attempt = turn.attempts[-1] if turn.state == "running" and turn.attempts else turn.best
        if attempt is None or not attempt.tokens or (turn.mode == "candidates" and turn.state == "running"):
            return ""
        now = time.monotonic()
        if turn.state != "running" or now - self._drawn >= REDRAW_SECONDS:
            self._plot, self._drawn = render_risk_plot(attempt.tokens, f"say{attempt.seed}"), now
        return self._plot

    def _render_tools(self) -> str:
        turn = self.turn
        first = ""
        if not turn.is_hidden and turn.shown:
            first += f'<button type="button" data-do="copy" data-text="{escape(turn.shown)}">Copy</button>'
        hidden = sum(turn.hides(t) for t in turn.attempts if t.text)
        if hidden:
            which = "" if turn.is_hidden else f" {hidden} more"
            first += f'<button type="button" data-act="reveal">Show{which} anyway</button>'
        last = (
            f'<button type="button" data-do="edit" data-text="{escape(turn.question)}">Edit</button>'
            '<button type="button" data-act="retry">Retry</button>'
        )
        if any(t.answer is not None and get_confidence(t.answer) is not None for t in turn.attempts):
            last += '<button type="button" data-act="until">Try until sure</button>'
        last += '<button type="button" data-act="candidates">Show candidates</button>'
        return f'{first}<span class="last">{last}</span>'


def _render_frame(turn: Turn, seen: list[Attempt]) -> str:
    """Return the places of a turn; static except for the seeds."""
    many = turn.mode == "candidates"
    attempts = "".join(
        f'<{"li" if many else "div"} class="take"><div class="say" data-part="say{t.seed}" role="group" '
        f'aria-label="Answer, token by token; arrow keys move" dir="auto"></div>'
        f'<div class="verdict" data-part="verdict{t.seed}"></div></{"li" if many else "div"}>'
        for t in seen
    )
    if many:
        attempts = f'<ol class="takes">{attempts}</ol>'
    return (
        '<h2 class="sr">You asked</h2><div class="ask" data-part="ask" role="group" aria-label="Your question, token '
        'by token; arrow keys move" dir="auto"></div><div class="reply"><h2 class="sr">Answer</h2>'
        f'<div data-part="unsure"></div><p class="status" data-part="status"></p>{attempts}'
        '<div data-part="plot"></div><div class="tools" data-part="tools"></div></div>'
    )
