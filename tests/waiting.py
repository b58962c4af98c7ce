"""Waiting for a condition, with an end: what a test polls for is reached, or the test fails and says so."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

PAUSE = 0.01


def wait_until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Poll a condition until it is true.

    Args:
        condition: Read every hundredth of a second, in this thread.
        seconds: After these the test fails. A limit against hanging, not a measurement: no test passes or fails by how
            fast the machine is.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"the condition was not true within {seconds:g} s")
        time.sleep(PAUSE)


async def wait_until_async(condition: Callable[[], object], seconds: float = 60) -> None:
    """Poll a condition from within an event loop, as ``wait_until`` does from a thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"the condition was not true within {seconds:g} s")
        await asyncio.sleep(PAUSE)
