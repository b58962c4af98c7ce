"""Where the real question sets lie."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real():
    """The path of a real file beside this checkout; skips where there is none."""

    def path(name: str) -> Path:
        found = Path(__file__).parents[4] / "shared" / "data" / name
        if not found.exists():
            pytest.skip(f"the data folder with {name} is not beside this checkout")
        return found

    return path
