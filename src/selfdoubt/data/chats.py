"""Reads instruction data from a file or the hub as chats; an error names the place of a broken record.

Three layouts are known by their columns: instruction (``instruction``, ``output``, and ``input`` that may be empty),
question and answer (as ``selfdoubt evaluate`` reads them; of several right answers the first is learnt), and chats
(``messages``, a list of objects with ``role`` and ``content``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from selfdoubt.data.cells import check_whole_text, read_required_text
from selfdoubt.data.questions import (
    AS_USUAL,
    Columns,
    collect_choices,
    decide_naming,
    find_columns,
    is_record,
    lower_name,
    parse_question,
    parse_record,
)
from selfdoubt.data.readers import Placed, Row, looks_like_file, read_file, read_hub
from selfdoubt.errors import DataError

ChatMessages = list[dict[str, str]]

#: The role of a text that an instruction works on. The Alpaca prompt has a place for it; other templates get it after
#: the instruction.
INPUT = "input"

LAYOUTS = {
    "instruction": ("instruction", "output"),
    "question and answer": ("question", "answer"),
    "chat": ("messages",),
}
#: Flags of ``selfdoubt train`` that name a column.
TRAIN_FLAGS = {"question": "--question-column", "answers": "--answer-column"}


def read_chats(source: str, *, limit: int | None = None, columns: Columns = AS_USUAL) -> Iterator[ChatMessages]:
    """Yield the chats of a file (JSON, JSONL, CSV, TSV or Parquet) or of a data set on the hub, one by one.

    Args:
        source: Path of a file, or name of a data set on the hub.
        limit: Largest number of chats; None reads all.
        columns: Columns of question and answer; None in a field finds them by usual names.

    Raises:
        DataError: If the source cannot be read, its columns fit no layout, or a record is broken; the message names the
            place.
    """
    return islice(_chats(source, columns), limit)


def _chats(source: str, columns: Columns) -> Iterator[ChatMessages]:
    rows = _rows(source)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source} holds no records; give a file with at least two")
    to_chat: Callable[[str, Row], ChatMessages]
    layout = _layout(first[1]) if columns == AS_USUAL else "question and answer"
    if layout == "instruction":
        names = {lower_name(name): name for name in reversed([*first[1]])}
        first_name, last_name, more_name = (names.get(n, n) for n in (*LAYOUTS[layout], INPUT))
        to_chat = partial(_instruction, first_name, last_name, more_name)
    elif layout == "chat":
        to_chat = partial(_messages, next(name for name in first[1] if lower_name(name) == "messages"))
    elif columns == AS_USUAL and is_record(first[1]):
        to_chat = _answered
    else:
        resolved = _columns(source, first[1], columns)
        if resolved.choices is not None:  # how answers name them, the whole file says
            rest = [*rows]
            rows, resolved = iter(rest), decide_naming([first, *rest], resolved)
        to_chat = partial(_asked, resolved)
    for place, row in chain([first], rows):
        yield to_chat(place, row)


def _rows(source: str) -> Iterator[Placed]:
    path = Path(source).expanduser()
    if path.is_dir() or (not path.exists() and looks_like_file(source)):
        names = "JSON, JSONL, CSV, TSV or Parquet file"
        raise DataError(f"no data file at {source!r}; give a {names}, or a name on the hub")
    return read_file(path) if path.exists() else read_hub(source, None, "train", None, splits=(), extra="train")


def _layout(row: Row) -> str:
    """Return the name of the layout that the first record's columns have, without regard to case."""
    columns = {lower_name(name) for name in row}
    fits = (layout for layout, needed in LAYOUTS.items() if columns.issuperset(needed))
    return next(fits, "question and answer")


def _columns(source: str, row: Row, given: Columns) -> Columns:
    try:
        return find_columns(source, row if given.choices else collect_choices(row), given, flags=TRAIN_FLAGS)
    except DataError as error:
        if given != AS_USUAL or "that looks like" not in str(error):
            raise
    columns = {lower_name(name) for name in row}
    lacks = {name: [c for c in needed if c not in columns] for name, needed in LAYOUTS.items()}
    raise DataError(
        f"{source} has the columns {sorted(columns)}; "
        + ", ".join(f"as {name} it lacks {' and '.join(missing)}" for name, missing in lacks.items())
    )


def _asked(columns: Columns, place: str, row: Row) -> ChatMessages:
    name = columns.answers or "answer"
    if not columns.choices and isinstance(row.get(name), str) and not row[name].strip():
        answers: tuple[str, ...] = ("",)
        question = read_required_text(place, row, columns.question or "question")
    else:
        parsed = parse_question(place, collect_choices(row), columns)
        question, answers = parsed.text, parsed.answers
    return _pair(place, name, question, answers, row.get(name))


def _answered(place: str, row: Row) -> ChatMessages:
    question = parse_record(place, row)
    return _pair(place, "answers", question.text, question.answers, row.get("answers"))


def _pair(place: str, name: str, question: str, answers: tuple[str, ...], cell: Any) -> ChatMessages:
    if not answers:
        raise DataError(f"{place}: {name} is an empty list, so there is nothing to learn; remove the record")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _raw(cell, answers[0])}]


def _raw(cell: Any, stripped: str) -> str:
    """Return the text with the white space that it has in its cell: the indentation of code is learnt, too."""
    texts = cell if isinstance(cell, (list, tuple)) else [cell]
    return next((text for text in texts if isinstance(text, str) and text.strip() == stripped), stripped)


def _instruction(first: str, last: str, more: str, place: str, row: Row) -> ChatMessages:
    texts = []
    for column, text in ((first, row.get(first)), (last, row.get(last)), (more, row.get(more) or "")):
        if not isinstance(text, str):
            raise DataError(f"{place}: {column} must be text, found {type(text).__name__}; fix or remove the record")
        texts.append(check_whole_text(place, column, text))
    if not texts[0].strip():
        raise DataError(f"{place}: {first} is empty; fix or remove the record")
    chat = [{"role": "user", "content": texts[0]}]
    if texts[2].strip():
        chat.append({"role": INPUT, "content": texts[2]})
    return [*chat, {"role": "assistant", "content": texts[1]}]


def _messages(column: str, place: str, row: Row) -> ChatMessages:
    messages: Any = row.get(column)
    if isinstance(messages, str):  # a cell of a CSV file
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: messages is not JSON ({error.msg}); fix the record") from None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages must be a list of objects with role and content; fix the record")
    chat = []
    for message in messages:
        role, content = (message.get(k) if isinstance(message, Mapping) else None for k in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{place}: each message needs a role and a content, both text; fix the record")
        chat.append({"role": role, "content": check_whole_text(place, column, content)})
    if not any(m["role"] == "assistant" for m in chat):
        raise DataError(f"{place}: no message is the assistant's, so there is nothing to learn; fix the record")
    return chat
