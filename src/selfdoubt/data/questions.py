"""Finds the columns of a data file by name, and reads a row as a ``Question`` with answers, choices and topic."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from selfdoubt.data.cells import (
    check_whole_text,
    format_keys,
    parse_list,
    read_optional_text,
    read_required_text,
    read_texts,
)
from selfdoubt.data.readers import Row
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.setting import setting


@dataclass(frozen=True)
class Question:
    """A question with its accepted answers, known wrong answers, or choices.

    A question without ``answers`` and without ``choices`` has no right answer but to decline, as in SQuAD 2.
    """

    id: str  #: unique in its file
    text: str
    context: str | None = None  #: a passage to read first
    answers: tuple[str, ...] = ()  #: accepted answers
    wrong_answers: tuple[str, ...] = ()  #: answers known to be wrong (TruthfulQA)
    choices: tuple[str, ...] = ()  #: multiple choice, in the order in which they are shown
    right: tuple[int, ...] = ()  #: indices of the right choices; several in TruthfulQA's MC2
    topic: str | None = None  #: category, relation or data set; another topic is another domain


#: Ways in which an answer names a choice.
NAMED_BY = ("text", "label", "letter", "index")


@dataclass(frozen=True)
class Columns:
    """Names of columns; None finds a column by its usual names (``USUAL``), without regard to case.

    Raises:
        ConfigError: If ``named_by`` is none of ``NAMED_BY``.
    """

    question: str | None = setting(
        None, "Column of the question, where its name does not say it.", flag="--question-column"
    )
    #: One text, a list of texts, or of choices: a text, a letter or an index from 0.
    answers: str | None = setting(None, "Column of the accepted answers.", flag="--answer-column")
    id: str | None = None
    topic: str | None = setting(None, "Column of the topic.", flag="--topic-column")
    context: str | None = setting(None, "Column of a passage to read first.", flag="--context-column")
    wrong_answers: str | None = None
    choices: str | None = setting(None, "Column of the choices.", flag="--choice-column")
    #: Not a column.
    named_by: str | None = setting(
        None,
        "Form in which an answer names a choice, where it could mean two: text, index (from 0), label or letter.",
        flag="--answers-name",
    )

    def __post_init__(self) -> None:
        if self.named_by is not None and self.named_by not in NAMED_BY:
            raise ConfigError(f"answers name a choice by {', '.join(NAMED_BY)}, got {self.named_by!r}")


AS_USUAL = Columns()
_MANY = ("answers", "accepted_answers", "correct_answers")
_GOLD = ("answerkey", "target", "gold", "reference", "gold_answer", "gold_answers", "ground_truth", "references")
USUAL: dict[str, tuple[str, ...]] = {
    "question": ("question", "qtext", "query", "problem", "prompt"),
    "answers": (*_MANY, "answer", *_GOLD),
    "id": ("id", "question_id", "questionid", "qid"),
    "topic": ("topic", "relation", "category"),
    "context": ("context", "passage"),
    "wrong_answers": ("wrong_answers", "incorrect_answers"),
    "choices": ("choices", "options"),
}
#: Flags of ``selfdoubt evaluate`` that name a column, for messages.
COLUMN_FLAGS = {f.name: f.metadata["flag"] for f in fields(Columns) if f.name != "named_by" and "flag" in f.metadata}
_LETTERED = re.compile(r"(?:(?P<word>option|choice|opt)_?)?(?P<label>[a-j]|[1-9])")


def lower_name(name: str) -> str:
    """Return a column's name as it is compared: in lower case, with underscores for spaces."""
    return str(name).strip().lower().replace(" ", "_")


def find_columns(
    source: str,
    row: Row,
    given: Columns,
    *,
    system: str | None = None,
    flags: Mapping[str, str] = COLUMN_FLAGS,
    needed: Sequence[str] = ("question", "answers"),
) -> Columns:
    """Find the columns of question, answers, ... by their names in the first row.

    Args:
        source: The file, for messages.
        row: The first row.
        given: Columns that the caller names.
        system: The column with a system's answers, which does not hold accepted ones.
        flags: Flags that name a column, for messages.
        needed: Fields of ``Columns`` that must be found.

    Raises:
        DataError: If a given column is missing, none looks like a question or its answers, or several do.
    """
    columns: dict[str, str | None] = {}
    for part, usual in USUAL.items():
        name = getattr(given, part)
        if name is not None and name not in row:
            raise DataError(f"{source} has no column {name!r} for the {part}; it has {format_keys(row)}")
        columns[part] = _usual(source, row, part, usual, system, flags) if name is None else name
    for part in needed:
        if columns[part] is None:
            names_of = (n for n in USUAL[part] if n != lower_name(system or ""))
            raise DataError(
                f"{source} has no column that looks like the {part} ({' or '.join(names_of)}); "
                f"it has {format_keys(row)}: say which one it is{_with(flags, part)}"
            )
    return Columns(**columns, named_by=given.named_by)


