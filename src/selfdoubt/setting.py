"""Settings of dataclasses, described once: the command line makes its flags of them."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, text: str, *, flag: str | None = None, metavar: str | None = None) -> Any:
    """Return a dataclass field that is also a flag.

    Args:
        default: Its value where none is given.
        text: One sentence of help.
        flag: The flag's names, e.g. "--candidates --samples"; None makes one of the field's name.
        metavar: Stands for the value in the help; None names its type.
    """
    return field(default=default, metadata={"help": text, "flag": flag, "metavar": metavar})
