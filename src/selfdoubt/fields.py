"""Typed, range-checked reading of JSON and of settings; an error names the field, what it must be, and what was found.

A *kind* is a function ``(value, path) -> value`` that raises ``FieldError``; the path says where the value stands, as
``wrappers[0].alpha``. Kinds combine: ``table(listing(number()))``. ``read_object`` gives JSON no freedom: no NaN, no
repeated keys, no other encoding than UTF-8.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from selfdoubt.errors import ConfigError, LoadError

FieldCheck = Callable[[Any, str], Any]

#: Largest integer that every JSON reader keeps exactly.
EXACT = 2**53
REPAIR = "save or download it again"
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


class FieldError(ValueError):
    """The error for a value of another kind, or outside its range.

    Args:
        path: Path of the value, such as ``wrappers[0].alpha``.
        expected: Description of the values that are allowed.
        actual: The value that was found, as text.
    """

    def __init__(self, path: str, expected: str, actual: str) -> None:
        super().__init__(f"{path} must be {expected}, found {actual}")
        self.path, self.expected, self.actual = path, expected, actual


def shorten_value(value: Any) -> str:
    """Return a value as a short text of one line, however large or deep it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length()} bits"
    return _SHORT.repr(value)


def _refuse(path: str, expected: str, value: Any) -> FieldError:
    return FieldError(path, expected, shorten_value(value))


def number(
    low: float = -math.inf, high: float = math.inf, *, above: float = -math.inf, below: float = math.inf
) -> FieldCheck:
    """Return a kind: a finite number (no bool) in ``[low, high]`` that is ``> above`` and ``< below``."""
    bounds = {"at least": low, "above": above, "at most": high, "below": below}
    limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    expected = f"a finite number {limits}".strip()

    def check(value: Any, path: str) -> float:
        given: Any = math.nan
        if isinstance(value, Integral) and not isinstance(value, bool):
            given = int(value)  # beyond every float it compares, and does not convert
        elif isinstance(value, Real) and not isinstance(value, bool):
            given = float(value)
        if not (abs(given) <= 1e308 and low <= given <= high and above < given < below):
            raise _refuse(path, expected, value)
        return float(given)

    return check


def whole(low: int = 0, high: int = EXACT) -> FieldCheck:
    """Return a kind: a whole number (no bool) in ``[low, high]``."""

    def check(value: Any, path: str) -> int:
        given: Any = value if isinstance(value, Integral) and not isinstance(value, bool) else math.nan
        if not low <= given <= high:
            raise _refuse(path, f"a whole number from {low} to {high}", value)
        return int(given)

    return check


def flag(value: Any, path: str) -> bool:
    """Check for true or false."""
    if not isinstance(value, bool):
        raise _refuse(path, "true or false", value)
    return value


def text(value: Any, path: str) -> str:
    """Check for a text of one line: no control characters and no halves of a character."""
    if not isinstance(value, str) or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in value):
        raise _refuse(path, "a text of one line", value)
    return value


def string(value: Any, path: str) -> str:
    """Check for a text of any characters and lines."""
    if not isinstance(value, str):
        raise _refuse(path, "a text", value)
    return value


def nonempty(value: Any, path: str) -> str:
    """Check for a text of one line that is not empty."""
    if text(value, path) == "":
        raise _refuse(path, "a text that is not empty", value)
    return str(value)


def regex(value: Any, path: str) -> str:
    """Check for a regular expression."""
    if not isinstance(value, str):
        raise _refuse(path, "a regular expression", value)
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise FieldError(path, "a regular expression", f"{shorten_value(value)}: {error}") from None
    return value


def anything(value: Any, path: str) -> Any:  # noqa: ARG001
    """Accept any value, for entries that only people read."""
    return value


def choice(*options: Any) -> FieldCheck:
    """Return a kind: one of these values."""
    expected = " or ".join(repr(option) for option in options)

    def check(value: Any, path: str) -> Any:
        if not any(type(value) is type(option) and value == option for option in options):
            raise _refuse(path, expected, value)
        return value

    return check


def optional(kind: FieldCheck) -> FieldCheck:
    """Return a kind: nothing (None, JSON's null) or what ``kind`` takes."""

    def check(value: Any, path: str) -> Any:
        if value is None:
            return None
        try:
            return kind(value, path)
        except FieldError as error:
            expected = f"null or {error.expected}" if error.path == path else error.expected
            raise FieldError(error.path, expected, error.actual) from None

    return check


def either(first: FieldCheck, second: FieldCheck) -> FieldCheck:
    """Return a kind: what one of two kinds takes."""

    def check(value: Any, path: str) -> Any:
        try:
            return first(value, path)
        except FieldError as one:
            try:
                return second(value, path)
            except FieldError as other:
                raise FieldError(path, f"{one.expected}, or {other.expected}", one.actual) from None

    return check


def listing(kind: FieldCheck, least: int = 0, most: int | None = None) -> FieldCheck:
    """Return a kind: a list of ``least`` to ``most`` values of one kind; gives a tuple."""
    many = "" if not least and most is None else f" of {'' if least == most else 'at least '}{least}"

    def check(value: Any, path: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) < least or (most is not None and len(value) > most):
            raise _refuse(path, f"a list{many}", value)
        return tuple(kind(item, f"{path}[{i}]") for i, item in enumerate(value))

    return check


