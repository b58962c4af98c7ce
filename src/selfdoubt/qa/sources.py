"""Rows of a question file or of a data set on the hub, each with its place in words. What they mean: ``layouts``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfdoubt.errors import DataError, require

Row = Mapping[str, Any]
Rows = list[tuple[str, Row]]

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
_SPLITS = ("validation", "test", "train")


def from_file(path: Path) -> Rows:
    """The rows of a JSONL, JSON, CSV or TSV file. SQuAD's and TriviaQA's own JSON is unfolded to a row a question.

    Raises:
        DataError: If it cannot be read, is broken, or holds no rows; the message names the place.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix!r}; give a file that ends in {', '.join(SUFFIXES)}")
    text = _text(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        found = list(_from_csv(path, text))
    elif path.suffix.lower() == ".jsonl" and text.lstrip()[:1] != "[":
        found = list(_from_lines(path, text))
    else:
        found = list(_from_json(path, text))
    if not found:
        raise DataError(f"{path} holds no questions; give a file with at least one")
    return found


def from_hub(name: str, config: str | None, split: str | None, revision: str | None) -> Rows:
    """The rows of a data set on the hub.

    Args:
        name: Its name, "owner/name".
        config: One of its configurations, where it has several.
        split: None takes validation, test or train, the first that there is.
        revision: A branch, tag or commit.

    Raises:
        DataError: If it cannot be loaded.
        MissingExtraError: If the package ``datasets`` is not installed.
    """
    datasets = require("datasets", "qa")
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, config, split=split, revision=revision)
        if split is None:
            split = next((s for s in _SPLITS if s in found), next(iter(found)))
            found = found[split]
        return [(f"{name}, {split}, row {number}", row) for number, row in enumerate(found, 1)]
    except Exception as error:  # the hub raises what it likes
        text = " ".join(str(error).split())[:160]
        raise DataError(
            f"{name!r} is neither a file here nor a data set that can be loaded from the hub ({type(error).__name__}: "
            f"{text}); give a {', '.join(SUFFIXES)} file, or check name, configuration, split and network"
        ) from None


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv") from None


def _from_lines(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(text.split("\n"), 1):  # a text may hold other line ends
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{place}: broken JSON ({error}); write one object a line") from None
            yield place, _object(place, row)


def _from_csv(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", strict=True)
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if row.get(""):
                raise DataError(f"{place}: more cells than the header has; put texts with {delimiter!r} in quotes")
            yield place, row
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: broken CSV ({error}); mend the quotes") from None


def _from_json(path: Path, text: str) -> Iterator[tuple[str, Row]]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":  # objects one a line, under the other name
            yield from _from_lines(path, text)
            return
        raise DataError(f"{path}, line {error.lineno}: broken JSON ({error.msg}); mend or download it again") from None
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        yield from _squad(path, found["data"])
    else:
        if isinstance(found, dict):
            found = found["Data"] if isinstance(found.get("Data"), list) else [found]
        if not isinstance(found, list):
            raise DataError(f"{path}: wanted a list of objects, found {type(found).__name__}")
        for number, row in enumerate(found, 1):
            yield f"{path}, entry {number}", _object(f"{path}, entry {number}", row)


def _squad(path: Path, articles: list[Any]) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    number += 1
                    place = f"{path}, question {asked.get('id', number)}"
                    impossible = asked.get("is_impossible", False)
                    if not impossible and not asked["answers"]:
                        raise DataError(f"{place}: has no answers but is not marked is_impossible; mend the file")
                    answers = [] if impossible else asked["answers"]
                    row = {"id": asked.get("id"), "question": asked["question"], "answers": answers}
                    yield place, {**row, "context": paragraph["context"], "topic": article.get("title")}
    except (KeyError, TypeError, AttributeError) as error:
        lacks = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{path}: wanted SQuAD's data[].paragraphs[].qas[], and what follows question {number} {lacks}"
        ) from None


def _object(place: str, row: Any) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: wanted an object with keys, found {type(row).__name__}")
    return row
