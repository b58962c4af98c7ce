"""What the engine tells whoever measures it."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from selfdoubt.lm.answer import Answer

Outcome = Literal["stop", "length", "cancelled", "deadline", "error"]


@runtime_checkable
class EngineStats(Protocol):
    """Called from the engine's thread; must be quick and must not raise."""

    def waiting(self, requests: int) -> None:
        """So many requests wait now."""

    def stepped(self, sequences: int, seconds: float | None) -> None:
        """One token for each of so many sequences, so long after those before (None: the batch is new)."""

    def grew(self, tokens: int) -> None:
        """So many tokens were told to a reader."""

    def first_token(self, seconds: float) -> None:
        """From a request's arrival to its first token."""

    def ended(self, outcome: Outcome, answer: Answer | None) -> None:
        """One answer is complete, or will not be (None)."""


class NullStats:
    """Nobody measures."""

    def waiting(self, requests: int) -> None:
        """See ``EngineStats``."""

    def stepped(self, sequences: int, seconds: float | None) -> None:
        """See ``EngineStats``."""

    def grew(self, tokens: int) -> None:
        """See ``EngineStats``."""

    def first_token(self, seconds: float) -> None:
        """See ``EngineStats``."""

    def ended(self, outcome: Outcome, answer: Answer | None) -> None:
        """See ``EngineStats``."""
