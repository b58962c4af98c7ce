"""A stepper over a static cache: prompts are read into a dynamic one, and move into slots at the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from selfdoubt.errors import WrapError
from selfdoubt.lm.static.slots import DOUBLED_LENGTH, DOUBLED_SLOTS, FIRST_LENGTH, SlotCache, choose_bucket
from selfdoubt.lm.static.step import StaticStep, find_obstacle
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.stepper import HFStepper


@dataclass(frozen=True)
class Buckets:
    """Sizes that a static cache may have."""

    first_length: int = FIRST_LENGTH  #: columns of the smallest; twice, four times, ... as many up to the context
    doubled_length: int = DOUBLED_LENGTH  #: columns from which sizes grow by half, too

    def choose_slots(self, needed: int) -> int:
        """Return the number of slots for a number of sequences."""
        return choose_bucket(needed, 1, DOUBLED_SLOTS)

    def choose_length(self, needed: int, context: int | None) -> int:
        """Return the number of columns for sequences of this length."""
        return choose_bucket(needed, self.first_length, self.doubled_length, context)


class SlotAllocator:
    """Sequences in the slots of a static cache: they come and go, and the cache grows and shrinks with them.

    The host knows all lengths, so that nothing is read from the device.

    Args:
        cache: An empty cache.
        buckets: Sizes that it may have.
        context: Most tokens in a sequence; None without a limit.
        on_move: Function that is called with the slots whose sequences move to the first slots, in this order, and the
            new number of slots.
    """

    def __init__(
        self,
        cache: SlotCache,
        buckets: Buckets,
        context: int | None,
        on_move: Callable[[Sequence[int], int], None] | None = None,
    ) -> None:
        self.cache, self._buckets, self._context, self._on_move = cache, buckets, context, on_move
        self.slots: list[int] = []  #: slot of each sequence
        self.lengths: list[int] = []  #: tokens of each sequence in the cache

    @property
    def _free(self) -> list[int]:
        return sorted(set(range(self.cache.slots)) - set(self.slots))

    def reserve(self, sequences: int, length: int) -> None:
        """Make room for a number of further sequences, and for this length of any sequence."""
        needed = self._buckets.choose_slots(len(self.slots) + sequences)
        # Below a quarter of its slots, a cache shrinks: it would take the next size soon otherwise.
        slots = needed if needed > self.cache.slots or 4 * needed <= self.cache.slots else self.cache.slots
        columns = self._buckets.choose_length(max([length, *(n + 1 for n in self.lengths)]), self._context)
        shrinks = 4 * columns <= self.cache.length
        columns = columns if columns > self.cache.length or shrinks else self.cache.length
        if (slots, columns) != (self.cache.slots, self.cache.length):
            self.cache.resize(slots, columns, self.slots)
            if self._on_move is not None:
                self._on_move(self.slots, slots)
            self.slots = list(range(len(self.slots)))

    def admit(self, stepper: HFStepper) -> list[int]:
        """Move the sequences that a stepper has read into free slots; return these. The stepper is empty then."""
        lengths = stepper.count_tokens().tolist()
        self.reserve(len(lengths), max(lengths) + 1)
        slots = self._free[: len(lengths)]
        self.cache.admit(stepper.cache, lengths, slots)
        self.slots += slots
        self.lengths += lengths
        return slots

    def copy(self, other: SlotAllocator) -> list[int]:
        """Copy the sequences of another static cache of the same model into free slots; return these."""
        self.reserve(len(other.slots), max(other.lengths) + 1)
        slots = self._free[: len(other.slots)]
        self.cache.copy_from(other.cache, other.slots, slots)
        self.slots += slots
        self.lengths += other.lengths
        return slots

    def keep(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences; one that is named twice is kept twice."""
        distinct = list(dict.fromkeys(sequences))
        for place in set(range(len(self.slots))).difference(distinct):
            # A free slot runs along, and some models choose by the largest position of all.
            self.cache.positions[self.slots[place]].zero_()
        again = [place for place, i in enumerate(sequences) if i in sequences[:place]]
        lengths = [self.lengths[i] for i in sequences]
        self.slots, self.lengths = [self.slots[i] for i in distinct], [self.lengths[i] for i in distinct]
        if again:
            self.reserve(len(again), 1)
            slot_of = dict(zip(distinct, self.slots, strict=True))
            free = self._free[: len(again)]
            self.cache.copy_from(self.cache, [slot_of[sequences[place]] for place in again], free)
            copies = dict(zip(again, free, strict=True))
            self.slots = [copies.get(place, slot_of[i]) for place, i in enumerate(sequences)]
        self.lengths = lengths

    def advance(self) -> None:
        """Count one more token of every sequence."""
        self.lengths = [length + 1 for length in self.lengths]


