"""One turn as the page gets it: a frame with named places, and what stands in each.

While an answer grows only its end is new: a place whose HTML begins with what stands there already is added to, and
neither the wire nor the page sees the rest again. So a keyboard's focus and a selection stay where they are.
"""

from __future__ import annotations

import time
from html import escape
from typing import TypedDict

from selfdoubt.lm.calibration import Calibration
from selfdoubt.serve.chat import phrases, tokens_html
from selfdoubt.serve.chat.conversation import Attempt, Turn, confidence
from selfdoubt.serve.chat.plot import render_risk_plot

#: Seconds between two drawings of a plot that grows.
REDRAW_SECONDS = 0.25


class RenderedTurn(TypedDict):
    """A turn as the page gets it."""

    id: int
    state: str
    frame: str  #: HTML with elements that have a ``data-part``
    parts: dict[str, str]  #: HTML for each
    spoken: str  #: what a screen reader says at the end


class TurnView:
    """Draws one turn again and again, cheaply."""

    def __init__(self, turn: Turn, calibration: Calibration | None = None) -> None:
        self.turn = turn
        self.calibration = calibration
        self._pieces: dict[int, list[str]] = {}
        self._asked = ""
        self._plot = ""
        self._drawn = float("-inf")

    def draw(self) -> RenderedTurn:
        """As it is now."""
        turn = self.turn
        if turn.asked and not self._asked:
            self._asked = tokens_html.render_question(turn.question, turn.asked)
        parts = {"ask": self._asked or tokens_html.render_question(turn.question, [])}
        if turn.state == "running" and all(turn.hides(t) for t in turn.takes):
            parts["status"] = f'<span class="pulse" aria-hidden="true"></span>{escape(phrases.describe_progress(turn))}'
        elif turn.withheld and turn.takes:
            parts["unsure"] = (
                f'<p class="unsure">{escape(turn.shown)}</p><p class="why">{escape(phrases.explain_abstention(turn))}</p>'
            )
        elif turn.way == "until":
            parts["status"] = escape(phrases.describe_attempts(turn))
        elif turn.way == "candidates" and turn.state == "done":
            parts["status"] = escape(phrases.describe_candidates(turn))
        elif turn.state == "stopped":
            parts["status"] = "Stopped"
        seen = self._seen()
        for take in seen:
            parts[f"say{take.seed}"] = self._spans(take)
            if take.answer is not None:
                parts[f"verdict{take.seed}"] = self._verdict(take)
        parts["plot"] = self._drawing()
        if turn.state != "running":
            parts["tools"] = self._tools()
        return {
            "id": turn.id,
            "state": turn.state,
            "frame": _frame(turn, seen),
            "parts": parts,
            "spoken": phrases.describe_aloud(turn, self.calibration),
        }

    def _seen(self) -> list[Attempt]:
        turn = self.turn
        takes = turn.takes if turn.state == "running" else turn.ranked
        if turn.way != "candidates":
            takes = [turn.best] if turn.best is not None else []
        return [t for t in takes if not turn.hides(t)]

    def _spans(self, take: Attempt) -> str:
        pieces = self._pieces.setdefault(take.seed, [])
        pieces += [
            tokens_html.render_token(token, i) for i, token in enumerate(take.tokens[len(pieces) :], len(pieces))
        ]
        html = "".join(pieces)
        if take.answer is not None:
            rest = take.answer.text.removeprefix("".join(t.text for t in take.tokens))
            html += escape(rest) or ("" if take.answer.text else "<em>an empty answer</em>")
        return html

    def _verdict(self, take: Attempt) -> str:
        answer = take.answer
        assert answer is not None
        several = self.turn.way == "candidates"
        said = phrases.describe_answer(answer, self.calibration, short=several)
        sure = confidence(answer)
        line = f"<strong>{escape(said[0])}</strong>" + "".join(f" · {escape(s)}" for s in said[1:])
        if several:
            line += f" · seed {take.seed}"
        elif self.turn.temperature:
            line += f" · drawn at temperature {self.turn.temperature:g}, seed {take.seed}"
        if caveat := phrases.warn_conversation(self.turn, answer):
            line += f" · {escape(caveat)}"
        if sure is None:
            return f'<p class="words">{line}</p>'
        threshold = None if self.calibration is None else self.calibration.threshold
        marks = "" if threshold is None else f'<b style="left:{threshold:.1%}"></b>'
        return (
            f'<div class="gauge" aria-hidden="true"><i style="width:{sure:.1%}"></i>{marks}</div>'
            f'<p class="words">{line}</p>'
        )

    def _drawing(self) -> str:
        turn = self.turn
        take = turn.takes[-1] if turn.state == "running" and turn.takes else turn.best
        if take is None or not take.tokens or (turn.way == "candidates" and turn.state == "running"):
            return ""
        now = time.monotonic()
        if turn.state != "running" or now - self._drawn >= REDRAW_SECONDS:
            self._plot, self._drawn = render_risk_plot(take.tokens, f"say{take.seed}"), now
        return self._plot

    def _tools(self) -> str:
        turn = self.turn
        found = ""
        if not turn.withheld and turn.shown:
            found += f'<button type="button" data-do="copy" data-text="{escape(turn.shown)}">Copy</button>'
        hidden = sum(turn.hides(t) for t in turn.takes if t.text)
        if hidden:
            which = "" if turn.withheld else f" {hidden} more"
            found += f'<button type="button" data-act="reveal">Show{which} anyway</button>'
        last = (
            f'<button type="button" data-do="edit" data-text="{escape(turn.question)}">Edit</button>'
            '<button type="button" data-act="retry">Retry</button>'
        )
        if any(t.answer is not None and confidence(t.answer) is not None for t in turn.takes):
            last += '<button type="button" data-act="until">Try until sure</button>'
        last += '<button type="button" data-act="candidates">Show candidates</button>'
        return f'{found}<span class="last">{last}</span>'


def _frame(turn: Turn, seen: list[Attempt]) -> str:
    """The places of a turn; static but for the seeds."""
    many = turn.way == "candidates"
    takes = "".join(
        f'<{"li" if many else "div"} class="take"><div class="say" data-part="say{t.seed}" role="group" '
        f'aria-label="Answer, token by token; arrow keys move" dir="auto"></div>'
        f'<div class="verdict" data-part="verdict{t.seed}"></div></{"li" if many else "div"}>'
        for t in seen
    )
    if many:
        takes = f'<ol class="takes">{takes}</ol>'
    return (
        '<h2 class="sr">You asked</h2><div class="ask" data-part="ask" role="group" aria-label="Your question, token '
        'by token; arrow keys move" dir="auto"></div><div class="reply"><h2 class="sr">Answer</h2>'
        f'<div data-part="unsure"></div><p class="status" data-part="status"></p>{takes}'
        '<div data-part="plot"></div><div class="tools" data-part="tools"></div></div>'
    )
