"""Walks nested inputs and outputs: tensors in tuples, named tuples, lists, dicts, dataclasses and Hugging Face's
``ModelOutput``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def iter_tensors(tree: Any) -> Iterator[Tensor]:
    """Yield all tensors of a tree, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from iter_tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from iter_tensors(value)
    elif _has_fields(tree):
        for field in fields(tree):
            yield from iter_tensors(getattr(tree, field.name))


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return the same structure with ``function(leaf, *same place in others)`` in place of each leaf.

    A leaf is whatever is not a container: a tensor, None, a number, a key-value cache. Missing parts of ``others``
    arrive as None. A dataclass is copied without its ``__init__``, which may compute or check fields.
    """
    if isinstance(tree, Mapping):
        mapped = {
            key: tree_map(function, value, *(None if o is None else o.get(key) for o in others))
            for key, value in tree.items()
        }
        is_model_output = hasattr(tree, "to_tuple")
        return type(tree)(**mapped) if is_model_output else type(tree)(mapped)  # type: ignore[call-arg]
    if isinstance(tree, (tuple, list)):
        values = [
            tree_map(function, value, *(None if o is None else o[i] for o in others)) for i, value in enumerate(tree)
        ]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if _has_fields(tree):
        new = copy.copy(tree)
        for field in fields(tree):
            there = (None if o is None else getattr(o, field.name) for o in others)
            object.__setattr__(new, field.name, tree_map(function, getattr(tree, field.name), *there))
        return new
    return function(tree, *others)


def _has_fields(tree: Any) -> bool:
    """Return True for an instance of a dataclass, unless its class says that it is a leaf."""
    return is_dataclass(tree) and not isinstance(tree, type) and not getattr(tree, "is_leaf", False)
