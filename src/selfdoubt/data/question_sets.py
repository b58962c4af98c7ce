"""Loads question sets by name or from a file as ``Question``s: TruthfulQA, Natural Questions, SQuAD 2, your own, ..."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypedDict, Unpack

from selfdoubt.data import truthfulqa
from selfdoubt.data.order import Draft, assign_ids, check_limit, choose_subset
from selfdoubt.data.questions import (
    AS_USUAL,
    Columns,
    Question,
    collect_choices,
    decide_naming,
    find_columns,
    is_record,
    parse_question,
    parse_record,
)
from selfdoubt.data.readers import SUFFIXES, Placed, looks_like_file, read_file_rows, read_hub_rows
from selfdoubt.errors import ConfigError, DataError


@dataclass(frozen=True)
class HubSet:
    """The place of a known set on the hub."""

    name: str
    config: str | None = None
    split: str = "validation"
    columns: Columns = AS_USUAL


#: Parser of placed rows: it gets the source, for messages, its rows and the columns that the caller names.
RowParser = Callable[[str, Sequence[Placed], Columns], list[Draft]]


class ReadOptions(TypedDict, total=False):
    """Options of ``load_questions`` that say how a set is read."""

    task: str | None  #: for TruthfulQA gen, mc1 or mc2
    seed: int  #: of the limit, and of the order of TruthfulQA's choices, which depends on question and seed alone; 0
    columns: Columns  #: names of the columns; None in a field finds the column by usual names
    separator: str | None  #: of several answers in one cell, e.g. ";"; without it a cell is one answer, or a JSON list
    config: str | None  #: a configuration on the hub
    split: str | None  #: a split on the hub; None takes the usual one
    revision: str | None  #: a branch, tag or commit on the hub


TRUTHFULQA, POCKET = "truthfulqa", "pocket"
KNOWN: dict[str, HubSet] = {
    TRUTHFULQA: HubSet(truthfulqa.HUB),
    "nq_open": HubSet("google-research-datasets/nq_open"),
    "webquestions": HubSet("stanfordnlp/web_questions", split="test"),
    "triviaqa": HubSet("mandarjoshi/trivia_qa", "rc.nocontext"),
    "squad2": HubSet("rajpurkar/squad_v2", columns=Columns(topic="title")),
}


def load_questions(
    source: str | os.PathLike[str], *, limit: int | None = None, **options: Unpack[ReadOptions]
) -> list[Question]:
    """Return the questions of a set, in the order of their file.

    A file is known by what it holds: TruthfulQA's two, SQuAD's and TriviaQA's JSON, a file of answers (its questions),
    or any JSONL, JSON, CSV, TSV or Parquet with a question and its answers, or choices, in columns.

    Args:
        source: A name (``KNOWN``, or "pocket"), a file, a folder with TruthfulQA's files, or a name on the hub.
        limit: Take this many at random by ``seed``, at least 1; they keep their order, and more hold those of fewer.
        **options: See ``ReadOptions``.

    Raises:
        DataError: If it cannot be read, lacks columns, or a question is broken; the message names the place.
        ConfigError: If the limit is below 1, or the task is unknown.
        MissingExtraError: If a set is on the hub and the package ``datasets`` is not installed.
    """
    check_limit(limit)
    drafts = read_drafts(os.fspath(source), **options)
    return [question for question, _ in choose_subset(drafts, limit, options.get("seed", 0))]


def read_column(source: str | os.PathLike[str], name: str, **options: Unpack[ReadOptions]) -> dict[str, Any]:
    """Return the cells of one more column by question id, e.g. a person's judgement for
    ``selfdoubt.eval.judges.rules.Column``.

    Args:
        source: As in ``load_questions``.
        name: The column.
        **options: As in ``load_questions``, but for the limit.

    Raises:
        DataError: As ``load_questions``, and if the set lacks the column.
    """
    drafts = read_drafts(os.fspath(source), **options)
    if not any(name in row for _, row in drafts):
        raise DataError(f"{source} has no column {name!r}; it has {', '.join(map(repr, drafts[0][1]))}")
    return {question.id: row.get(name) for question, row in drafts}


def read_drafts(
    source: str,
    *,
    parse: RowParser | None = None,
    task: str | None = None,
    seed: int = 0,
    columns: Columns = AS_USUAL,
    separator: str | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> list[Draft]:
    """Read all questions of a set with the rows that they come from; see ``load_questions``.

    Args:
        source: As in ``load_questions``.
        parse: Parser of the rows of a file, or of a set on the hub; None finds columns of questions and answers.
        task: See ``ReadOptions``, as all that follows.
        seed: See ``ReadOptions``.
        columns: See ``ReadOptions``.
        separator: See ``ReadOptions``.
        config: See ``ReadOptions``.
        split: See ``ReadOptions``.
        revision: See ``ReadOptions``.

    Raises:
        DataError: As ``load_questions``.
        ConfigError: If the task is unknown.
    """
    path = Path(source).expanduser()
    if source == POCKET:
        path = Path(str(files("selfdoubt") / "pocket" / "evaluation.jsonl"))
    if source in (TRUTHFULQA, truthfulqa.HUB):
        return assign_ids(source, truthfulqa.read_from_hub(task, seed, split, revision))
    if source not in KNOWN and path.is_dir():
        if not any((path / name).is_file() for name in (truthfulqa.CSV, truthfulqa.JSON)):
            raise DataError(f"{source} is a folder without {truthfulqa.CSV} or {truthfulqa.JSON}; give one file")
        return assign_ids(source, truthfulqa.read_files(path, task, seed))
    rows = _rows(source, path, config, split, revision)
    if source in KNOWN and columns == AS_USUAL:
        columns = KNOWN[source].columns
    if parse is not None:
        return assign_ids(source, parse(source, rows, columns))
    first = rows[0][1]
    if path.is_file() and columns == AS_USUAL and (truthfulqa.is_generation(first) or truthfulqa.is_choice(first)):
        return assign_ids(source, truthfulqa.read_files(path, task, seed))
    if task is not None:
        raise ConfigError(f"only TruthfulQA has tasks, and {source} is something else; leave the task {task!r} out")
    if columns == AS_USUAL and is_record(first):
        return assign_ids(source, [(parse_record(place, row), row) for place, row in rows])
    if columns.choices is None:
        rows = [(place, collect_choices(row)) for place, row in rows]
    columns = decide_naming(rows, find_columns(source, rows[0][1], columns))
    return assign_ids(source, [(parse_question(place, row, columns, separator), row) for place, row in rows])


def _rows(source: str, path: Path, config: str | None, split: str | None, revision: str | None) -> list[Placed]:
    known = KNOWN.get(source)
    if known is not None:
        return read_hub_rows(known.name, config or known.config, split or known.split, revision)
    if path.is_file():
        return read_file_rows(path)
    if looks_like_file(source) or "/" not in source:
        names = ", ".join((POCKET, *KNOWN))
        raise DataError(
            f"no question file at {source!r}; give a {', '.join(SUFFIXES)} file, one of {names}, or owner/name"
        )
    return read_hub_rows(source, config, split, revision)
