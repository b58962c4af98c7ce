"""Output of commands: lines for people, or one JSON object per line for programs."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from selfdoubt.lm.answer import Answer, Token


#: An answer from which the model abstains is hidden, shown after a line that says so, or shown like any other.
ShowAbstained = Literal["never", "with notice", "always"]


def build_printer(*, as_json: bool, abstained: ShowAbstained = "never") -> TextPrinter | JsonPrinter:
    """Return the printer for people or for programs."""
    return JsonPrinter(abstained) if as_json else TextPrinter(abstained)


class TextPrinter:
    """A printer for people: text in colours."""

    def __init__(self, abstained: ShowAbstained) -> None:
        from selfdoubt.cli.terminal import Screen

        self.abstained = abstained
        self.screen = Screen()
        self.screen.print_legend()
        self.seen: list[tuple[str, Answer]] = []
        self.question = ""

    def begin(self, question: str, tokens: list[Token]) -> None:
        """Print a question, before its answer."""
        self.question = question
        self.screen.console.print()
        self.screen.print_question(question, tokens)

    def token(self, token: Token) -> None:
        """Print one token of the answer."""
        self.screen.print_token(token)

    def end(self, answer: Answer) -> None:
        """Print the end of an answer."""
        self.screen.print_answer(answer)
        self.seen.append((self.question, answer))

    def whole(self, question: str | None, answer: Answer) -> None:
        """Print a question and its finished answer, or that the model is not sure."""
        if question is None:
            self.screen.console.print()
        else:
            self.begin(question, list(answer.question))
        is_abstained = answer.abstained and self.abstained != "always"
        if is_abstained:
            self.screen.print_abstention(answer, text_follows=self.abstained == "with notice")
        if is_abstained and self.abstained == "never":
            self.seen.append((self.question, answer))
            return
        for token in answer.tokens:
            self.token(token)
        self.end(answer)

    def verdict(self, attempts: int, percentile: float, *, confident: bool) -> None:
        """Print whether answering again led to a confident answer."""
        if confident:
            text = f"  confident after {attempts} {'try' if attempts == 1 else 'tries'}"
        else:
            text = f"  not confident: no answer of {attempts} below {percentile:.0%}"
        self.screen.console.print(text)

    def compare(self) -> None:
        """Print all answers side by side, at the end."""
        if len(self.seen) > 1:
            self.screen.print_comparison(*zip(*self.seen, strict=True), hide=self.abstained == "never")


class JsonPrinter:
    """A printer for programs: one JSON object per line."""

    def __init__(self, abstained: ShowAbstained) -> None:
        self.abstained = abstained

    def begin(self, question: str, tokens: list[Token]) -> None:  # noqa: ARG002
        """Print the tokens of a question, before its answer."""
        for token in tokens:
            self._print({"type": "token", "part": "question", **asdict(token)})

    def token(self, token: Token) -> None:
        """Print one token of the answer."""
        self._print({"type": "token", "part": "answer", **asdict(token)})

    def end(self, answer: Answer) -> None:
        """Print an answer; if the model abstains from it, its text says so."""
        row = {"type": "answer", **answer.to_dict()}
        if self._is_abstained(answer):
            row |= {"text": answer.shown, **({"withheld": answer.text} if self.abstained == "with notice" else {})}
        self._print(row)

    def whole(self, question: str | None, answer: Answer) -> None:
        """Print a question and its finished answer."""
        self.begin(question or "", list(answer.question))
        for token in () if self._is_abstained(answer) and self.abstained == "never" else answer.tokens:
            self.token(token)
        self.end(answer)

    def _is_abstained(self, answer: Answer) -> bool:
        return answer.abstained and self.abstained != "always"

    def verdict(self, attempts: int, percentile: float, *, confident: bool) -> None:
        """Print whether answering again led to a confident answer."""
        self._print({"type": "verdict", "confident": confident, "tries": attempts, "percentile": percentile})

    def compare(self) -> None:
        """Print nothing: programs compare answers themselves."""

    def _print(self, row: dict[str, Any]) -> None:
        print(to_json_line(row), flush=True)


def to_json_line(row: dict[str, Any]) -> str:
    """Return an object as one line of JSON, escaped to ASCII if standard output could not hold its characters."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return json.dumps(row, allow_nan=False)
    return text
