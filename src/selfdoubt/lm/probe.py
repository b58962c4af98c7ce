"""The interface of probes, which read a model's inside while it runs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Probe(Protocol):
    """The interface of a reader of a model's inside, which adds to the output of each step.

    ``capture`` surrounds a run of the model, and ``read`` follows it.
    """

    def capture(self, columns: int) -> AbstractContextManager[None]:
        """Record while the model runs within the block; only the last ``columns`` positions count."""

    def read(self, output: Any) -> Any:
        """Return a ``stepper.StepOutput``, ``(members, batch, t, ...)``, with what was recorded, or as it is."""
