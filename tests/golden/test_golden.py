"""Stored formats, printed answers and replies of the server are those of the golden files.

When one may make them again is said in ``tests/golden/make.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.golden import cases, gold, trained, web
from tests.golden.run import folder

Case = Callable[[], dict[str, Any]]


@pytest.mark.parametrize("case", [*cases.CASES, *trained.CASES, web.serve], ids=lambda case: case.__name__)
def test_it_is_as_it_was(case: Case, tmp_path: Path) -> None:
    with folder(tmp_path.resolve()):
        found = case()
    for name, value in found.items():
        gold.check(name, value, always_near=name in web.TOGETHER)
