"""What the columns of a row mean: a question, its accepted answers, its choices, its topic."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from selfdoubt.errors import DataError
from selfdoubt.qa.records import Question
from selfdoubt.qa.sources import Row


@dataclass(frozen=True)
class Columns:
    """Names of columns; None looks for usual ones (``USUAL``), without regard to case."""

    question: str | None = None
    answers: str | None = None  #: one text, a list of texts, or of choices: a text, a letter or an index from 0
    id: str | None = None
    topic: str | None = None
    context: str | None = None
    wrong_answers: str | None = None
    choices: str | None = None


AS_USUAL = Columns()
USUAL: dict[str, tuple[str, ...]] = {
    "question": ("question", "qtext", "query", "problem", "prompt"),
    "answers": ("answers", "accepted_answers", "correct_answers", "answer", "answerkey", "target", "gold", "reference"),
    "id": ("id", "question_id", "questionid", "qid"),
    "topic": ("topic", "relation", "category"),
    "context": ("context", "passage"),
    "wrong_answers": ("wrong_answers", "incorrect_answers"),
    "choices": ("choices", "options"),
}
_OWN = {"id", "question", "answer", "correct"}  # of a file of answers, whose "answer" is a system's
_OWN_COLUMNS = Columns(**{f.name: f.name for f in fields(Columns)})


def find(source: str, row: Row, given: Columns) -> Columns:
    """The columns that hold what, from the first row.

    Raises:
        DataError: If a given column is missing, or none looks like a question or its answers.
    """
    by_lower = {name.lower().replace(" ", "_"): name for name in reversed([*row])}
    found: dict[str, str | None] = {}
    for part in fields(Columns):
        name = getattr(given, part.name)
        if name is not None and name not in row:
            raise DataError(f"{source} has no column {name!r} for the {part.name}; it has {_names(row)}")
        usual = (by_lower[n] for n in USUAL[part.name] if n in by_lower)
        found[part.name] = name if name is not None else next(usual, None)
    for part_name in ("question", "answers"):
        if found[part_name] is None:
            raise DataError(
                f"{source} has no column that looks like the {part_name} ({' or '.join(USUAL[part_name])}); "
                f"it has {_names(row)}: say which one it is"
            )
    return Columns(**found)


def is_record(row: Row) -> bool:
    """Whether this is a row of a file of answers (``Record``), where "answer" is not an accepted one."""
    return set(row) >= _OWN and isinstance(row["correct"], (bool, type(None)))


def of_record(place: str, row: Row) -> Question:
    """The question of a record, without what was answered.

    Raises:
        DataError: If it is broken.
    """
    question = question_of(place, {"answers": [], **row}, _OWN_COLUMNS)
    return replace(question, answers=texts(place, "answers", row.get("answers", [])))


def question_of(place: str, row: Row, columns: Columns, separator: str | None = None) -> Question:
    """The question of a row; its id is empty where the row has none.

    Empty and repeated choices are left out: nothing can be learnt from choosing them.

    Raises:
        DataError: If a part is missing, empty, or not text.
    """
    text = required_text(place, row, columns.question or "question")
    cell = row.get(columns.answers or "answers")
    choices: tuple[str, ...] = ()
    right: tuple[int, ...] = ()
    if columns.choices is not None and row.get(columns.choices) not in (None, "", []):
        options = _options(place, columns.choices, row[columns.choices], separator)
        choices, right = _unique(options.texts, _right(place, options, cell, row.get("right"), separator))
        answers = tuple(choices[i] for i in right)
    else:
        answers = texts(place, columns.answers or "answers", cell, separator)
    wrong: tuple[str, ...] = ()
    if columns.wrong_answers is not None and row.get(columns.wrong_answers) not in (None, "", []):
        wrong = texts(place, columns.wrong_answers, row[columns.wrong_answers], separator)
    id_, topic, context = (optional_text(place, row, getattr(columns, n)) for n in ("id", "topic", "context"))
    return Question(id_ or "", text, context, answers, wrong, choices, right, topic)


def required_text(place: str, row: Row, column: str) -> str:
    """A text that is not empty, stripped.

    Raises:
        DataError: If it is missing, empty or not text.
    """
    cell = row.get(column)
    if not isinstance(cell, str):
        raise DataError(f"{place}: {column} must be text, found {type(cell).__name__}; mend or remove the row")
    if not cell.strip():
        raise DataError(f"{place}: {column} is empty; mend or remove the row")
    return cell.strip()


def optional_text(place: str, row: Row, column: str | None) -> str | None:
    """A text or a number as text; None where there is none.

    Raises:
        DataError: If it is something else.
    """
    cell = None if column is None else row.get(column)
    return None if cell is None or cell == "" else _plain(place, str(column), cell)


def texts(place: str, column: str, cell: Any, separator: str | None = None) -> tuple[str, ...]:
    """All texts of a cell, each once: of a list, of JSON text with a list, of SQuAD's or of TriviaQA's object.

    Args:
        place: Where the cell is, in words.
        column: Its column.
        cell: What it holds.
        separator: Parts one text into several; empty parts are left out.

    Raises:
        DataError: If it is empty, or not text. An explicit empty list is none: then only declining is right.
    """
    if isinstance(cell, str):
        cell = _listed(place, column, cell, separator)
    if isinstance(cell, Mapping):
        keys = {str(k).lower(): k for k in cell}
        if "text" in keys:
            cell = cell[keys["text"]]
        elif "value" in keys:
            cell = [cell[keys["value"]], *(cell[keys["aliases"]] if "aliases" in keys else ())]
        else:
            raise DataError(f"{place}: {column} is an object with {_names(cell)}; wanted text or a list of texts")
    if isinstance(cell, Sequence) and not isinstance(cell, str):
        parts = [part["text"] if isinstance(part, Mapping) and "text" in part else part for part in cell]
    else:
        parts = [cell]
    return tuple(dict.fromkeys(_plain(place, column, part) for part in parts))


def _listed(place: str, column: str, cell: str, separator: str | None) -> Any:
    """A cell's list, where its text is one."""
    bare = cell.strip()
    if bare.startswith("[") and bare.endswith("]"):
        try:
            found = json.loads(bare)
        except ValueError:
            found = None
        if isinstance(found, list):
            return found
        if bare[1:2] == "'":
            raise DataError(f"{place}: {column} looks like a list but is not JSON: {bare[:40]!r}; use double quotes")
    if separator is None:
        return cell
    parts = [part.strip() for part in cell.split(separator) if part.strip()]
    return parts or cell