def _usual(
    source: str, row: Row, part: str, usual: Sequence[str], system: str | None, flags: Mapping[str, str]
) -> str | None:
    """Find the column of a usual name. Two are ambiguous, also where their first cells are equal, except that a list of
    accepted answers goes before one answer."""
    fits = [name for usual_name in usual for name in row if lower_name(name) == usual_name and name != system]
    if not fits:
        return None
    rivals = (
        n for n in fits[1:] if lower_name(n) == lower_name(fits[0]) or (part == "answers" and lower_name(n) in _GOLD)
    )
    other = next(rivals, None)
    if other is not None:
        raise DataError(
            f"{source} has two columns that look like the {part}, {fits[0]!r} and {other!r}: "
            f"say which one it is{_with(flags, part)}"
        )
    return fits[0]


def _with(flags: Mapping[str, str], part: str) -> str:
    return f" with {flags[part]}" if part in flags else ""


def collect_choices(row: Row) -> Row:
    """Return a row whose lettered columns (A, B, C, D; option_a, ...; choice1, ...) are joined into one of choices."""
    if any(lower_name(name) in USUAL["choices"] for name in row):
        return row
    lettered: dict[tuple[str, str], str] = {}
    for name in row:
        match = _LETTERED.fullmatch(lower_name(name))
        if match and (match["word"] or match["label"].isalpha()):
            lettered.setdefault((match["word"] or "", match["label"]), name)
    for word, first in {(word, "1" if label.isdecimal() else "a"): None for word, label in lettered}:
        labels: list[str] = []
        while (word, label := chr(ord(first) + len(labels))) in lettered:
            labels.append(label)
        filled = [label for label in labels if row[lettered[word, label]] not in (None, "")]
        if len(labels) > 1 and filled:
            cells = [row[lettered[word, label]] for label in filled]
            return {**row, "choices": {"text": cells, "label": [label.upper() for label in filled]}}
    return row


def parse_question(place: str, row: Row, columns: Columns, separator: str | None = None) -> Question:
    """Read the question of a row; its id is empty where the row has none.

    Empty and repeated choices are left out: nothing can be learnt from choosing them.

    Raises:
        DataError: If a part is missing, empty, or not text, or an answer names a choice in two ways.
    """
    text = read_required_text(place, row, columns.question or "question")
    name = columns.answers or "answers"
    cell = row.get(name)
    choices: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    if columns.choices is not None and row.get(columns.choices) not in (None, "", []):
        options = _options(place, columns.choices, row[columns.choices], separator)
        indices = _right(place, name, options, cell, row.get("right"), separator, columns.named_by)
        choices, right = _unique(options.texts, indices)
        answers = tuple(choices[i] for i in right)
    else:
        answers = read_texts(place, name, cell, separator)
    wrong: tuple[str, ...] = ()
    if columns.wrong_answers is not None and row.get(columns.wrong_answers) not in (None, "", []):
        wrong = read_texts(place, columns.wrong_answers, row[columns.wrong_answers], separator)
    id_, topic, context = (read_optional_text(place, row, getattr(columns, n)) for n in ("id", "topic", "context"))
    return Question(id_ or "", text, context, answers, wrong, choices, right, topic)


def decide_naming(rows: Sequence[tuple[str, Row]], columns: Columns) -> Columns:
    """Return the columns with ``named_by="text"`` if every answer of a file is the text of one of its choices.

    A number that is the text of one choice is then not taken for the index of another.
    """
    if columns.named_by is not None or columns.choices is None or columns.answers is None:
        return columns
    words = 0
    for _, row in rows:
        answer, choices = row.get(columns.answers), row.get(columns.choices)
        if not isinstance(answer, str) or not isinstance(choices, (list, tuple)) or answer not in choices:
            return columns
        words += not answer.strip().isdecimal()
    return replace(columns, named_by="text") if words else columns


class _Options(NamedTuple):
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    are_numbers: bool  #: so a number as the answer may be one of them, or an index


