"""Work with the model other than answering: done piece by piece between two tokens of other requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

from selfdoubt.errors import EngineError
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.model import RiskAwareLM

#: Errands that take turns; each may hold a key-value cache. One place is kept for short ones.
MAX_RUNNING_TASKS = 4
Work = Callable[[RiskAwareLM, ChunkSizer], Any]


class Task:
    """Some work, and the future of its outcome.

    Args:
        work: Takes the model and what chooses the sizes of pieces. It returns its outcome, or a generator that yields
            after each piece and returns the outcome.
        is_long: Whether it takes more than a few pieces.
    """

    def __init__(self, work: Work, *, is_long: bool = False) -> None:
        self.is_long = is_long
        self.future: Future[Any] = Future()
        self._work = work
        self._pieces: Generator[None, None, Any] | None = None

    def advance(self, lm: RiskAwareLM, sizer: ChunkSizer) -> bool:
        """Do one piece.

        The future stays cancellable until the last one: a caller who has gone away stops the work.

        Returns:
            Whether the errand has ended.
        """
        if self.future.cancelled():
            self._drop()
            return True
        try:
            if self._pieces is None:
                begun = self._work(lm, sizer)
                if not isinstance(begun, Generator):
                    return self._end(outcome=begun)
                self._pieces = begun
            next(self._pieces)
        except StopIteration as end:
            return self._end(outcome=end.value)
        except Exception as error:
            return self._end(error)
        return False

    def fail(self, error: EngineError) -> None:
        """End it with an error, whatever was done."""
        self._drop()
        self._end(error)

    def _end(self, error: Exception | None = None, *, outcome: Any = None) -> bool:
        self._pieces = None
        if self.future.set_running_or_notify_cancel():
            if error is None:
                self.future.set_result(outcome)
            else:
                self.future.set_exception(error)
        return True

    def _drop(self) -> None:
        """Let go of the cache."""
        if self._pieces is not None:
            self._pieces.close()
            self._pieces = None


class TaskQueue:
    """Errands in their order, of which a few take turns. The caller guards it against other threads."""

    def __init__(self) -> None:
        self._waiting: deque[Task] = deque()
        self._begun: deque[Task] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._begun)

    def add(self, errand: Task) -> None:
        """Put one behind the others."""
        self._waiting.append(errand)

    def next(self) -> Task | None:
        """Return the errand whose turn it is, or None; it stays until ``remove``. Cancelled ones stop waiting."""
        for errand in list(self._waiting):
            if errand.future.cancelled():
                self._waiting.remove(errand)
                continue
            if len(self._begun) >= MAX_RUNNING_TASKS:
                continue
            if not errand.is_long or sum(other.is_long for other in self._begun) < MAX_RUNNING_TASKS - 1:
                self._waiting.remove(errand)
                self._begun.append(errand)
        self._begun.rotate(-1)
        return self._begun[-1] if self._begun else None

    def remove(self, errand: Task) -> None:
        """Take out an errand that has ended."""
        self._begun.remove(errand)

    def clear(self) -> list[Task]:
        """Take out all of them."""
        found = [*self._begun, *self._waiting]
        self._begun.clear()
        self._waiting.clear()
        return found
