"""An arena: the static cache, the inputs and the launched turns of one batch in slots."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from selfdoubt.lm.decode import TokenSequence
from selfdoubt.lm.sampling import find_draws
from selfdoubt.lm.static.results import TurnResult
from selfdoubt.lm.static.step import StaticStep
from selfdoubt.lm.static.stepper import Buckets, build_allocator
from selfdoubt.lm.static.turn import DecodeTurn, TurnBuffers, TurnOutput, choose_on_turn, describe_sampling
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.stepper import HFStepper


@runtime_checkable
class Launcher(Protocol):
    """The interface of what runs turns: as they are, compiled, or captured as a CUDA graph."""

    def __call__(self, key: Hashable, build: Callable[..., DecodeTurn]) -> TurnOutput:
        """Run a turn.

        Args:
            key: A key that differs wherever turns differ, in what they compute or in the addresses of their tensors.
            build: Builder of the turn, see ``DecodeTurn``; ``compiled`` is the only argument that is left.
        """


class Arena:
    """The sequences of a batch in the slots of a static cache, and turns that run over all of them.

    Args:
        runner: Stepper that runs the model, with probes of its own.
        first: A stepper that has read prompts: the cache gets its layers.
        buckets: Sizes of the cache.
        launch: Function that runs a turn.
    """

    def __init__(self, runner: HFStepper, first: HFStepper, buckets: Buckets, launch: Launcher) -> None:
        self.buffers = TurnBuffers(first.device)
        self.allocator = build_allocator(first, buckets, self.buffers.move)
        self.cache = self.allocator.cache
        self.sequences: list[TokenSequence] = []  #: in the order of the allocator
        self._step = StaticStep(runner, self.cache)
        self._launch = launch

    def admit(self, stepper: HFStepper, step: StepOutput, sequences: Sequence[TokenSequence]) -> TurnResult:
        """Move sequences whose prompts were read into slots, and choose their first tokens."""
        samplings = [sequence.sampling for sequence in sequences]
        draws = find_draws(samplings)
        drawn = None if draws == "greedy" else [sequence.draw() for sequence in sequences]
        settings = describe_sampling(samplings, drawn).to(self.cache.device)
        most = max(sampling.alternatives for sampling in samplings)
        output, chosen = choose_on_turn(step, settings, draws, most)
        slots = self.allocator.admit(stepper)
        self._put(slots, sequences, chosen, settings)
        return TurnResult(output, {sequence.name: row for row, sequence in enumerate(sequences)})

    def copy(self, other: Arena) -> None:
        """Copy the sequences of another arena of the same model into this one."""
        old, size = torch.tensor(other.allocator.slots, device=self.cache.device), other.cache.slots
        ids, settings = other.buffers.ids(size)[old], other.buffers.settings(size)[:, old]
        self._put(self.allocator.copy(other.allocator), other.sequences, ids, settings)

    def _put(self, slots: Sequence[int], sequences: Sequence[TokenSequence], ids: Tensor, settings: Tensor) -> None:
        self.buffers.make_room(self.cache.slots)
        self.buffers.put(slots, ids, settings)
        self.sequences += sequences

    def keep(self, names: Sequence[int]) -> None:
        """Free the slots of all sequences but these."""
        kept = [place for place, sequence in enumerate(self.sequences) if sequence.name in names]
        if len(kept) < len(self.sequences):
            self.sequences = [self.sequences[place] for place in kept]
            self.allocator.keep(kept)

    def run(self, ahead: int) -> TurnResult:
        """Launch a turn; its results may be read while the next one runs.

        Args:
            ahead: Tokens of each sequence that were chosen and not taken yet.
        """
        samplings = [sequence.sampling for sequence in self.sequences]
        draws = find_draws(samplings)
        self.allocator.reserve(0, 1)
        slots = self.allocator.slots
        if draws != "greedy":
            self.buffers.put_draws(slots, [sequence.draw(ahead) for sequence in self.sequences])
        most = max(sampling.alternatives for sampling in samplings)
        key = (self.cache.slots, self.cache.length, draws, most, self.cache.version, self.buffers.version)
        output = self._launch(key, partial(DecodeTurn, self._step, self.buffers, draws, most))
        self.allocator.advance()
        return TurnResult(output, {s.name: slot for s, slot in zip(self.sequences, slots, strict=True)})

    def clear(self) -> None:
        """Free all slots."""
        self.keep([])
