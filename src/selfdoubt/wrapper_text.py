"""Parses a wrapper written in one line, as flags take it: ``vote:n_voters=5``, ``sample:distribution=Normal(0.1)``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from selfdoubt.errors import ConfigError

METHODS = ("vote", "sample", "sculpt", "density")
#: The parameter of a noise distribution that may be written without its name.
_FIRST = {"Bernoulli": "p", "Normal": "std"}
_OPENING, _CLOSING = "([{", ")]}"


def parse_wrapper_text(text: str, *others: str) -> str | dict[str, Any]:
    """Parse a wrapper into ``method`` and settings, as ``manifest.from_json`` takes them.

    A word of ``others`` is returned as it is.

    Args:
        text: ``METHOD`` or ``METHOD:setting=value,...``. A value is JSON, a distribution with its parameters such as
            ``Normal(0.1, trainable=true)``, or else a word. Commas inside brackets do not separate settings.
        others: Words that are allowed in place of a wrapper: "none", "auto".

    Raises:
        ConfigError: If the method is unknown, or a setting has no value.
    """
    name, _, settings = text.partition(":")
    if name in others and not settings:
        return name
    if name not in METHODS:
        raise ConfigError(f"--wrapper must be {', '.join((*others, *METHODS))}, got {name!r}")
    parsed: dict[str, Any] = {"method": name}
    for item in _split(settings):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"a wrapper's settings look like n_voters=5,rank=8, got {item!r}")
        key = key.strip()
        parsed["symbolic_trace" if key == "compile" else key] = _parse_value(value.strip())
    return parsed


def _split(text: str) -> Iterator[str]:
    """Yield the items between commas that stand outside of brackets; a backslash escapes a bracket of a regex."""
    depth, item = 0, ""
    for i, sign in enumerate(text):
        if text[i - 1 : i] != "\\":
            depth += (sign in _OPENING) - (sign in _CLOSING)
        if sign == "," and depth <= 0:
            yield from [item] if item else []
            item = ""
        else:
            item += sign
    yield from [item] if item else []


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    call = re.fullmatch(rf"({'|'.join((*_FIRST, 'Laplace'))})\((.*)\)", text)
    if call is None:
        return text
    name, inside = call.groups()
    settings: dict[str, Any] = {}
    for item in _split(inside):
        key, equals, value = item.partition("=")
        if not equals:
            key, value = _FIRST.get(name, ""), item
        if not key or key.strip() in settings:
            raise ConfigError(f"{name} takes its parameters as in {name}(0.1, trainable=true), got {text!r}")
        settings[key.strip()] = _parse_value(value.strip())
    return {"name": name, **settings} if settings else name
