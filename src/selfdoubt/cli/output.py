"""What a command prints: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from selfdoubt.lm.answer import Answer, Token


#: What becomes of an answer that the model is not sure of: it is hidden, told after saying so, or told like any other.
Unsure = Literal["hidden", "told", "as any"]


def printer(*, as_json: bool, unsure: Unsure = "hidden") -> Lines | JsonLines:
    """The printer for people or for programs."""
    return JsonLines(unsure) if as_json else Lines(unsure)


class Lines:
    """Output for people."""

    def __init__(self, unsure: Unsure) -> None:
        from selfdoubt.cli.terminal import Screen

        self.unsure = unsure
        self.screen = Screen()
        self.screen.legend()
        self.seen: list[tuple[str, Answer]] = []
        self.asked = ""

    def begin(self, question: str, tokens: list[Token]) -> None:
        """A question, before its answer."""
        self.asked = question
        self.screen.console.print()
        self.screen.question(question, tokens)

    def token(self, token: Token) -> None:
        """One token of the answer."""
        self.screen.token(token)

    def end(self, answer: Answer) -> None:
        """The answer is complete."""
        self.screen.answer(answer)
        self.seen.append((self.asked, answer))

    def whole(self, question: str | None, answer: Answer) -> None:
        """A question and its finished answer, or that the model is not sure."""
        if question is None:
            self.screen.console.print()
        else:
            self.begin(question, list(answer.question))
        withheld = answer.abstained and self.unsure != "as any"
        if withheld:
            self.screen.unsure(answer, told=self.unsure == "told")
        if withheld and self.unsure == "hidden":
            self.seen.append((self.asked, answer))
            return
        for token in answer.tokens:
            self.token(token)
        self.end(answer)

    def verdict(self, tries: int, wanted: float, *, confident: bool) -> None:
        """Whether answering again led to a confident answer."""
        sure = f"  confident after {tries} {'try' if tries == 1 else 'tries'}"
        self.screen.console.print(sure if confident else f"  not confident: no answer of {tries} below {wanted:.0%}")

    def compare(self) -> None:
        """All answers side by side, at the end."""
        if len(self.seen) > 1:
            self.screen.comparison(*zip(*self.seen, strict=True), hide=self.unsure == "hidden")


class JsonLines:
    """Output for programs: one object a line."""

    def __init__(self, unsure: Unsure) -> None:
        self.unsure = unsure

    def begin(self, question: str, tokens: list[Token]) -> None:  # noqa: ARG002
        """A question, before its answer."""
        for token in tokens:
            self._print({"type": "token", "part": "question", **asdict(token)})

    def token(self, token: Token) -> None:
        """One token of the answer."""
        self._print({"type": "token", "part": "answer", **asdict(token)})

    def end(self, answer: Answer) -> None:
        """The answer is complete; where it is withheld, its text says so."""
        found = {"type": "answer", **answer.to_dict()}
        if self._withholds(answer):
            found |= {"text": answer.shown, **({"withheld": answer.text} if self.unsure == "told" else {})}
        self._print(found)

    def whole(self, question: str | None, answer: Answer) -> None:
        """A question and its finished answer."""
        self.begin(question or "", list(answer.question))
        for token in () if self._withholds(answer) and self.unsure == "hidden" else answer.tokens:
            self.token(token)
        self.end(answer)

    def _withholds(self, answer: Answer) -> bool:
        return answer.abstained and self.unsure != "as any"

    def verdict(self, tries: int, wanted: float, *, confident: bool) -> None:
        """Whether answering again led to a confident answer."""
        self._print({"type": "verdict", "confident": confident, "tries": tries, "percentile": wanted})

    def compare(self) -> None:
        """All answers side by side, at the end."""

    def _print(self, item: dict[str, Any]) -> None:
        print(as_line(item), flush=True)


def as_line(item: dict[str, Any]) -> str:
    """Return an object as one line of JSON, escaped to ASCII where standard output could not hold its characters."""
    text = json.dumps(item, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return json.dumps(item, allow_nan=False)
    return text
