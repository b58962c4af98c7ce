"""Prefills in progress: groups of requests, each read side by side, that take turns chunk by chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

from selfdoubt.lm.decode import SequenceBatch
from selfdoubt.lm.generation import AnswerInProgress
from selfdoubt.serve.engine.request import RequestHandle

#: Groups that take turns, and the tokens of a long prompt. One place is kept for short ones.
MAX_RUNNING_PREFILLS, LONG_TEXT = 4, 512
PrefilledBatch = tuple[list[AnswerInProgress], SequenceBatch]
PrefillChunks = Generator[None, None, PrefilledBatch]


@dataclass(eq=False)
class Prefill:
    """Prompts that are read side by side."""

    handles: Sequence[RequestHandle]
    chunks: PrefillChunks

    @property
    def is_long(self) -> bool:
        """True if any of the prompts takes more than a few chunks."""
        return any(map(_is_long, self.handles))

    def advance(self) -> PrefilledBatch | None:
        """Read one chunk; return the answers in progress and their batch after the last."""
        try:
            next(self.chunks)
        except StopIteration as end:
            return cast("PrefilledBatch", end.value)
        return None


class PrefillQueue:
    """Groups in their order, of which a few take turns."""

    def __init__(self) -> None:
        self._waiting: deque[Sequence[RequestHandle]] = deque()
        self._running: deque[Prefill] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def is_full(self) -> bool:
        """True if another group would have to wait."""
        return bool(self._waiting) or len(self._running) >= MAX_RUNNING_PREFILLS

    def has_place(self, handle: RequestHandle) -> bool:
        """Return whether there is a place for this prompt: long ones leave one to short ones."""
        return not _is_long(handle) or sum(group.is_long for group in self._running) < MAX_RUNNING_PREFILLS - 1

    def add(self, handles: Sequence[RequestHandle]) -> None:
        """Put a group behind the others."""
        self._waiting.append(handles)

    def add_apart(self, handles: Sequence[RequestHandle]) -> None:
        """Put each request of a group that failed before the others, by itself."""
        self._waiting.extendleft([handle] for handle in reversed(handles))

    def next(
        self,
        begin: Callable[[Sequence[RequestHandle]], PrefillChunks | None],
        is_wanted: Callable[[RequestHandle], bool],
    ) -> Prefill | None:
        """Take out the group whose turn it is.

        Args:
            begin: Function that begins to read a group; it returns None if all its requests have ended.
            is_wanted: Function that returns whether a request still needs its prompt.
        """
        while self._waiting:
            handles = self._waiting.popleft()
            chunks = begin(handles)
            if chunks is not None:
                self._running.append(Prefill(handles, chunks))
        for group in [group for group in self._running if not any(map(is_wanted, group.handles))]:
            self._running.remove(group)
            group.chunks.close()
        return self._running.popleft() if self._running else None

    def put_back(self, group: Prefill) -> None:
        """Put a group that has more to read behind the others."""
        self._running.append(group)

    def clear(self) -> None:
        """Forget all groups."""
        self._waiting.clear()
        self._running.clear()


def _is_long(handle: RequestHandle) -> bool:
    return len(handle.request.prompt.ids) > LONG_TEXT
