"""A batch in the slots of a static cache, whose next turn may run while the host reads the last one's results."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

import torch

from selfdoubt.lm.decode import TokenEvent, TokenSequence
from selfdoubt.lm.static.arena import Arena
from selfdoubt.lm.static.results import ChosenToken, TurnResult
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.stepper import HFStepper


class _Newcomers(NamedTuple):
    """Sequences whose prompts were read, and that have no slots yet."""

    stepper: HFStepper
    next_logits: StepOutput
    sequences: list[TokenSequence]


class SlotBatch:
    """A ``SequenceBatch`` over a static cache.

    With ``ahead`` a turn is launched before the results of the one before it are read: the host's work on a token
    then costs no time. A sequence that turns out to have ended has run for one turn more, whose result is forgotten.

    Args:
        open_arena: Function that returns an arena for the layers of a stepper's cache.
        close_arena: Function that takes the arena back.
        stepper: A stepper that has read the prompts.
        next_logits: Logits of each sequence's next token.
        sequences: The sequences, in the order of the prompts.
        ahead: Launch turns ahead.
    """

    def __init__(
        self,
        open_arena: Callable[[HFStepper], Arena],
        close_arena: Callable[[Arena], None],
        stepper: HFStepper,
        next_logits: StepOutput,
        sequences: Sequence[TokenSequence],
        *,
        ahead: bool,
    ) -> None:
        self.sequences = list(sequences)
        self._open, self._close, self._ahead = open_arena, close_arena, ahead
        self._newcomers = [_Newcomers(stepper, next_logits, list(sequences))]
        self._arena: Arena | None = None
        self._current: list[TurnResult] = []  # of the tokens that ``choose`` returns next
        self._following: list[TurnResult] = []  # of the tokens after them
        self._ended: set[int] = set()
        self._failure: Exception | None = None  # of a turn that was launched ahead

    @torch.inference_mode()
    def choose(self) -> list[TokenEvent]:
        """Choose the next token of every sequence that has a slot, or its end.

        Raises:
            NonFiniteError: If a logit is not finite; nothing is chosen then. See ``find_non_finite``.
        """
        self._admit()
        # Those whose last token this is end for certain: with them alone no turn is needed.
        goes_on = any(len(sequence.chosen) + 1 < sequence.room for sequence in self.sequences)
        if self._ahead and goes_on and not self._following:
            try:
                self._following = [self._run(1)]
            except Exception as error:  # it belongs to the next step: the tokens that are chosen are none the worse
                self._failure = error
        chosen: dict[int, ChosenToken] = {}
        names = [sequence.name for sequence in self.sequences]
        for result in self._current:
            chosen |= result.read(names)
        self._current, self._following = self._following, []
        events = [sequence.take(*chosen[sequence.name]) for sequence in self.sequences if sequence.name in chosen]
        self._ended = {event.sequence for event in events if event.finish is not None}
        return events

    @torch.inference_mode()
    def step(self, gone: Set[int] = frozenset()) -> None:
        """Run the model on the chosen tokens, for the sequences that have not ended and are not in ``gone``."""
        if self._failure is not None:
            raise self._failure
        self._leave(self._ended | gone)
        self._ended = set()
        if self.sequences and not self._current:
            self._current = [self._run(0)]

    @torch.inference_mode()
    def drop(self, gone: Set[int]) -> None:
        """Remove sequences from the batch before their next token is chosen."""
        self._leave(gone)

    @torch.inference_mode()
    def join(self, other: SlotBatch) -> None:
        """Add the sequences of another batch of the same model behind this batch's own."""
        self._newcomers += other._newcomers
        self.sequences += other.sequences
        if other._arena is not None:
            self._admit()
            if self._arena is None:
                self._arena = other._arena
            else:
                self._arena.copy(other._arena)
                self._close(other._arena)
            self._current += other._current
            other._arena = None
        other._newcomers, other._current, other.sequences = [], [], []

    @torch.inference_mode()
    def find_non_finite(self) -> set[int]:
        """Return the names of the sequences whose next logits are NaN or infinite."""
        self._admit()
        names = [sequence.name for sequence in self.sequences]
        return {name for result in self._current for name in result.find_non_finite(names)}

    def _admit(self) -> None:
        """Give newcomers their slots and first tokens.

        Where a turn runs ahead already, because ``choose`` raised an error, they wait for the next.
        """
        if self._following:
            return
        for stepper, next_logits, sequences in self._newcomers:
            if sequences:
                if self._arena is None:
                    self._arena = self._open(stepper)
                self._current.append(self._arena.admit(stepper, next_logits, sequences))
        self._newcomers = []

    def _run(self, ahead: int) -> TurnResult:
        assert self._arena is not None
        return self._arena.run(ahead)

    def _leave(self, gone: Set[int]) -> None:
        """Free the slots of these sequences."""
        kept = [sequence for sequence in self.sequences if sequence.name not in gone]
        if len(kept) == len(self.sequences):
            return
        self.sequences = kept
        names = {sequence.name for sequence in kept}
        self._newcomers = [_select(newcomers, names) for newcomers in self._newcomers]
        if self._arena is None:
            return
        self._arena.keep([sequence.name for sequence in kept])
        if not kept:
            self._close(self._arena)
            self._arena, self._current = None, []


def _select(newcomers: _Newcomers, names: Set[int]) -> _Newcomers:
    """Return those of these newcomers that have one of these names."""
    kept = [row for row, sequence in enumerate(newcomers.sequences) if sequence.name in names]
    if len(kept) == len(newcomers.sequences):
        return newcomers
    if kept:
        newcomers.stepper.keep(kept)
    sequences = [newcomers.sequences[row] for row in kept]
    return _Newcomers(newcomers.stepper, newcomers.next_logits.select(kept), sequences)