class StaticStepper:
    """A ``Stepper`` whose steps run over a static cache, uncaptured.

    Args:
        inner: Stepper that reads prompts and texts, with a dynamic cache.
        buckets: Sizes of the static cache.
    """

    def __init__(self, inner: HFStepper, buckets: Buckets | None = None) -> None:
        self._inner = inner
        self._buckets = buckets or Buckets()
        self._allocator: SlotAllocator | None = None
        self._step: StaticStep | None = None

    @property
    def members(self) -> int:
        """Number of members."""
        return self._inner.members

    @property
    def context(self) -> int | None:
        """Most tokens in a sequence, or None."""
        return self._inner.context

    @property
    def size(self) -> tuple[int, int] | None:
        """Slots and columns of the static cache; None before the first step."""
        return None if self._allocator is None else (self._allocator.cache.slots, self._allocator.cache.length)

    def start(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Read left-padded prompts in pieces, see ``Stepper``."""
        self._allocator = self._step = None
        yield from self._inner.start(prompts)

    def extend(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, StepOutput]]:
        """Append a text to every sequence, see ``Stepper``.

        Raises:
            WrapError: If a step was taken.
        """
        if self._allocator is not None:
            raise WrapError("a static cache takes one token at a time: read texts before the first step")
        yield from self._inner.extend(texts)

    @torch.inference_mode()
    def step(self, ids: Int[Tensor, " batch"]) -> StepOutput:
        """Append one token to every sequence; logits are ``(members, batch, classes)``."""
        allocator, step = self._move()
        allocator.reserve(0, 1)
        here = torch.tensor(allocator.slots, device=ids.device)
        output = step.run(ids.new_zeros(allocator.cache.slots).index_copy(0, here, ids))
        allocator.advance()
        return output if allocator.slots == list(range(allocator.cache.slots)) else output.select(allocator.slots)

    @torch.inference_mode()
    def keep(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences of the batch; one that is named twice is kept twice."""
        if self._allocator is None:
            self._inner.keep(sequences)
        else:
            self._allocator.keep(sequences)

    @torch.inference_mode()
    def join(self, other: StaticStepper) -> None:
        """Add the sequences of another stepper of the same model behind this one's own.

        Raises:
            WrapError: If the model's cache is of a kind that cannot be static.
        """
        allocator, _ = self._move()
        if other._allocator is None:
            allocator.admit(other._inner)
        else:
            allocator.copy(other._allocator)

    def _move(self) -> tuple[SlotAllocator, StaticStep]:
        """Return the static cache and its step; the prompts that were read move into it."""
        if self._allocator is None or self._step is None:
            obstacle = find_obstacle(self._inner)
            if obstacle is not None:
                raise WrapError(f"{type(self._inner.base).__name__} cannot have a static cache: {obstacle}")
            self._allocator = build_allocator(self._inner, self._buckets)
            self._step = StaticStep(self._inner, self._allocator.cache)
            self._allocator.admit(self._inner)
        return self._allocator, self._step


def build_allocator(
    stepper: HFStepper, buckets: Buckets, on_move: Callable[[Sequence[int], int], None] | None = None
) -> SlotAllocator:
    """Build an empty static cache for the sequences that a stepper has read; see ``SlotAllocator``."""
    lengths = stepper.count_tokens()
    slots = buckets.choose_slots(len(lengths))
    columns = buckets.choose_length(int(lengths.max()) + 1, stepper.context)
    cache = SlotCache.like(stepper.cache, len(lengths), slots, columns)
    return SlotAllocator(cache, buckets, stepper.context, on_move)
