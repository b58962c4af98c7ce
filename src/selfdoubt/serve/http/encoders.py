"""Encodes texts in threads, so that the event loop goes on meanwhile and long texts do not hold up short ones."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from selfdoubt.errors import BusyError
from selfdoubt.lm.text.prompt import Prompt

T = TypeVar("T")
#: Most characters of a short text, and the characters that a message counts as, since the template runs for each.
SHORT_TEXT, MESSAGE_OVERHEAD = 16_384, 100
#: Characters that a token id counts as: they are decoded.
CHARACTERS_PER_ID = 4


def measure_prompt(prompt: Any) -> int:
    """Return the size of a text or a chat to encode, or of token ids to decode, in characters."""
    if isinstance(prompt, str):
        return len(prompt)
    if prompt is None or isinstance(prompt, Prompt):
        return 0
    return sum(
        CHARACTERS_PER_ID if isinstance(item, int) else MESSAGE_OVERHEAD + len(item["content"]) for item in prompt
    )


class EncoderThreads:
    """Two threads, one for short texts and one for long ones.

    Args:
        most: Largest number of texts that wait for each thread; more are refused.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._short, self._long = (
            (ThreadPoolExecutor(1, f"encode-{kind}"), threading.Semaphore(most)) for kind in ("short", "long")
        )

    async def run(self, work: Callable[[], T], size: int, undo: Callable[[T], object] = lambda _: None) -> T:
        """Do some work in a thread.

        Args:
            work: Function to run.
            size: Size of its text, in characters, see ``measure_prompt``.
            undo: Function that receives the outcome if the caller was cancelled in the meantime.

        Raises:
            BusyError: If too many texts wait already.
        """
        threads, free = self._short if size <= SHORT_TEXT else self._long
        if not free.acquire(blocking=False):
            raise BusyError(f"{self._most} requests wait to be read already; try again in a moment")
        try:
            running = threads.submit(work)
        except BaseException:
            free.release()
            raise
        running.add_done_callback(lambda _: free.release())
        try:
            return await asyncio.shield(asyncio.wrap_future(running))
        except asyncio.CancelledError:
            if not running.cancel():
                running.add_done_callback(lambda done: _undo(done, undo))
            raise

    def close(self) -> None:
        """Take no more work; drop the work that waits."""
        for threads, _ in (self._short, self._long):
            threads.shutdown(wait=False, cancel_futures=True)


def _undo(done: Future[T], undo: Callable[[T], object]) -> None:
    if not done.cancelled() and done.exception() is None:
        undo(done.result())


def measure_pairs(pairs: Sequence[tuple[Any, str]]) -> int:
    """Return the size of texts with their questions."""
    return sum(measure_prompt(question) + len(text) for question, text in pairs)
