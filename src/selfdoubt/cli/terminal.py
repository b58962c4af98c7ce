"""Answers on a terminal: each token in the colour of its risk, or followed by the number where there are no colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from selfdoubt.lm.risk_levels import BOUNDS, COLOURS, find_risk_level

if TYPE_CHECKING:
    from selfdoubt.lm.answer import Answer, Token

#: The last level is also bold and underlined.
LEVEL_STYLES = (*(Style(color=c) for c in COLOURS[:-1]), Style(color=COLOURS[-1], bold=True, underline=True))


class Screen:
    """A terminal on which answers are printed while they grow."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.coloured = self.console.is_terminal and not self.console.no_color

    def print_legend(self) -> None:
        """Print the meaning of the colours."""
        if self.coloured:
            edges = ["0", *(f"{b:g}" for b in BOUNDS)]
            legend = Text("risk of a token, in nats:  ")
            for edge, style in zip(edges, LEVEL_STYLES, strict=True):
                legend.append(f"≥{edge}" if edge != "0" else "sure", style).append("  ")
            self.console.print(legend)
        else:
            self.console.print("Each token is followed by its risk {in nats}; 0 is sure.")

    def print_question(self, text: str, tokens: Iterable[Token]) -> None:
        """Print the question, its tokens in the colour of their surprisal: has the model met this subject before?"""
        if self.coloured:
            row = Text("? ", style="bold")
            tokens = list(tokens)
            for token in tokens:
                row.append(token.text, LEVEL_STYLES[find_risk_level(token.nll / 4)])
            if "".join(t.text for t in tokens).strip() != text.strip():
                row = Text("? ", style="bold").append(text)
            self.console.print(row)
        else:
            self.console.print(Text(f"? {text}"))

    def print_token(self, token: Token) -> None:
        """Print one token, as soon as it is there."""
        if self.coloured:
            self.console.print(Text(token.text, LEVEL_STYLES[find_risk_level(token.risk)]), end="")
        else:
            self.console.print(Text(f"{token.text}{{{token.risk:.2f}}}"), end="")

    def print_answer(self, answer: Answer) -> None:
        """Print the answer's risk, its rank, and its most doubtful token; they follow its tokens."""
        self.console.print()
        self.console.print(Text(f"  {summarize_answer(answer)}", style="dim" if self.coloured else ""))
        token = answer.most_doubtful
        if token is not None:
            others = [a for a in token.alternatives if a.id != token.id][:4]
            options = ", ".join(f"{a.text.strip() or a.text!r} {a.probability:.1%}" for a in others)
            doubtful = f"  most doubtful token: {token.text.strip() or token.text!r} ({math.exp(token.logprob):.1%})"
            self.console.print(
                Text(doubtful + (f"; instead: {options}" if options else ""), style="dim" if self.coloured else "")
            )

    def print_abstention(self, answer: Answer, *, text_follows: bool) -> None:
        """Print that the model is not sure; ``text_follows``: its answer comes next all the same."""
        notice = Text(answer.shown, style="bold" if self.coloured else "")
        chance = "  " + _chance(answer) if _chance(answer) else ""
        self.console.print(notice.append(chance, style="not bold dim" if self.coloured else ""))
        if text_follows:
            self.console.print(Text("It would have said: ", style="dim" if self.coloured else ""), end="")

    def print_comparison(self, questions: Sequence[str], answers: Sequence[Answer], *, hide: bool = False) -> None:
        """Print several answers side by side; ``hide``: without those from which the model abstains."""
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
                    text.append(token.text, LEVEL_STYLES[find_risk_level(token.risk)] if self.coloured else "")
            right = [] if not calibrated else ["-" if answer.p_correct is None else f"{answer.p_correct:.0%}"]
            table.add_row(question, text, f"{answer.risk:.3f}", _percent(answer), *right)
        self.console.print()
        self.console.print(table)


def summarize_answer(answer: Answer) -> str:
    """Return one line about the whole answer."""
    text = f"risk {answer.risk:.3f} ({answer.risk_name})"
    if answer.percentile is not None:
        text += f", riskier than {_percent(answer)} of the reference answers"
    text += f"; {_chance(answer)}" if _chance(answer) else ""
    if answer.p_answerable is not None:
        text += f"; from the question alone {answer.p_answerable:.0%}"
    return text + (", cut at max tokens" if answer.finish == "length" else "")


def _percent(answer: Answer) -> str:
    return "-" if answer.percentile is None else f"{answer.percentile:.0%}"


def _chance(answer: Answer) -> str:
    """Return the probability that an answer is right, or why it is not known; empty without a calibration."""
    note = "" if answer.p_correct_note is None else f" ({answer.p_correct_note})"
    if answer.p_correct is None:
        return f"right with probability: not known here{note}" if note else ""
    return f"right with probability {answer.p_correct:.0%}{', too little to answer' if answer.abstain else ''}{note}"
