"""Prompts that are being read: groups of requests, each read side by side, that take turns piece by piece."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import cast

from selfdoubt.lm.decode import DecodeBatch
from selfdoubt.lm.generation import AnswerInProgress
from selfdoubt.serve.engine.request import Job

#: Groups that take turns, and the tokens of a long prompt. One place is kept for short ones.
AT_ONCE, LONG = 4, 512
Opened = tuple[list[AnswerInProgress], DecodeBatch]
Pieces = Generator[None, None, Opened]


@dataclass(eq=False)
class Reading:
    """Prompts that are read side by side."""

    jobs: Sequence[Job]
    pieces: Pieces

    @property
    def is_long(self) -> bool:
        """Whether any of the prompts takes more than a few pieces."""
        return any(map(_is_long, self.jobs))

    def advance(self) -> Opened | None:
        """Read one piece; return the answers in the making and their batch after the last."""
        try:
            next(self.pieces)
        except StopIteration as end:
            return cast("Opened", end.value)
        return None


class Readings:
    """Groups in their order, of which a few take turns."""

    def __init__(self) -> None:
        self._waiting: deque[Sequence[Job]] = deque()
        self._begun: deque[Reading] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting or self._begun)

    @property
    def is_full(self) -> bool:
        """Whether another group would have to wait."""
        return bool(self._waiting) or len(self._begun) >= AT_ONCE

    def has_place(self, job: Job) -> bool:
        """Return whether long prompts leave a place to this one: a short one never waits for all of a long one."""
        return not _is_long(job) or sum(group.is_long for group in self._begun) < AT_ONCE - 1

    def add(self, jobs: Sequence[Job]) -> None:
        """Put a group behind the others."""
        self._waiting.append(jobs)

    def add_apart(self, jobs: Sequence[Job]) -> None:
        """Put each of a group that failed before the others, by itself."""
        self._waiting.extendleft([job] for job in reversed(jobs))

    def next(self, begin: Callable[[Sequence[Job]], Pieces | None], is_wanted: Callable[[Job], bool]) -> Reading | None:
        """Take out the group whose turn it is.

        Args:
            begin: Begins to read a group; None where nobody wants it any more.
            is_wanted: Whether a request goes on.
        """
        while self._waiting:
            jobs = self._waiting.popleft()
            pieces = begin(jobs)
            if pieces is not None:
                self._begun.append(Reading(jobs, pieces))
        for group in [group for group in self._begun if not any(map(is_wanted, group.jobs))]:
            self._begun.remove(group)
            group.pieces.close()
        return self._begun.popleft() if self._begun else None

    def put_back(self, group: Reading) -> None:
        """Put a group that has more to read behind the others."""
        self._begun.append(group)

    def clear(self) -> None:
        """Forget all of them."""
        self._waiting.clear()
        self._begun.clear()


def _is_long(job: Job) -> bool:
    return len(job.ask.prompt.ids) > LONG
