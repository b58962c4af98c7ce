"""Reads the answers of any system from a file: questions, accepted answers or verdicts, and scores."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from selfdoubt.data.cells import format_keys, read_required_text
from selfdoubt.data.questions import (
    Columns,
    Question,
    collect_choices,
    find_columns,
    is_record,
    lower_name,
    parse_question,
    parse_record,
)
from selfdoubt.data.readers import Row, read_file
from selfdoubt.errors import DataError
from selfdoubt.eval.judges.verdict import parse_verdict
from selfdoubt.eval.records import Record, Sample

#: Usual names of the column that holds a system's answer.
SYSTEM_COLUMNS = ("answer", "prediction", "predicted_answer", "model_answer", "response", "output", "completion")
#: Flags of ``selfdoubt report`` that name a column.
REPORT_FLAGS = {"question": "--question-column", "answers": "--gold-column"}
UNKNOWN = "no accepted answer is given"
#: Columns that mean the same in any case.
_PARTS = {f.name for f in fields(Record)} - {"question", "answer"}


@dataclass(frozen=True)
class ExternalAnswers:
    """Records of a file of answers, with its rows and the questions without known right answers."""

    records: list[Record]
    rows: Mapping[str, Row]  #: by the record's id
    unknown: frozenset[str]  #: ids of questions for which the file has no accepted answers

    def column(self, name: str) -> dict[str, Any]:
        """Return the cells of one column by id.

        Raises:
            DataError: If no row has it.
        """
        if not any(name in row for row in self.rows.values()):
            raise DataError(
                f"the answers have no column {name!r}; they have {format_keys(next(iter(self.rows.values())))}"
            )
        return {id_: row.get(name) for id_, row in self.rows.items()}


def read_external_answers(path: Path, *, columns: Columns, answer: str | None = None) -> ExternalAnswers:
    """Read a file of answers: JSONL, JSON, CSV, TSV or Parquet.

    A row without an id is numbered. Only an explicit empty list means that a question has no right answer; without an
    entry its right answers are unknown.

    Args:
        path: The file.
        columns: Columns of the question and its accepted answers; None in a field finds them by usual names.
        answer: Column of the system's answers; None finds it by ``SYSTEM_COLUMNS``.

    Raises:
        DataError: If it cannot be read, lacks a column, or a row is broken; the message names the place.
    """
    placed = [(place, {**_parts(row), **row}) for place, row in read_file(path)]
    if not placed:
        raise DataError(f"{path} holds no answers; give a file with at least one")
    first = {name: cell for _, row in reversed(placed) for name, cell in row.items()}
    system = _system(path, first, answer)
    resolved = _columns(str(path), collect_choices(first), columns, system)
    taken = {str(row[resolved.id]) for _, row in placed if resolved.id and row.get(resolved.id) not in (None, "")}
    records: list[Record] = []
    rows: dict[str, Row] = {}
    unknown: set[str] = set()
    for number, (place, row) in enumerate(placed, 1):
        question, known = _question(place, row, resolved)
        id_ = question.id or _free(str(number), taken)
        if id_ in rows:
            raise DataError(f"{place}: the id {id_!r} comes twice; give every question its own")
        rows[id_] = row
        unknown |= set() if known else {id_}
        records.append(_record(place, row, system, replace(question, id=id_)))
    return ExternalAnswers(records, rows, frozenset(unknown))


def _parts(row: Row) -> Row:
    """Return the parts of a record by their own names: "Correct" is correct."""
    return {lower_name(name): cell for name, cell in row.items() if name not in _PARTS and lower_name(name) in _PARTS}


def _system(path: Path, first: Row, given: str | None) -> str:
    if given is not None:
        if given not in first:
            raise DataError(f"{path} has no column {given!r} for the system's answers; it has {format_keys(first)}")
        return given
    fits = [name for usual in SYSTEM_COLUMNS for name in first if lower_name(name) == usual]
    if not fits:
        raise DataError(
            f"{path} has no column that looks like a system's answer ({' or '.join(SYSTEM_COLUMNS)}); it has "
            f"{format_keys(first)}: say which one it is with --answer-column"
        )
    if len(fits) > 1:
        raise DataError(
            f"{path} has two columns that look like a system's answer, {fits[0]!r} and {fits[1]!r}: say which one it "
            "is with --answer-column"
        )
    return fits[0]


def _columns(source: str, first: Row, given: Columns, system: str) -> Columns:
    """Find columns as for questions, except that accepted answers may be missing."""
    return find_columns(source, first, given, system=system, flags=REPORT_FLAGS, needed=("question",))


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "-row"
    taken.add(name)
    return name


def _question(place: str, row: Row, columns: Columns) -> tuple[Question, bool]:
    """Read the question, and whether its right answers are known."""
    if is_record(row) and {"finish", "note", "right"} & set(row):  # of ``selfdoubt evaluate``
        return parse_record(place, row), True
    cell = row.get(columns.answers or "answers")
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        read_required_text(place, row, columns.question or "question")
        bare = replace(columns, choices=None, answers="answers")
        return parse_question(place, {**row, "answers": []}, bare), False
    return parse_question(place, collect_choices(row), columns), True


def _record(place: str, row: Row, system: str, question: Question) -> Record:
    answer = row.get(system)
    if isinstance(answer, (int, float)) and not isinstance(answer, bool) and math.isfinite(answer):
        answer = str(answer).removesuffix(".0")  # pandas makes 4 of a column with gaps 4.0
    if answer is not None and not isinstance(answer, str):
        raise DataError(f"{place}: {system} must be text, found {type(answer).__name__}; fix or remove the row")
    verdict = parse_verdict(f"{place}: correct", row.get("correct"))
    grade = _number(place, "grade", row.get("grade"))
    return Record(
        question,
        answer,
        _scores(place, row.get("scores")),
        _tokens(place, "tokens", row.get("tokens")),
        _tokens(place, "question_tokens", row.get("question_tokens")),
        tuple(_sample(place, sample) for sample in _list(place, "samples", row.get("samples"))),
        _text(place, "finish", row.get("finish")),
        _number(place, "percentile", row.get("percentile"), share=True),
        _number(place, "p_correct", row.get("p_correct"), share=True),
        parse_verdict(f"{place}: abstain", row.get("abstain")).correct,
        verdict.correct,
        verdict.grade if grade is None and verdict.grade not in (0.0, 1.0) else grade,
        _text(place, "note", row.get("note")),
        _text(place, "p_correct_note", row.get("p_correct_note")),
        _number(place, "p_answerable", row.get("p_answerable"), share=True),
    )


def _number(place: str, name: str, cell: Any, *, share: bool = False) -> float | None:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        return None
    try:
        value = math.nan if isinstance(cell, bool) else float(cell)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value) or (share and not 0 <= value <= 1):
        kind = "a number from 0 to 1" if share else "a number"
        raise DataError(f"{place}: {name} must be {kind}, found {str(cell)[:40]!r}; fix it, or leave it out")
    return value


def _text(place: str, name: str, cell: Any) -> str | None:
    if cell is None or cell == "":
        return None
    if not isinstance(cell, str):
        raise DataError(f"{place}: {name} must be text, found {type(cell).__name__}; fix it, or leave it out")
    return cell


def _json(cell: Any) -> Any:
    """Parse a cell of CSV that may hold JSON, or a Python literal as pandas writes it."""
    if not isinstance(cell, str):
        return cell
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(cell.strip()) if cell.strip() else None
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return cell


def _scores(place: str, cell: Any) -> dict[str, float]:
    scores = _json(cell)
    if scores is None:
        return {}
    if not isinstance(scores, Mapping):
        raise DataError(f"{place}: scores must map names to numbers, found {str(scores)[:40]!r}; fix or remove it")
    values = {str(name): _number(place, f"the score {name}", value) for name, value in scores.items()}
    return {name: value for name, value in values.items() if value is not None}


def _list(place: str, name: str, cell: Any) -> list[Any]:
    entries = _json(cell)
    if entries is None:
        return []
    if not isinstance(entries, (list, tuple)):
        raise DataError(f"{place}: {name} must be a list, found {str(entries)[:40]!r}; fix it, or leave it out")
    return list(entries)


def _tokens(place: str, name: str, cell: Any) -> tuple[tuple[str, float], ...]:
    pairs = []
    for pair in _list(place, name, cell):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise DataError(f"{place}: {name} must be pairs of a text and its risk, found {str(pair)[:40]!r}")
        risk = _number(place, f"the risk of {name}", pair[1])
        if risk is None:
            raise DataError(f"{place}: {pair[0]!r} of {name} lacks its risk; fix it, or leave them out")
        pairs.append((pair[0], risk))
    return tuple(pairs)


def _sample(place: str, cell: Any) -> Sample:
    if not isinstance(cell, Mapping) or not isinstance(cell.get("text"), str):
        raise DataError(f"{place}: samples must be objects with text and risk, found {str(cell)[:40]!r}")
    risk = _number(place, "the risk of a sample", cell.get("risk"))
    if risk is None:
        raise DataError(f"{place}: a sample lacks its risk; fix it, or leave the samples out")
    percentile = _number(place, "the percentile of a sample", cell.get("percentile"), share=True)
    return Sample(
        cell["text"], risk, percentile, parse_verdict(f"{place}: correct of a sample", cell.get("correct")).correct
    )
