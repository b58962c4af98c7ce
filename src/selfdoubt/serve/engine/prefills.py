"""Prompts that are being read: groups of requests, each read side by side, that take turns piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

from selfdoubt.lm.decode import DecodeBatch
from selfdoubt.lm.generation import AnswerInProgress
from selfdoubt.serve.engine.request import RequestHandle

#: Groups that take turns, and the tokens of a long prompt. One place is kept for short ones.
MAX_RUNNING_PREFILLS, LONG_TEXT = 4, 512
PrefilledBatch = tuple[list[AnswerInProgress], DecodeBatch]
PrefillChunks = Generator[None, None, PrefilledBatch]


@dataclass(eq=False)
class Prefill:
    """Prompts that are read side by side."""

    jobs: Sequence[RequestHandle]
    pieces: PrefillChunks

    @property
    def is_long(self) -> bool:
        """Whether any of the prompts takes more than a few pieces."""
        return any(map(_is_long, self.jobs))

    def advance(self) -> PrefilledBatch | None:
        """Read one piece; return the answers in the making and their batch after the last."""
        try:
            next(self.pieces)
        except StopIteration as end:
            return cast("PrefilledBatch", end.value)
        return None


class PrefillQueue:
    """Groups in their order, of which a few take turns."""

    def __init__(self) -> None:
        self._waiting: deque[Sequence[RequestHandle]] = deque()
        self._begun: deque[Prefill] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._begun)

    @property
    def is_full(self) -> bool:
        """Whether another group would have to wait."""
        return bool(self._waiting) or len(self._begun) >= MAX_RUNNING_PREFILLS

    def has_place(self, job: RequestHandle) -> bool:
        """Return whether long prompts leave a place to this one: a short one never waits for all of a long one."""
        return not _is_long(job) or sum(group.is_long for group in self._begun) < MAX_RUNNING_PREFILLS - 1

    def add(self, jobs: Sequence[RequestHandle]) -> None:
        """Put a group behind the others."""
        self._waiting.append(jobs)

    def add_apart(self, jobs: Sequence[RequestHandle]) -> None:
        """Put each of a group that failed before the others, by itself."""
        self._waiting.extendleft([job] for job in reversed(jobs))

    def next(
        self,
        begin: Callable[[Sequence[RequestHandle]], PrefillChunks | None],
        is_wanted: Callable[[RequestHandle], bool],
    ) -> Prefill | None:
        """Take out the group whose turn it is.

        Args:
            begin: Begins to read a group; None where nobody wants it any more.
            is_wanted: Whether a request goes on.
        """
        while self._waiting:
            jobs = self._waiting.popleft()
            pieces = begin(jobs)
            if pieces is not None:
                self._begun.append(Prefill(jobs, pieces))
        for group in [group for group in self._begun if not any(map(is_wanted, group.jobs))]:
            self._begun.remove(group)
            group.pieces.close()
        return self._begun.popleft() if self._begun else None

    def put_back(self, group: Prefill) -> None:
        """Put a group that has more to read behind the others."""
        self._begun.append(group)

    def clear(self) -> None:
        """Forget all of them."""
        self._waiting.clear()
        self._begun.clear()


def _is_long(job: RequestHandle) -> bool:
    return len(job.ask.prompt.ids) > LONG_TEXT
