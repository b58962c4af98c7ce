"""Instruction data from a file or the hub, as chats: which columns there are, and where a record is broken.

Three layouts are known by their columns: instruction (``instruction``, ``output``, and ``input`` that may be empty),
question and answer (``question``, ``answer``), and chats (``messages``, a list of objects with ``role`` and
``content``).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from selfdoubt.errors import DataError, require

Chat = list[dict[str, str]]
Record = Mapping[str, Any]

#: The role of a text that an instruction works on. The Alpaca prompt has a place for it; other templates get it after
#: the instruction.
INPUT = "input"

LAYOUTS = {
    "instruction": ("instruction", "output"),
    "question and answer": ("question", "answer"),
    "chat": ("messages",),
}
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


def read(source: str, *, limit: int | None = None) -> Iterator[Chat]:
    """The chats of a file (JSON, JSONL, CSV or Parquet) or of a data set on the hub, one by one.

    Raises:
        DataError: If it cannot be read, lacks the columns of every layout, or a record is broken; the message names the
            place.
    """
    return islice(_chats(source), limit)


def _chats(source: str) -> Iterator[Chat]:
    layout: str | None = None
    for place, record in _records(source):
        if layout is None:
            layout = _layout(source, record)
        yield _chat(layout, place, record)
    if layout is None:
        raise DataError(f"{source} holds no records; give a file with at least two")


def _records(source: str) -> Iterator[tuple[str, Record]]:
    path = Path(source).expanduser()
    if path.is_dir() or (
        not path.exists() and (path.suffix in SUFFIXES or path.is_absolute() or source.startswith("."))
    ):
        raise DataError(f"no data file at {source!r}; give a JSON, JSONL, CSV or Parquet file, or a name on the hub")
    if not path.exists():
        return _from_hub(source)
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Record]]]] = {
        ".json": _from_json, ".jsonl": _from_jsonl, ".csv": _from_csv, ".parquet": _from_parquet,
    }  # fmt: skip
    if path.suffix not in readers:
        raise DataError(f"{source} ends in {path.suffix!r}; give a file that ends in {', '.join(SUFFIXES)}")
    return readers[path.suffix](path)


def _from_json(path: Path) -> Iterator[tuple[str, Record]]:
    """A list of objects; each is parsed where it stands, so that its line is known."""
    text = _text(path)
    decoder = json.JSONDecoder()
    at, line = _skip(text, 0, 1)
    if text[at : at + 1] != "[":
        if text[at : at + 1] == "{":  # objects one a line, under the other name
            yield from _from_jsonl(path)
            return
        raise DataError(f"{path}, line {line}: wanted a list of objects, found {text[at : at + 20]!r}")
    at, line = _skip(text, at + 1, line)
    while text[at : at + 1] != "]":
        try:
            record, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: broken JSON ({error.msg}); mend the record") from None
        yield f"{path}, line {line}", record
        at, line = _skip(text, end, line + text.count("\n", at, end))
        if text[at : at + 1] == ",":
            at, line = _skip(text, at + 1, line)
        elif text[at : at + 1] != "]":
            raise DataError(f"{path}, line {line}: wanted ',' or ']' after a record, found {text[at : at + 20]!r}")


def _skip(text: str, at: int, line: int) -> tuple[int, int]:
    """Past white space, counting lines."""
    while at < len(text) and text[at].isspace():
        line += text[at] == "\n"
        at += 1
    return at, line


def _from_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: broken JSON ({error.msg}); mend the record") from None


def _from_csv(path: Path) -> Iterator[tuple[str, Record]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), restkey="", strict=True)
    try:
        for record in reader:
            if "" in record:
                raise DataError(f"{path}, line {reader.line_num}: more cells than the header has; put texts in quotes")
            yield f"{path}, line {reader.line_num}", record
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV ({error}); mend the quotes") from None


def _from_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    parquet = require("pyarrow.parquet", "train")
    try:
        file = parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", record
    except (OSError, require("pyarrow", "train").ArrowInvalid) as error:
        raise DataError(f"{path} is not a Parquet file ({' '.join(str(error).split())[:100]})") from None


def _from_hub(name: str) -> Iterator[tuple[str, Record]]:
    datasets = require("datasets", "train")
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub raises what it likes
        text = " ".join(str(error).split())[:160]
        raise DataError(
            f"{name!r} is neither a file here nor a data set that can be loaded from the hub ({type(error).__name__}: "
            f"{text}); give a JSON, JSONL, CSV or Parquet file, or check name and network"
        ) from None
    for number, record in enumerate(found, 1):
        yield f"{name}, row {number}", record


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None


def _layout(source: str, record: Any) -> str:
    """Which layout the columns of the first record are."""
    columns = set(record) if isinstance(record, Mapping) else set()
    for layout, wanted in LAYOUTS.items():
        if columns.issuperset(wanted):
            return layout
    lacks = {name: [c for c in wanted if c not in columns] for name, wanted in LAYOUTS.items()}
    raise DataError(
        f"{source} has the columns {sorted(columns)}; "
        + ", ".join(f"as {name} it lacks {' and '.join(missing)}" for name, missing in lacks.items())
    )


def _chat(layout: str, place: str, record: Any) -> Chat:
    if not isinstance(record, Mapping):
        raise DataError(f"{place}: wanted an object with columns, found {type(record).__name__}")
    if layout == "chat":
        return _messages(place, record.get("messages"))
    first, last = LAYOUTS[layout]
    answers = record.get(last)
    # Question sets list every right answer: the first one is learnt.
    answer = answers[0] if layout != "instruction" and isinstance(answers, list) and answers else answers
    texts: dict[str, str] = {}
    for column, text in ((first, record.get(first)), (last, answer), (INPUT, record.get(INPUT) or "")):
        if not isinstance(text, str):
            raise DataError(f"{place}: {column} must be text, found {type(text).__name__}; mend or remove the record")
        texts[column] = text
    if not texts[first].strip():
        raise DataError(f"{place}: {first} is empty; mend or remove the record")
    chat = [{"role": "user", "content": texts[first]}]
    if layout == "instruction" and texts[INPUT].strip():
        chat.append({"role": INPUT, "content": texts[INPUT]})
    return [*chat, {"role": "assistant", "content": texts[last]}]


def _messages(place: str, messages: Any) -> Chat:
    if isinstance(messages, str):  # a cell of a CSV file
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: messages is not JSON ({error.msg}); mend the record") from None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages must be a list of objects with role and content; mend the record")
    chat = []
    for message in messages:
        role, content = (message.get(k) if isinstance(message, Mapping) else None for k in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{place}: each message needs a role and a content, both text; mend the record")
        chat.append({"role": role, "content": content})
    if not any(m["role"] == "assistant" for m in chat):
        raise DataError(f"{place}: no message is the assistant's, so there is nothing to learn; mend the record")
    return chat
