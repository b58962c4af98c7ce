"""Reads the rows of a JSON, JSONL, CSV, TSV or Parquet file or of a data set on the hub, each with its place."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from selfdoubt.errors import DataError, require

Row = Mapping[str, Any]
Placed = tuple[str, Row]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
#: Characters that a cell of CSV may have; the csv module's own limit is 131,072.
LONGEST_CELL = 1 << 30
_EVALUATION_SPLITS = ("validation", "test", "train")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SEPARATORS = {";": "';'", ",": "','", "\t": "tabs", "|": "'|'"}


def read_file(path: Path) -> Iterator[Placed]:
    """Yield the rows of a file. SQuAD's and TriviaQA's own JSON gives one row per question.

    Raises:
        DataError: If it cannot be read or is broken; the message names the place.
        MissingExtraError: If it is Parquet and pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix!r}; give a file that ends in {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _from_parquet(path)
    text = _text(path)
    if suffix in (".csv", ".tsv"):
        return _from_csv(path, text)
    start, at_line = _skip(text, 0, 1)
    if text[start : start + 1] == "[":
        return _from_list(path, text, start, at_line)
    return _from_lines(path, text) if suffix == ".jsonl" else _from_json(path, text, start, at_line)


def looks_like_file(source: str) -> bool:
    """Return whether a source looks like the name of a file, so that it is not looked up on the hub."""
    path = Path(source).expanduser()
    return path.suffix.lower() in SUFFIXES or path.is_absolute() or source.startswith(".")


def read_json_lines(path: Path) -> Iterator[Placed]:
    """Yield the objects of a JSONL file of any name, one per line.

    Raises:
        DataError: If the file cannot be read, or a line is not a JSON object; the message names the place.
    """
    yield from _from_lines(path, _text(path))


def read_text_lines(path: Path) -> list[str]:
    """Return the lines of a text file.

    Raises:
        DataError: If it cannot be read, or is not UTF-8.
    """
    return _text(path).splitlines()


def read_file_rows(path: Path) -> list[Placed]:
    """Return all rows of a question file, at least one.

    Raises:
        DataError: If it cannot be read, is broken, or holds no rows; the message names the place.
    """
    rows = list(read_file(path))
    if not rows:
        raise DataError(f"{path} holds no questions; give a file with at least one")
    return rows


def read_hub(
    name: str, config: str | None, split: str | None, revision: str | None, *, splits: tuple[str, ...], extra: str
) -> Iterator[Placed]:
    """Yield the rows of a data set on the hub.

    Args:
        name: Its name, "owner/name".
        config: One of its configurations, where it has several.
        split: None takes the first of ``splits`` that there is, else its first.
        revision: A branch, tag or commit.
        splits: The usual splits, in order.
        extra: Extra to name in the error if the package ``datasets`` is missing.

    Raises:
        DataError: If it cannot be loaded.
        MissingExtraError: If the package ``datasets`` is not installed.
    """
    datasets = require("datasets", extra)
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, split=split, revision=revision)
        if split is None:
            split = next((s for s in splits if s in loaded), next(iter(loaded)))
            loaded = loaded[split]
        yield from ((f"{name}, {split}, row {number}", row) for number, row in enumerate(loaded, 1))
    except Exception as error:  # the hub's library raises many kinds of errors
        text = " ".join(str(error).split())[:160]
        raise DataError(
            f"{name!r} is neither a file here nor a data set that can be loaded from the hub ({type(error).__name__}: "
            f"{text}); give a {', '.join(SUFFIXES)} file, or check name, configuration, split and network"
        ) from None


def read_hub_rows(name: str, config: str | None, split: str | None, revision: str | None) -> list[Placed]:
    """Return the rows of a question set on the hub; a split of None takes validation, test or train, the first present.

    Raises:
        DataError: If it cannot be loaded.
        MissingExtraError: If the package ``datasets`` is not installed.
    """
    return list(read_hub(name, config, split, revision, splits=_EVALUATION_SPLITS, extra="qa"))


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if raw[:2] in _UTF_16 or b"\0" in raw[:2]:
            raise DataError(f"{path} is not UTF-8 text but UTF-16; save it as UTF-8, or convert it, e.g. with iconv")
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None


