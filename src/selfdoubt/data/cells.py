"""Reads a cell of a row as one text or as several: plain, a JSON or Python list, or SQuAD's or TriviaQA's object."""

from __future__ import annotations

import ast
import io
import json
import math
import re
import tokenize
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from selfdoubt.data.readers import Row
from selfdoubt.errors import DataError

_HALF = re.compile("[\ud800-\udfff]")


def has_lone_surrogate(text: str) -> bool:
    """Return whether a text holds half of a character: a surrogate that stands alone."""
    return bool(_HALF.search(text))


def check_whole_text(place: str, column: str, text: str) -> str:
    """Check that a text holds no half of a character (a lone surrogate), which no tokenizer takes.

    Raises:
        DataError: If it holds one.
    """
    half = _HALF.search(text)
    if half:
        escape = f"\\u{ord(half[0]):04x}"
        raise DataError(f"{place}: {column} holds {escape}, half of a character; fix or remove the row")
    return text


def trim_text(text: str) -> str:
    """Return a text without blank lines before it and white space behind it.

    Its first line keeps an indentation, as code needs it: a tab or at least two spaces. One space is a slip.

    Example:
        >>> trim_text(" Who? "), trim_text("\\n    if x:\\n        y\\n")
        ('Who?', '    if x:\\n        y')
    """
    bare = text.strip()
    indent = text[: len(text) - len(text.lstrip())].rpartition("\n")[2]
    return indent + bare if not indent.strip(" \t") and indent not in ("", " ") else bare


def read_required_text(place: str, row: Row, column: str) -> str:
    """Return a cell's text, which must not be empty, without blank lines around it (``trim_text``).

    Raises:
        DataError: If it is missing, empty or not text.
    """
    cell = row.get(column)
    if not isinstance(cell, str):
        raise DataError(f"{place}: {column} must be text, found {type(cell).__name__}; fix or remove the row")
    if not cell.strip():
        raise DataError(f"{place}: {column} is empty; fix or remove the row")
    return check_whole_text(place, column, trim_text(cell))


def read_optional_text(place: str, row: Row, column: str | None) -> str | None:
    """Return a cell's text, or its number as text; None for an empty cell.

    Raises:
        DataError: If the cell holds something else.
    """
    cell = None if column is None else row.get(column)
    text = None if cell is None or cell == "" else read_plain_text(place, str(column), cell)
    return trim_text(cell) if isinstance(cell, str) and text else text


def read_texts(place: str, column: str, cell: Any, separator: str | None = None) -> tuple[str, ...]:
    """Return all texts of a cell, each once.

    The cell is a list, a text that is a list in JSON or Python, SQuAD's or TriviaQA's object, or a single text.

    Args:
        place: File and row of the cell, for messages.
        column: Name of its column.
        cell: Its content.
        separator: Separator of several texts in one cell, e.g. ";"; empty parts are left out.

    Raises:
        DataError: If it is empty, or not text. An explicit empty list gives no text: then only declining is right.
    """
    if isinstance(cell, str):
        cell = parse_list(place, column, cell, separator)
    if isinstance(cell, Mapping):
        keys = {str(k).lower(): k for k in cell}
        if "text" in keys:
            cell = cell[keys["text"]]
        elif "value" in keys:
            cell = [cell[keys["value"]], *(cell[keys["aliases"]] if "aliases" in keys else ())]
        else:
            raise DataError(f"{place}: {column} is an object with {format_keys(cell)}; wanted text or a list of texts")
    if isinstance(cell, Sequence) and not isinstance(cell, str):
        entries = [part["text"] if isinstance(part, Mapping) and "text" in part else part for part in cell]
    else:
        entries = [cell]
    return tuple(dict.fromkeys(text for part in entries for text in _ways(place, column, part)))


def _ways(place: str, column: str, part: Any) -> tuple[str, ...]:
    """Return a text; a whole number that pandas made a float (4.0) is 4, too."""
    text = read_plain_text(place, column, part)
    whole = isinstance(part, float) and part.is_integer() and text.endswith(".0")
    return (text.removesuffix(".0"), text) if whole else (text,)


def parse_list(place: str, column: str, cell: str, separator: str | None) -> Any:
    """Parse a cell's text as a list or an object; else split it at the separator, if there is one.

    Raises:
        DataError: If it looks like a list of Python or numpy but cannot be parsed.
    """
    bare = cell.strip()
    if (bare[:1], bare[-1:]) in (("[", "]"), ("{", "}"), ("(", ")")):
        for parse in (json.loads, _python):
            try:
                value = parse(bare)
            except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
                continue
            if isinstance(value, tuple) and value and all(isinstance(part, str) for part in value):
                return list(value)
            if isinstance(value, list) or (isinstance(value, dict) and _KNOWN & {str(k).lower() for k in value}):
                return value
        if _LOOKS.match(bare):
            raise DataError(
                f"{place}: {column} looks like a list but is neither JSON nor Python: {bare[:40]!r}; write JSON, with "
                "commas and double quotes"
            )
    if separator is None:
        return cell
    pieces = [part.strip() for part in cell.split(separator) if part.strip()]
    return pieces or cell


_KNOWN = {"text", "value"}  # keys of SQuAD's and TriviaQA's objects
_LOOKS = re.compile(r"""\[\s*['"]|\{\s*['"](text|value|aliases|answer_start)['"]\s*:""")


def _python(text: str) -> Any:
    """Parse a list as Python prints it. Numpy prints no commas, so Python would join all its texts into one."""
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    if (tokenize.STRING, tokenize.STRING) in pairwise(kinds):
        raise ValueError("no commas")
    return ast.literal_eval(text)


def read_plain_text(place: str, column: str, cell: Any) -> str:
    """Return a text or a finite number as text, stripped.

    Raises:
        DataError: If it is something else, empty, or holds half of a character.
    """
    is_number = isinstance(cell, (int, float)) and not isinstance(cell, bool) and math.isfinite(cell)
    if not isinstance(cell, str) and not is_number:
        raise DataError(f"{place}: {column} must be text, found {cell!r}; fix or remove the row")
    if not str(cell).strip():
        hint = " (write [] where only declining is right)" if column.lower().startswith("answer") else ""
        raise DataError(f"{place}: {column} is empty{hint}; fix or remove the row")
    return check_whole_text(place, column, str(cell).strip())


def format_keys(row: Mapping[Any, Any]) -> str:
    """Return the keys of a row as text, for messages."""
    return ", ".join(map(repr, row)) or "none"
