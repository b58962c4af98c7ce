"""``setting``: a dataclass field with a help text, from which the command line builds a flag."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, text: str, *, flag: str | None = None, metavar: str | None = None) -> Any:
    """Return a dataclass field that is also a flag.

    Args:
        default: Default value.
        text: One sentence of help.
        flag: Names of the flag, e.g. "--candidates --samples"; None derives one from the field's name.
        metavar: Placeholder of the value in the help; None takes its type.
    """
    return field(default=default, metadata={"help": text, "flag": flag, "metavar": metavar})
