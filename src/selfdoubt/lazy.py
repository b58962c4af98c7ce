"""Public names of a package that are imported when they are used: help texts then need no heavy library."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def export_lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and the ``__dir__`` of a package.

    Args:
        package: Its ``__name__``.
        homes: The module, inside the package, of each public name.

    Example:
        ``__getattr__, __dir__ = export_lazily(__name__, {"fit": "run"})`` at the end of an ``__init__.py``.
    """

    def get_name(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get_name, lambda: sorted(homes)