def _from_lines(path: Path, text: str) -> Iterator[Placed]:
    for number, row_text in enumerate(text.split("\n"), 1):  # a text may hold other line ends
        if row_text.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(row_text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: broken JSON ({_why(error)}); write one object per line") from None
            yield place, _object(place, row)


def _from_csv(path: Path, text: str) -> Iterator[Placed]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_CELL))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        heads = (cells for cells in reader if cells and not cells[0].lower().startswith("sep="))  # Excel's own line
        header = [name.strip() for name in next(heads, [])]
        twice = next((name for name in header if name and header.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{path}, line {reader.line_num}: the column {twice!r} comes twice; rename one of them")
        _check_separator(path, header, delimiter)
        for cells in reader:
            if any(cell.strip() for cell in cells):  # Excel writes rows of empty cells
                yield (place := f"{path}, line {reader.line_num}"), _named(place, header, cells, delimiter)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV ({error}); fix the quotes") from None


def _check_separator(path: Path, header: list[str], delimiter: str) -> None:
    """Refuse a header of one cell that holds another separator, as Excel writes it in many countries.

    Raises:
        DataError: If it does; the message names the separator.
    """
    names = [name for name in header if name]
    other = next((c for c in _SEPARATORS if c != delimiter and c in names[0]), None) if len(names) == 1 else None
    if other is not None:
        suffix, separator = (".tsv", "tabs") if delimiter == "\t" else (".csv", "commas")
        name = {"\t": ", or name it .tsv", ",": ", or name it .csv"}.get(other, "")
        raise DataError(
            f"{path}: the header {names[0][:40]!r} is separated by {_SEPARATORS[other]}, and a {suffix} file by "
            f"{separator}; save it with {separator}{name}"
        )


def _named(place: str, header: list[str], cells: list[str], delimiter: str) -> Row:
    """Return the cells by column name; a column without a name must be empty, or pandas' row numbers."""
    if any(cell.strip() for cell in cells[len(header) :]):
        raise DataError(f"{place}: more cells than the header has; put texts with {delimiter!r} in quotes")
    row: dict[str, Any] = {}
    for number, name in enumerate(header):
        cell = cells[number] if number < len(cells) else None
        if name:
            row[name] = cell
        elif cell is not None and cell.strip() and not (number == 0 and cell.strip().isdecimal()):
            raise DataError(f"{place}: column {number + 1} has no name but holds {cell[:40]!r}; name it in the header")
    return row


def _from_list(path: Path, text: str, at: int, at_line: int) -> Iterator[Placed]:
    """Read a list of objects; each is parsed where it stands, so that its line is known."""
    decoder, number = json.JSONDecoder(), 0
    at, at_line = _skip(text, at + 1, at_line)
    while text[at : at + 1] != "]":
        record, end = _parsed(path, decoder, text, at)
        number += 1
        place = f"{path}, line {at_line}, entry {number}"
        yield place, _object(place, record)
        at, at_line = _skip(text, end, at_line + text.count("\n", at, end))
        if text[at : at + 1] == ",":
            at, at_line = _skip(text, at + 1, at_line)
        elif text[at : at + 1] != "]":
            raise DataError(f"{path}, line {at_line}: wanted ',' or ']' after a record, found {text[at : at + 20]!r}")
    at, at_line = _skip(text, at + 1, at_line)
    if at < len(text):
        raise DataError(f"{path}, line {at_line}: found {text[at : at + 20]!r} behind the list; remove it")


def _from_json(path: Path, text: str, at: int, at_line: int) -> Iterator[Placed]:
    if text[at : at + 1] != "{":
        raise DataError(f"{path}, line {at_line}: wanted a list of objects, found {text[at : at + 20]!r}")
    document, end = _parsed(path, json.JSONDecoder(), text, at)
    if text[end:].strip():  # objects one a line, under the other name
        yield from _from_lines(path, text)
    elif isinstance(document.get("data"), list) and {"columns", "schema"} & set(document):
        raise DataError(f"{path}: wanted a list of objects, found a table; in pandas, to_json(orient='records')")
    elif isinstance(document.get("data"), list):
        yield from _squad(path, document["data"])
    else:
        rows = document["Data"] if isinstance(document.get("Data"), list) else [document]
        if document and all(isinstance(cell, Mapping) for cell in document.values()) and len(rows) == 1:
            problem = "a list of objects, found objects by name; in pandas, to_json(orient='records')"
            raise DataError(f"{path}: wanted {problem}")
        places = (f"{path}, entry {number}" for number in range(1, len(rows) + 1))
        yield from ((place, _object(place, row)) for place, row in zip(places, rows, strict=True))


def _parsed(path: Path, decoder: json.JSONDecoder, text: str, at: int) -> tuple[Any, int]:
    try:
        return decoder.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        at_line = getattr(error, "lineno", None) or text.count("\n", 0, at) + 1
        raise DataError(f"{path}, line {at_line}: broken JSON ({_why(error)}); fix the record") from None


def _why(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(getattr(error, "msg", error))


def _skip(text: str, at: int, at_line: int) -> tuple[int, int]:
    """Go past white space, counting lines."""
    while at < len(text) and text[at].isspace():
        at_line += text[at] == "\n"
        at += 1
    return at, at_line


def _squad(path: Path, articles: list[Any]) -> Iterator[Placed]:
    number = 0
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    number += 1
                    place = f"{path}, question {asked.get('id', number)}"
                    impossible = asked.get("is_impossible", False)
                    if not impossible and not asked["answers"]:
                        raise DataError(f"{place}: has no answers but is not marked is_impossible; fix the file")
                    answers = [] if impossible else asked["answers"]
                    row = {"id": asked.get("id"), "question": asked["question"], "answers": answers}
                    yield place, {**row, "context": paragraph["context"], "topic": article.get("title")}
    except (KeyError, TypeError, AttributeError) as error:
        lacks = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{path}: wanted SQuAD's data[].paragraphs[].qas[], and what follows question {number} {lacks}"
        ) from None


def _from_parquet(path: Path) -> Iterator[Placed]:
    parquet = require("pyarrow.parquet", "train")
    try:
        batches = parquet.ParquetFile(path).iter_batches()
        for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
            yield f"{path}, row {number}", {k: v for k, v in row.items() if k != "__index_level_0__"}
    except (OSError, require("pyarrow", "train").ArrowInvalid) as error:
        raise DataError(f"{path} is not a Parquet file ({' '.join(str(error).split())[:100]})") from None


def _object(place: str, row: Any) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: wanted an object with keys, found {type(row).__name__}")
    return row
