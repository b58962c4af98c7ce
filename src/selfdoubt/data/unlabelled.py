"""Loads questions without their answers: the list that ships with this package, a text file, or any question set."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Unpack

from selfdoubt.data.cells import check_whole_text, read_optional_text, read_required_text, trim_text
from selfdoubt.data.order import Draft, assign_ids, check_limit, choose_subset
from selfdoubt.data.question_sets import ReadOptions, read_drafts
from selfdoubt.data.questions import USUAL, Columns, Question, find_columns, lower_name
from selfdoubt.data.readers import Placed, read_text_lines
from selfdoubt.errors import DataError

TEXT_SUFFIX = ".txt"
#: Usual names of columns that hold labels, which are not read here: two of them are not ambiguous.
_LABELS = {name for kind in ("answers", "wrong_answers", "choices") for name in USUAL[kind]}


def load_unlabelled(
    source: str | os.PathLike[str] | None = None, *, limit: int | None = None, **options: Unpack[ReadOptions]
) -> list[Question]:
    """Return questions without answers, in the order of their file.

    Args:
        source: None for the list of this package (``list_shipped``); a ``.txt`` file with one question per line; or
            as in ``load_questions``, where columns of answers and choices may be missing and are not read.
        limit: Take this many at random by ``seed``, at least 1.
        **options: See ``ReadOptions``.

    Raises:
        DataError: If it cannot be read, holds no question, or lacks a column of questions; the message names the place.
        ConfigError: If the limit is below 1.
    """
    check_limit(limit)
    drafts: list[Draft]
    if source is None:
        drafts = [(question, {}) for question in list_shipped()]
    elif Path(source).suffix.lower() == TEXT_SUFFIX:
        drafts = _read_text_file(Path(source).expanduser())
    else:
        drafts = read_drafts(os.fspath(source), parse=_parse_rows, **options)
    return [strip_answers(question) for question, _ in choose_subset(drafts, limit, options.get("seed", 0))]


def list_shipped() -> list[Question]:
    """Return the questions of this package: CC0, many topics, short and long ones, and one in six not in English."""
    path = Path(str(files("selfdoubt") / "data" / "prepare_questions.jsonl"))
    return [question for question, _ in read_drafts(str(path), parse=_parse_rows)]


def strip_answers(question: Question) -> Question:
    """Return a question without what is known of its answer."""
    return Question(question.id, question.text, question.context, topic=question.topic)


def _read_text_file(path: Path) -> list[Draft]:
    drafts: list[Draft] = []
    for number, text in enumerate(read_text_lines(path), 1):
        if text.strip():
            place = f"{path}, line {number}"
            drafts.append((Question("", trim_text(check_whole_text(place, "the question", text))), {}))
    if not drafts:
        raise DataError(f"{path} holds no questions; write one per line")
    return assign_ids(str(path), drafts)


def _parse_rows(source: str, rows: Sequence[Placed], columns: Columns) -> list[Draft]:
    """Parse the question, passage, id and topic of each row; a column ``text`` serves where none is called question."""
    first = {name: cell for name, cell in rows[0][1].items() if lower_name(name) not in _LABELS}
    try:
        named = find_columns(source, first, columns, needed=("question",))
    except DataError:
        if columns.question is not None or "text" not in first:
            raise
        named = find_columns(source, first, replace(columns, question="text"), needed=("question",))
    drafts: list[Draft] = []
    for place, row in rows:
        text = read_required_text(place, row, str(named.question))
        id_, topic, context = (read_optional_text(place, row, name) for name in (named.id, named.topic, named.context))
        drafts.append((Question(id_ or "", text, context, topic=topic), row))
    return drafts
