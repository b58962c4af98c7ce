"""Builds prompts from a question and examples: chat messages, or plain text to continue. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from selfdoubt.data.questions import Question
from selfdoubt.errors import ConfigError
from selfdoubt.setting import setting

PROMPT_STYLES = ("auto", "chat", "qa")
PromptMessage = dict[str, str]
BuiltPrompt = str | list[PromptMessage]  #: plain text in the style "qa", else messages

#: An answer in the style "qa" ends where the line ends.
STOP = "\n"
UNANSWERABLE = "unanswerable"
FROM_PASSAGE = (
    "Answer from the passage alone, in as few words as possible. "
    f'If the passage does not hold the answer, say "{UNANSWERABLE}".'
)
BY_LETTER = "Answer with the letter of the right option."


@dataclass(frozen=True)
class Prompting:
    """The form of prompts."""

    style: str = setting(
        "auto", "chat: the model's template; qa: plain 'Q: ... A:'; auto: chat where there is a template."
    )
    #: None takes the usual instruction for this kind of question, "" takes none.
    instruction: str | None = setting(None, "An instruction before each question.")
    #: In a chat, give the instruction as the system's message and not as part of the first question; None: where the
    #: template has a place for it.
    system: bool | None = None
    options: bool = setting(False, "Multiple choice: show the choices, and answer by letter.", flag="--show-choices")

    def __post_init__(self) -> None:
        if self.style not in PROMPT_STYLES:
            raise ConfigError(f"no style of prompts is called {self.style!r}; choose one of {', '.join(PROMPT_STYLES)}")


AUTO, CHAT = Prompting(), Prompting("chat")


def build_prompt(question: Question, shots: Sequence[Question] = (), how: Prompting = CHAT) -> BuiltPrompt:
    r"""Build the prompt of a question.

    Args:
        question: The question; its context comes before it.
        shots: Examples, answered: see ``selfdoubt.eval.few_shot.choose_examples``.
        how: Style, instruction, and whether choices are shown.

    Returns:
        Messages with ``role`` and ``content`` for the style "chat"; for "qa" a text to continue as it is, whose answer
        ends at the first ``STOP``: ``Q: ...\nA: ...\n\nQ: ...\nA:``.

    Raises:
        ConfigError: If choices are to be shown and the question, or an example, has none, or more than 26.
    """
    instruction = choose_instruction(question, how.options) if how.instruction is None else how.instruction
    if how.style == "qa":
        blocks = [
            f"{_line_by_line(_body(s, how, 'Q: '))}\nA: {_one_line(format_example_answer(s, how.options))}"
            for s in shots
        ]
        last = f"{_line_by_line(_body(question, how, 'Q: '))}\nA:"
        return "\n\n".join(([instruction] if instruction else []) + [*blocks, last])
    turns: list[PromptMessage] = []
    for shot in shots:
        turns += [
            _user(_body(shot, how, "")),
            {"role": "assistant", "content": format_example_answer(shot, how.options)},
        ]
    turns.append(_user(_body(question, how, "")))
    if not instruction:
        return turns
    if how.system is not False:
        return [{"role": "system", "content": instruction}, *turns]
    return [_user(f"{instruction}\n\n{turns[0]['content']}"), *turns[1:]]


def choose_instruction(question: Question, options: bool) -> str:
    """Return the usual instruction for questions of this kind; empty if they need none."""
    if options and question.choices:
        return BY_LETTER
    return FROM_PASSAGE if question.context else ""


def format_example_answer(question: Question, options: bool = False) -> str:
    """Return an example's answer: its first accepted one, a letter and its choice, or ``UNANSWERABLE``."""
    if options and question.choices:
        index = question.right[0]
        return f"{format_letter(index)}. {question.choices[index]}"
    return question.answers[0] if question.answers else UNANSWERABLE


def format_letter(index: int) -> str:
    """Return A, B, C, ... for the choice of this index."""
    return chr(ord("A") + index)


def extract_answer(text: str, how: Prompting = CHAT) -> str:
    r"""Return the answer in a text of the model: stripped, and in the style "qa" its first line that is not empty.

    Example:
        >>> extract_answer(" Paris.\n\nQ: What next?", Prompting("qa"))
        'Paris.'
    """
    bare = text.strip()
    return bare.partition(STOP)[0].strip() if how.style == "qa" else bare


def _body(question: Question, how: Prompting, mark: str) -> str:
    passage = f"Passage: {question.context}" if question.context else ""
    lines = [f"{mark}{question.text}"]
    if how.options:
        if not 0 < len(question.choices) <= 26:
            raise ConfigError(
                f"question {question.id} has {len(question.choices)} choices, and 1 to 26 can be shown with letters; "
                "ask without options"
            )
        lines += [f"{format_letter(i)}. {choice}" for i, choice in enumerate(question.choices)]
    return "\n".join(([passage, *lines] if mark else [passage, "", *lines]) if passage else lines)


def _user(content: str) -> PromptMessage:
    return {"role": "user", "content": content}


def _one_line(text: str) -> str:
    return " ".join(text.splitlines()) if "\n" in text or "\r" in text else text


def _line_by_line(text: str) -> str:
    """Leave out empty lines, which separate the examples."""
    return "\n".join(filter(str.strip, text.splitlines()))