def _plain(place: str, column: str, cell: Any) -> str:
    is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool) and math.isfinite(cell)
    if not isinstance(cell, str) and not is_number:
        raise DataError(f"{place}: {column} must be text, found {cell!r}; mend or remove the row")
    if not str(cell).strip():
        hint = " (write [] where only declining is right)" if column.lower().startswith("answer") else ""
        raise DataError(f"{place}: {column} is empty{hint}; mend or remove the row")
    return str(cell).strip()


class _Options(NamedTuple):
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    are_numbers: bool  #: so a number as the answer is one of them; else it is an index


def _options(place: str, column: str, cell: Any, separator: str | None) -> _Options:
    labels: Any = ()
    if isinstance(cell, str):
        cell = _listed(place, column, cell, separator)
    if isinstance(cell, Mapping) and {"text", "label"} <= set(cell):
        cell, labels = cell["text"], cell["label"]
    if (
        not isinstance(cell, Sequence)
        or isinstance(cell, str)
        or not all(isinstance(c, (str, int, float)) for c in cell)
    ):
        raise DataError(f"{place}: {column} must be a list of texts, found {str(cell)[:40]!r}; mend or remove the row")
    numbers = all(not isinstance(c, str) for c in cell)
    return _Options(tuple(str(c).strip() for c in cell), tuple(map(str, labels)), numbers)


def _right(place: str, options: _Options, cell: Any, given: Any, separator: str | None) -> tuple[int, ...]:
    """Which choices are right: those of the given indices, else those that the cell names."""
    indices = isinstance(given, (list, tuple))
    wanted = given if indices else cell
    if isinstance(wanted, str) and wanted.strip() not in options.texts:
        wanted = _listed(place, "answer", wanted, separator)
    found: set[int] = set()
    for one in wanted if isinstance(wanted, (list, tuple)) else [wanted]:
        named = _named(options, one, indices or not options.are_numbers)
        if not named or not all(options.texts[i] for i in named):
            choices = ", ".join(map(repr, options.texts))
            raise DataError(
                f"{place}: the right answer {one!r} is none of the choices {choices}; mend or remove the row"
            )
        found.update(named)
    if not found:
        raise DataError(f"{place}: none of the choices is right; mend or remove the row")
    return tuple(sorted(found))


def _named(options: _Options, answer: Any, by_index: bool) -> list[int]:
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        return []
    if isinstance(answer, int) and by_index:
        return [answer] if 0 <= answer < len(options.texts) else []
    name = str(answer).strip()
    letter = ord(name.upper()) - ord("A") if len(name) == 1 else -1
    by_text, by_label = ([i for i, c in enumerate(names) if c == name] for names in (options.texts, options.labels))
    return by_text or by_label or ([letter] if 0 <= letter < len(options.texts) else [])


def _unique(choices: tuple[str, ...], right: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    kept = tuple(dict.fromkeys(c for c in choices if c))
    return kept, tuple(sorted({kept.index(choices[i]) for i in right}))


def _names(row: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"
