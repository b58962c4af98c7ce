"""Draws the picture of the README: ``python docs/answer_picture.py`` writes ``docs/answer.svg``."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from selfdoubt import RiskAwareLM
from selfdoubt.cli.terminal import Screen

QUESTIONS = ("What is the capital of France?", "In which country is Tartu?", "In which country is Zorbelheim?")


def main() -> None:
    """Ask, and write down what a terminal would show."""
    console = Console(
        record=True, force_terminal=True, width=116, file=io.StringIO(), color_system="truecolor", highlight=False
    )
    screen = Screen(console)
    screen.print_legend()
    lm = RiskAwareLM.load("pocket")
    for question in QUESTIONS:
        answer = lm.generate(question)
        console.print()
        screen.print_question(question, answer.question)
        if answer.abstained:
            screen.print_abstention(answer, text_follows=True)
        for token in answer.tokens:
            screen.print_token(token)
        screen.print_answer(answer)
    svg = console.export_svg(title="selfdoubt ask", theme=MONOKAI)
    # The picture must not load fonts from elsewhere.
    head, _, rest = svg.partition("@font-face")
    svg = head + rest[rest.rindex("@font-face") :].partition("}")[2] if rest else svg
    Path(__file__).with_name("answer.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
