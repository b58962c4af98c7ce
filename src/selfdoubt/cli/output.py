"""What a command prints: lines for people, or one JSON object a line for programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.lm.answer import Answer, Token


def printer(*, as_json: bool, show_withheld: bool = False) -> Lines | JsonLines:
    """The printer for people or for programs; ``show_withheld`` also tells answers that the model is not sure of."""
    return JsonLines(show_withheld) if as_json else Lines(show_withheld)


class Lines:
    """Output for people."""

    def __init__(self, show_withheld: bool) -> None:
        from selfdoubt.terminal import Screen

        self.show_withheld = show_withheld
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
        if answer.withheld:
            self.screen.unsure(answer, told=self.show_withheld)
        for token in answer.tokens if self.show_withheld or not answer.withheld else ():
            self.token(token)
        if self.show_withheld or not answer.withheld:
            self.end(answer)
        else:
            self.seen.append((self.asked, answer))

    def verdict(self, tries: int, wanted: float, *, confident: bool) -> None:
        """Whether answering again led to a confident answer."""
        sure = f"  confident after {tries} {'try' if tries == 1 else 'tries'}"
        self.screen.console.print(sure if confident else f"  not confident: no answer of {tries} below {wanted:.0%}")

    def compare(self) -> None:
        """All answers side by side, at the end."""
        if len(self.seen) > 1:
            self.screen.comparison(*zip(*self.seen, strict=True), show_withheld=self.show_withheld)


class JsonLines:
    """Output for programs: one object a line."""

    def __init__(self, show_withheld: bool) -> None:
        self.show_withheld = show_withheld

    def begin(self, question: str, tokens: list[Token]) -> None:  # noqa: ARG002
        """A question, before its answer."""
        for token in tokens:
            self._print({"type": "token", "part": "question", **asdict(token)})

    def token(self, token: Token) -> None:
        """One token of the answer."""
        self._print({"type": "token", "part": "answer", **asdict(token)})

    def end(self, answer: Answer) -> None:
        """The answer is complete; where it is withheld, its text says so."""
        found = {"type": "answer", **answer.to_dict(), "text": answer.shown}
        if answer.withheld and self.show_withheld:
            found["withheld"] = answer.text
        self._print(found)

    def whole(self, question: str | None, answer: Answer) -> None:
        """A question and its finished answer."""
        self.begin(question or "", list(answer.question))
        for token in answer.tokens if self.show_withheld or not answer.withheld else ():
            self.token(token)
        self.end(answer)

    def verdict(self, tries: int, wanted: float, *, confident: bool) -> None:
        """Whether answering again led to a confident answer."""
        self._print({"type": "verdict", "confident": confident, "tries": tries, "percentile": wanted})

    def compare(self) -> None:
        """All answers side by side, at the end."""

    def _print(self, item: dict[str, Any]) -> None:
        print(json.dumps(item, ensure_ascii=False, allow_nan=False), flush=True)