def _options(place: str, column: str, cell: Any, separator: str | None) -> _Options:
    labels: Any = ()
    if isinstance(cell, str):
        cell = parse_list(place, column, cell, separator)
    if isinstance(cell, Mapping) and {"text", "label"} <= set(cell):
        cell, labels = cell["text"], cell["label"]
    if (
        not isinstance(cell, Sequence)
        or isinstance(cell, str)
        or not all(isinstance(c, (str, int, float)) for c in cell)
    ):
        raise DataError(f"{place}: {column} must be a list of texts, found {str(cell)[:40]!r}; fix or remove the row")
    numbers = all(not isinstance(c, str) for c in cell)
    texts = tuple(check_whole_text(place, column, str(c).strip()) for c in cell)
    return _Options(texts, tuple(str(label).strip() for label in labels), numbers)


def _right(
    place: str, column: str, options: _Options, cell: Any, given: Any, separator: str | None, named_by: str | None
) -> tuple[int, ...]:
    """Return the indices of the right choices: the given ones, else those that the cell names."""
    indices = isinstance(given, (list, tuple))
    answer = given if indices else cell
    if isinstance(answer, str) and answer.strip() not in options.texts:
        answer = parse_list(place, column, answer, separator)
    right: set[int] = set()
    for one in answer if isinstance(answer, (list, tuple)) else [answer]:
        named = _named(place, column, options, one, "index" if indices else named_by)
        if not named or not all(options.texts[i] for i in named):
            choices = ", ".join(map(repr, options.texts))
            raise DataError(
                f"{place}: the right answer {one!r} is none of the choices {choices}; fix or remove the row"
            )
        right.update(named)
    if not right:
        raise DataError(f"{place}: none of the choices is right; fix or remove the row")
    return tuple(sorted(right))


def _named(place: str, column: str, options: _Options, answer: Any, by: str | None) -> list[int]:
    """Return the choices that an answer names: by their label, else by their text, an index from 0 or a letter.

    A number among texts is an index; a number that is the text of one choice and the index of another is ambiguous.
    """
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        return []
    if isinstance(answer, float) and answer.is_integer() and not options.are_numbers:
        answer = int(answer)  # pandas makes 1 of a column with gaps 1.0
    name = str(answer).strip()
    letter = ord(name.upper()) - ord("A") if len(name) == 1 else -1
    index = int(name) if name.isascii() and name.isdecimal() and len(name) < 4 else -1
    ways = {
        "label": [i for i, label in enumerate(options.labels) if label == name],
        "text": [i for i, text in enumerate(options.texts) if text == name],
        "index": [index] if 0 <= index < len(options.texts) else [],
        "letter": [letter] if 0 <= letter < len(options.texts) else [],
    }
    if by is not None:
        return ways[by]
    if options.labels:
        return ways["label"] or ways["text"] or ways["index"] or ways["letter"]
    if isinstance(answer, int) and not options.are_numbers:
        return ways["index"]
    if ways["text"] and ways["index"] and ways["index"][0] not in ways["text"]:
        raise DataError(
            f"{place}: {column} {answer!r} is the text of one choice and the index of another; say which with "
            "--answers-name text or index, or name choices by letter"
        )
    return ways["text"] or ways["index"] or ways["letter"]


def _unique(choices: tuple[str, ...], right: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    kept = tuple(dict.fromkeys(c for c in choices if c))
    return kept, tuple(sorted({kept.index(choices[i]) for i in right}))


_OWN = {"id", "question", "answer", "correct"}  # of a file of answers, whose "answer" is a system's
_OWN_COLUMNS = Columns(**{name: name for name in USUAL})


def is_record(row: Row) -> bool:
    """Return whether this is a row of a file of answers (``Record``), where "answer" is not an accepted one."""
    return set(row) >= _OWN and isinstance(row["correct"], (bool, type(None)))


def parse_record(place: str, row: Row) -> Question:
    """Read the question of a record, without its answer.

    Raises:
        DataError: If it is broken, or has no accepted answers: only an explicit [] means that there are none.
    """
    if row.get("answers") is None and row.get("choices") is None and "finish" not in row and "note" not in row:
        raise DataError(
            f"{place}: has no accepted answers; write them under answers, or [] where only declining is right"
        )
    answers = [] if row.get("answers") is None else row["answers"]
    question = parse_question(place, {**row, "answers": answers}, _OWN_COLUMNS)
    return replace(question, answers=read_texts(place, "answers", answers))


__all__ = [
    "AS_USUAL", "COLUMN_FLAGS", "NAMED_BY", "USUAL", "Columns", "Question", "collect_choices", "find_columns",
    "is_record", "lower_name", "parse_question", "parse_record",
]  # fmt: skip
