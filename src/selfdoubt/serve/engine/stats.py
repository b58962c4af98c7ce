"""``EngineStats``: the interface of a receiver of an engine's events, to count and measure them."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

from selfdoubt.lm.answer import Answer

Outcome = Literal["stop", "length", "cancelled", "deadline", "error"]


@runtime_checkable
class EngineStats(Protocol):
    """Receiver of an engine's events, called from its thread; must be quick and must not raise."""

    def set_waiting(self, requests: int) -> None:
        """Note how many requests wait now."""

    def record_step(self, sequences: int, seconds: float | None) -> None:
        """Count one decoding step.

        Args:
            sequences: Number of sequences that got a token each.
            seconds: Time since the step before; None if the batch is new.
        """

    def record_tokens(self, tokens: int) -> None:
        """Count tokens that were sent to their reader."""

    def record_first_token(self, seconds: float) -> None:
        """Measure the time from a request's arrival to its first token."""

    def record_end(self, outcome: Outcome, answer: Answer | None) -> None:
        """Count an answer that is complete, or will not be (None)."""


class NullStats:
    """A receiver that ignores all events."""

    def set_waiting(self, requests: int) -> None:
        """See ``EngineStats``."""

    def record_step(self, sequences: int, seconds: float | None) -> None:
        """See ``EngineStats``."""

    def record_tokens(self, tokens: int) -> None:
        """See ``EngineStats``."""

    def record_first_token(self, seconds: float) -> None:
        """See ``EngineStats``."""

    def record_end(self, outcome: Outcome, answer: Answer | None) -> None:
        """See ``EngineStats``."""
