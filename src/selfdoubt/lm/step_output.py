"""The output of a model's step, and the interfaces of what steps a model and of what reads its inside.

``Stepper`` is what decoding needs of a model; ``HFStepper`` is the one for Hugging Face.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt import risk


@dataclass(frozen=True)
class StepOutput:
    """The output of one step: logits, and what else was computed at each position."""

    logits: Float[Tensor, "members batch *t classes"]
    #: Predicted deviations, of those members that answer; None without a sculpt.
    scale: Float[Tensor, "answering batch *t classes"] | None = None
    #: The base's where it answers, else the mean over members; None unless asked for.
    states: Float[Tensor, "1 batch *t layers width"] | None = None
    #: Attention of each position on itself, of the row that answers; None unless asked for.
    attention: Float[Tensor, "1 batch *t attended heads"] | None = None
    #: Signals of a position that depend on no chosen token, by name (see ``scores.Signal``); all grow with doubt.
    signals: Mapping[str, Float[Tensor, "1 batch *t"]] = field(default_factory=dict)
    has_base: bool = False  #: member 0 is the base model, which alone answers

    @property
    def mixture(self) -> Float[Tensor, "batch *t classes"]:
        """The distribution that answers, see ``risk.mixture``: the members' mean, or the base's."""
        return risk.mixture(self.logits, has_base=self.has_base)

    def at(self, index: Any) -> StepOutput:
        """Return the output at some places of the axis behind the batch."""
        return self._each(lambda x: x[:, :, index])

    def select(self, sequences: Sequence[int]) -> StepOutput:
        """Return the outputs of these sequences."""
        return self._each(lambda x: x[:, list(sequences)])

    def span(self, sequences: slice) -> StepOutput:
        """Return the outputs of a range of sequences, as views."""
        return self._each(lambda x: x[:, sequences])

    def flatten(self) -> StepOutput:
        """Return the output with sequences and positions in one axis."""
        return self._each(lambda x: x.flatten(1, 2))

    def join(self, other: StepOutput) -> StepOutput:
        """Return the outputs of both batches, in this order. What only one of them has is left out."""

        def cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b], 1)

        return StepOutput(
            torch.cat([self.logits, other.logits], 1),
            cat(self.scale, other.scale),
            cat(self.states, other.states),
            cat(self.attention, other.attention),
            {name: torch.cat([x, other.signals[name]], 1) for name, x in self.signals.items() if name in other.signals},
            self.has_base,
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> StepOutput:
        """Return the output with a change made to each of its tensors."""

        def optional(x: Tensor | None) -> Tensor | None:
            return None if x is None else change(x)

        return StepOutput(
            change(self.logits),
            optional(self.scale),
            optional(self.states),
            optional(self.attention),
            {name: change(x) for name, x in self.signals.items()},
            self.has_base,
        )


@runtime_checkable
class Stepper(Protocol):
    """The interface of a model that reads prompts, then one token per sequence and step."""

    @property
    def context(self) -> int | None:
        """Most tokens in a sequence, or None."""

    def start(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Read left-padded prompts in pieces; yield (first column, logits). Exhaust it before ``step``."""

    def step(self, ids: Int[Tensor, " batch"]) -> StepOutput:
        """Append one token to every sequence."""

    def extend(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Append a text to every sequence, right-padded, in pieces like ``start``; no step can follow."""

    def keep(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences of the batch; one that is named twice is kept twice."""

    def join(self, other: Any) -> None:
        """Add the sequences of another stepper of the same kind and model behind this one's own."""


@runtime_checkable
class Probe(Protocol):
    """The interface of a reader of a model's inside, which adds to the output of each step.

    ``capture`` surrounds a run of the model, and ``read`` follows the run, inside or outside of it.
    """

    def capture(self, columns: int, places: Int[Tensor, " batch"] | None = None) -> AbstractContextManager[None]:
        """Record while the model runs within the block; only the last ``columns`` positions count.

        ``places`` are the columns at which a static cache has each sequence's last position, or beyond its last column,
        which counts then; None where it is the last column of all. They may change in place until ``read``.
        """

    def read(self, output: StepOutput) -> StepOutput:
        """Return the output, ``(members, batch, t, ...)``, with what was recorded, or as it is where nothing was."""
