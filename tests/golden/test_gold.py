"""A golden file that differs is found: each leaf of each file, changed, is a difference."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.golden import gold

NAMES = sorted(path.stem for path in gold.FILES.glob("*.json"))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all leaves but hashes, which only an exact comparison reads."""
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if key != "hash":
                yield from leaves(item, (*path, key))
    else:
        yield path


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    """Return a copy with another leaf at the path."""
    found = copy.deepcopy({"": value})
    place: Any = found
    for key in ("", *path)[:-1]:
        place = place[key]
    key = ("", *path)[-1]
    old = place[key]
    if isinstance(old, bool) or old is None:
        place[key] = "other"
    elif isinstance(old, int | float):
        place[key] = 2 * old + type(old)(1_000_000)
    elif isinstance(old, str):
        # Of a printed number the first digit: the last may differ by one.
        place[key] = re.sub(r"\d", r"7\g<0>", old, count=1) if "~numbers" in path else f"{old}x"
    else:
        place[key] = ["more"]
    return found[""]


def differ(a: Any, b: Any) -> bool:
    return bool(list(gold.differences(a, b, gold.is_near, "")))


@pytest.mark.parametrize("name", NAMES)
def test_another_value_anywhere_is_a_difference(name: str) -> None:
    value = gold.read(name)["value"]
    assert not differ(value, value)
    paths = list(leaves(value))
    for path in paths[:: max(1, len(paths) // 40)]:
        assert differ(value, changed(value, path)), path


def test_keys_are_compared_with_their_order() -> None:
    assert differ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert differ({"a": 1}, {"a": 1, "b": 2})
    assert differ([1, 2], [1])


def test_numbers_may_differ_in_their_last_digits_alone() -> None:
    assert not differ({"x": 1.0}, {"x": 1.0005})
    assert differ({"x": 1.0}, {"x": 1.002})
    assert differ({"n": 1000}, {"n": 1001})
    assert not differ(gold.text("risk 0.123"), gold.text("risk 0.124"))
    assert differ(gold.text("risk 0.123"), gold.text("risk 0.126"))
    assert differ(gold.text("risk 0.123"), gold.text("risc 0.123"))
    many, more = [0.1 * i for i in range(100)], [0.1 * i for i in range(99)] + [9.8]
    assert differ(gold.pack(many), gold.pack(more))
    assert json.dumps(gold.pack(many)) != json.dumps(gold.pack([x + 1e-12 for x in many]))


def test_the_last_digits_count_where_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(gold, "FILES", tmp_path)
    monkeypatch.delenv(gold.EXACT, raising=False)
    gold.write("a", {"x": 0.1})
    gold.check("a", {"x": 0.1 + 1e-13})
    monkeypatch.setenv(gold.EXACT, "1")
    gold.check("a", {"x": 0.1})
    for other in (0.1 + 1e-13, 0.1 + 1e-7, 0.2):
        with pytest.raises(AssertionError, match="differ"):
            gold.check("a", {"x": other})
