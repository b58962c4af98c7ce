"""Checks a request's body before anything else reads it: JSON in UTF-8, without NaN, of bounded depth."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

#: Most fields of an object, and most items of a list that does not begin with a number, as lists of token ids do: to
#: check more than any request can mean would take seconds.
MAX_FIELDS, MAX_ITEMS = 256, 4096


def check_body(body: bytes, depth: int) -> None:
    """Check that a body is JSON as the standard defines it, of bounded size and depth.

    Args:
        body: The whole body.
        depth: Largest depth of nesting.

    Raises:
        ValueError: If it is not, with the reason in one line.
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the body is not UTF-8: byte {body[error.start]:#04x} at position {error.start}") from None
    if not text.strip():
        raise ValueError("the body is empty; send a JSON object")
    try:
        data = json.loads(text, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise ValueError(f"the body is nested deeper than {depth} levels") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    _walk(data, depth, pairs="\\u" in text)


def _walk(data: Any, depth: int, *, pairs: bool) -> None:
    """Check data level by level. Half a surrogate pair, which only an escape can write, cannot be sent back as text."""
    level, left = [data], depth
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict | list):
                if left == 0:
                    raise ValueError(f"the body is nested deeper than {depth} levels")
                _count(item)
                below += item.values() if isinstance(item, dict) else item
                if pairs and isinstance(item, dict):
                    below += item
            elif pairs and isinstance(item, str) and not _is_encodable(item):
                raise ValueError("the body holds half a surrogate pair, which is not a character")
        level, left = below, left - 1


def _count(item: dict[str, Any] | list[Any]) -> None:
    if isinstance(item, dict):
        if len(item) > MAX_FIELDS:
            raise ValueError(f"an object in the body may have {MAX_FIELDS} fields at most, got {len(item)}")
    elif len(item) > MAX_ITEMS and not isinstance(item[0], int | float):
        raise ValueError(
            f"a list in the body may have {MAX_ITEMS} items at most unless they are numbers, got {len(item)}"
        )


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _constant(name: str) -> NoReturn:
    raise ValueError(f"the body is not JSON: {name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the body is not JSON that can be read: {text[:20]} is too large a number")
    return value
