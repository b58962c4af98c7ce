"""Stored formats and printed replies are those of the golden files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden import cases, gold
from tests.golden.run import folder


@pytest.mark.parametrize("case", cases.QUICK, ids=lambda case: case.__name__)
def test_it_is_as_it_was(case: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    with folder(tmp_path.resolve()):
        found = case()
        for name, value in found.items():
            gold.check(name, value)
