"""Doubt on a terminal: each token in the colour of its risk, or with its number where there are no colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from selfdoubt.lm.risk_levels import BOUNDS, COLOURS, level

if TYPE_CHECKING:
    from selfdoubt.lm.answer import Answer, Token

#: The last level is also bold and underlined.
STYLES = (*(Style(color=c) for c in COLOURS[:-1]), Style(color=COLOURS[-1], bold=True, underline=True))


class Screen:
    """Prints answers while they grow."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.coloured = self.console.is_terminal and not self.console.no_color

    def legend(self) -> None:
        """What the colours mean."""
        if self.coloured:
            edges = ["0", *(f"{b:g}" for b in BOUNDS)]
            line = Text("risk of a token, in nats:  ")
            for edge, style in zip(edges, STYLES, strict=True):
                line.append(f"≥{edge}" if edge != "0" else "sure", style).append("  ")
            self.console.print(line)
        else:
            self.console.print("Each token is followed by its risk {in nats}; 0 is sure.")

    def question(self, text: str, tokens: Iterable[Token]) -> None:
        """The question, its own words coloured too: has the model met this subject before?"""
        if self.coloured:
            line = Text("? ", style="bold")
            tokens = list(tokens)
            for token in tokens:
                line.append(token.text, STYLES[level(token.nll / 4)])
            if "".join(t.text for t in tokens).strip() != text.strip():
                line = Text("? ", style="bold").append(text)
            self.console.print(line)
        else:
            self.console.print(Text(f"? {text}"))

    def token(self, token: Token) -> None:
        """One token, as soon as it is there."""
        if self.coloured:
            self.console.print(Text(token.text, STYLES[level(token.risk)]), end="")
        else:
            self.console.print(Text(f"{token.text}{{{token.risk:.2f}}}"), end="")

    def answer(self, answer: Answer) -> None:
        """What follows the tokens: the answer's risk, its rank, and its most doubtful token."""
        self.console.print()
        self.console.print(Text(f"  {summary(answer)}", style="dim" if self.coloured else ""))
        token = answer.most_doubtful
        if token is not None:
            others = [a for a in token.alternatives if a.id != token.id][:4]
            options = ", ".join(f"{a.text.strip() or a.text!r} {a.probability:.1%}" for a in others)
            line = f"  most doubtful token: {token.text.strip() or token.text!r} ({math.exp(token.logprob):.1%})"
            self.console.print(
                Text(line + (f"; instead: {options}" if options else ""), style="dim" if self.coloured else "")
            )

    def unsure(self, answer: Answer, *, told: bool) -> None:
        """In place of an answer that is withheld; ``told``: it follows all the same."""
        line = Text(answer.shown, style="bold" if self.coloured else "")
        chance = "  " + _chance(answer) if _chance(answer) else ""
        self.console.print(line.append(chance, style="not bold dim" if self.coloured else ""))
        if told:
            self.console.print(Text("It would have said: ", style="dim" if self.coloured else ""), end="")

    def comparison(self, questions: Sequence[str], answers: Sequence[Answer], *, hide: bool = False) -> None:
        """Several answers side by side; ``hide``: without those that are withheld."""
        calibrated = any(a.p_correct is not None or a.p_correct_note for a in answers)
        table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
        for name in ("question", "answer"):
            table.add_column(name, overflow="fold")
        for name in ("risk", "percentile", *(["right"] if calibrated else [])):
            table.add_column(name, justify="right", no_wrap=True)
        for question, answer in zip(questions, answers, strict=True):
            text = Text()
            if answer.abstained and hide:
                text.append(answer.shown)
            else:
                for token in answer.tokens:
                    text.append(token.text, STYLES[level(token.risk)] if self.coloured else "")
            right = [] if not calibrated else ["-" if answer.p_correct is None else f"{answer.p_correct:.0%}"]
            table.add_row(question, text, f"{answer.risk:.3f}", _percent(answer), *right)
        self.console.print()
        self.console.print(table)


def summary(answer: Answer) -> str:
    """One line about the whole answer."""
    line = f"risk {answer.risk:.3f} ({answer.risk_name})"
    if answer.percentile is not None:
        line += f", riskier than {_percent(answer)} of the reference answers"
    line += f"; {_chance(answer)}" if _chance(answer) else ""
    return line + (", cut at max tokens" if answer.finish == "length" else "")


def _percent(answer: Answer) -> str:
    return "-" if answer.percentile is None else f"{answer.percentile:.0%}"


def _chance(answer: Answer) -> str:
    """Return how probable it is that an answer is right, or why that is not known; empty without a calibration."""
    note = "" if answer.p_correct_note is None else f" ({answer.p_correct_note})"
    if answer.p_correct is None:
        return f"right with probability: not known here{note}" if note else ""
    return f"right with probability {answer.p_correct:.0%}{', too little to answer' if answer.abstain else ''}{note}"