def ascending(value: Any, path: str) -> tuple[float, ...]:
    """Check for a list of finite numbers that is not empty, each at least as large as the one before."""
    numbers: tuple[float, ...] = listing(number(), 1)(value, path)
    for i in range(1, len(numbers)):
        if numbers[i] < numbers[i - 1]:
            raise FieldError(f"{path}[{i}]", f"at least {numbers[i - 1]}, as numbers ascend", str(numbers[i]))
    return numbers


def table(kind: FieldCheck) -> FieldCheck:
    """Return a kind: an object of any keys whose values are of one kind."""

    def check(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _refuse(path, "a table", value)
        return {nonempty(key, f"a key of {path}"): kind(item, f"{path}.{key}") for key, item in value.items()}

    return check


def record(
    needed: Mapping[str, FieldCheck], also: Mapping[str, FieldCheck] | None = None, *, open_ended: bool = False
) -> FieldCheck:
    """Return a kind: an object with exactly these keys.

    Args:
        needed: Required keys.
        also: Optional keys.
        open_ended: Keep unknown keys, as they are.
    """
    known = {**needed, **(also or {})}

    def check(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise _refuse(path or "it", f"a table with {', '.join(needed)}", value)
        start = f"{path}." if path else ""
        lacking = [key for key in needed if key not in value]
        if lacking:
            raise FieldError(f"{start}{lacking[0]}", "there", f"only {shorten_value(sorted(map(str, value)))}")
        strange = [key for key in value if key not in known]
        if strange and not open_ended:
            raise FieldError(path or "it", f"a table of {', '.join(known)}", f"the key {shorten_value(strange[0])}")
        return {key: known.get(key, anything)(item, f"{start}{key}") for key, item in value.items()}

    return check


def check_settings(settings: Any, kinds: Mapping[str, FieldCheck]) -> None:
    """Check the fields of a dataclass of settings.

    Raises:
        ConfigError: If one is of another kind or out of range; names the default.
    """
    defaults = {field.name: field.default for field in fields(settings)}
    for key, kind in kinds.items():
        if key == STORED_COMPILE:  # ``resolve_compile`` has checked it
            continue
        try:
            kind(getattr(settings, key), key)
        except FieldError as error:
            expected = error.expected.replace("null", "None").replace("true or false", "True or False")
            raise ConfigError(
                f"{error.path} must be {expected}, got {error.actual}; try {key}={defaults[key]!r}"
            ) from None


def resolve_compile(compiles: bool | None, symbolic_trace: bool | None) -> bool:
    """Return the value of the setting with two names, ``compile`` and ``symbolic_trace``; None is a name not given.

    Raises:
        ConfigError: If one is neither True nor False, or if they differ.
    """
    given = {"compile": compiles, STORED_COMPILE: symbolic_trace}
    for name, value in given.items():
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, got {shorten_value(value)}; try {name}=False")
    values = {value for value in given.values() if value is not None}
    if len(values) > 1:
        raise ConfigError(
            f"compile and symbolic_trace are one setting with two names, got compile={compiles} and "
            f"symbolic_trace={symbolic_trace}; give compile alone"
        )
    return True in values


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        LoadError: If the file is missing or not a file, is not UTF-8 or not JSON, is nested too deeply, repeats a key,
            or holds a number that is NaN or infinite.
    """
    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_distinct, parse_constant=_finite, parse_float=_finite
        )
        if not isinstance(content, dict):
            raise _refuse("it", "a table", content)
    except RecursionError:
        raise build_broken_file_error(path, "it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise build_broken_file_error(path, error) from None
    return content


def build_broken_file_error(path: Path, why: Exception | str, repair: str = REPAIR) -> LoadError:
    """Return the error for a file that cannot be used, in one line."""
    is_ours = isinstance(why, (str, FieldError))
    words = " ".join((str(why) if is_ours else f"{type(why).__name__}: {why}").split())[:400]
    return LoadError(f"{path} is broken: {words}; {repair}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise FieldError(shorten_value(key), "there once", "it twice")
        entries[key] = value
    return entries


def _finite(token: str) -> float:
    value = float(token)
    if not math.isfinite(value):
        raise FieldError("a number", "finite", token[:40])
    return value


#: Largest number of members, largest rank, and largest scale of a deviation or a noise that a file may ask for: far
#: above useful values.
MEMBERS, WIDTH, SCALE = 1_000_000, 2**16, 1e6
#: The name under which files keep a wrapper's ``compile``.
STORED_COMPILE = "symbolic_trace"
#: Kinds of the settings that all wrappers have, by their names in files.
SHARED: Mapping[str, FieldCheck] = {
    "param_filter": optional(regex),
    "shared_inputs": listing(nonempty),
    STORED_COMPILE: flag,
    "verbose": whole(0, 2),
    "seed": whole(-(2**43), 2**43),  # times a million it still fits 64 bits
}
