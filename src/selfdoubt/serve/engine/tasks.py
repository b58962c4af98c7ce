"""Tasks with the model other than generation: done chunk by chunk between two tokens of other requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

from selfdoubt.errors import EngineError
from selfdoubt.lm.chunks import ChunkSizer
from selfdoubt.lm.model import RiskAwareLM

#: Tasks that take turns; each may hold a key-value cache. One place is kept for short ones.
MAX_RUNNING_TASKS = 4
Work = Callable[[RiskAwareLM, ChunkSizer], Any]


class EngineTask:
    """Some work, and the future of its outcome.

    Args:
        work: Takes the model and the sizer of chunks. It returns its outcome, or a generator that yields after each
            chunk and returns the outcome.
        is_long: True if it takes more than a few chunks.
    """

    def __init__(self, work: Work, *, is_long: bool = False) -> None:
        self.is_long = is_long
        self.future: Future[Any] = Future()
        self._work = work
        self._chunks: Generator[None, None, Any] | None = None

    def advance(self, lm: RiskAwareLM, sizer: ChunkSizer) -> bool:
        """Do one chunk, and return whether the task has ended.

        The future stays cancellable until the last one: a caller that has gone away stops the work.
        """
        if self.future.cancelled():
            self._drop()
            return True
        try:
            if self._chunks is None:
                started = self._work(lm, sizer)
                if not isinstance(started, Generator):
                    return self._end(outcome=started)
                self._chunks = started
            next(self._chunks)
        except StopIteration as end:
            return self._end(outcome=end.value)
        except Exception as error:
            return self._end(error)
        return False

    def fail(self, error: EngineError) -> None:
        """End the task with an error."""
        self._drop()
        self._end(error)

    def _end(self, error: Exception | None = None, *, outcome: Any = None) -> bool:
        self._chunks = None
        if self.future.set_running_or_notify_cancel():
            if error is None:
                self.future.set_result(outcome)
            else:
                self.future.set_exception(error)
        return True

    def _drop(self) -> None:
        """Release the work, and with it its key-value cache."""
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None


class TaskQueue:
    """Tasks in their order, of which a few take turns. The caller guards it against other threads."""

    def __init__(self) -> None:
        self._waiting: deque[EngineTask] = deque()
        self._running: deque[EngineTask] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)

    def add(self, task: EngineTask) -> None:
        """Put a task behind the others."""
        self._waiting.append(task)

    def next(self) -> EngineTask | None:
        """Return the task whose turn it is, or None; it stays until ``remove``. Cancelled ones stop waiting."""
        for task in list(self._waiting):
            if task.future.cancelled():
                self._waiting.remove(task)
                continue
            if len(self._running) >= MAX_RUNNING_TASKS:
                continue
            if not task.is_long or sum(other.is_long for other in self._running) < MAX_RUNNING_TASKS - 1:
                self._waiting.remove(task)
                self._running.append(task)
        self._running.rotate(-1)
        return self._running[-1] if self._running else None

    def remove(self, task: EngineTask) -> None:
        """Take out a task that has ended."""
        self._running.remove(task)

    def clear(self) -> list[EngineTask]:
        """Take out all tasks, and return them."""
        tasks = [*self._running, *self._waiting]
        self._running.clear()
        self._waiting.clear()
        return tasks
