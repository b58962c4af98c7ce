"""The decoding loop, on token ids alone: no text, no model library.

All members follow the same tokens, those of the mean distribution.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.distributions import Distributions
from selfdoubt.lm.sampling import Sampling, choose_tokens, find_draws
from selfdoubt.lm.step_output import StepOutput, Stepper
from selfdoubt.lm.token_table import ScoredId, choose_and_tabulate, read_table

EndReason = Literal["stop", "length"]


class TokenEvent(NamedTuple):
    """One step of one sequence: a token, or the end."""

    sequence: int
    token: ScoredId | None
    finish: EndReason | None
    states: Float[Tensor, "layers width"] | None = None  #: hidden states in which the token was chosen
    end: ScoredId | None = None  #: the stop token that ended it: not part of the answer
    attention: Float[Tensor, "attended heads"] | None = None  #: attention of the position on itself, see ``StepOutput``


@dataclass(eq=False)
class TokenSequence:
    """One sequence of a batch.

    Args:
        name: Number of the sequence in its events.
        sampling: Settings by which its tokens are chosen.
        seed: Seed of its draws, which depend on nothing else: not on the batch around it.
        room: Largest number of tokens that the context leaves for the answer.
    """

    name: int
    sampling: Sampling
    seed: int
    room: int
    chosen: list[int] = field(default_factory=list)  #: without the token that ended it
    _generator: torch.Generator = field(init=False, repr=False)
    _draws: deque[Float[Tensor, ""]] = field(init=False, repr=False, default_factory=deque)

    def __post_init__(self) -> None:
        # The seeds of several answers count on from a caller's; generators take 64 bits.
        self._generator = torch.Generator().manual_seed(self.seed - 2**64 if self.seed >= 2**64 else self.seed)
        self.room = min(self.room, self.sampling.max_tokens)

    def draw(self, ahead: int = 0) -> Float[Tensor, ""]:
        """Return a number in [0, 1) for the next token, or one ``ahead`` of it: the same one until a token is taken."""
        while len(self._draws) <= ahead:
            self._draws.append(torch.rand((), generator=self._generator, dtype=torch.float64))
        return self._draws[ahead]

    def take(
        self,
        token: ScoredId,
        states: Float[Tensor, "layers width"] | None,
        attention: Float[Tensor, "attended heads"] | None = None,
    ) -> TokenEvent:
        """Append a token; return its event."""
        if self._draws:
            self._draws.popleft()
        few = token._replace(alternatives=token.alternatives[: self.sampling.alternatives])
        if token.id in self.sampling.stop_ids:
            return TokenEvent(self.name, None, "stop", states, few, attention)
        self.chosen.append(token.id)
        finish: EndReason | None = "length" if len(self.chosen) >= self.room else None
        return TokenEvent(self.name, few, finish, states, attention=attention)


@runtime_checkable
class SequenceBatch(Protocol):
    """The interface of sequences that are decoded side by side, and may come and go between tokens.

    ``choose`` and ``step`` take turns; ``drop`` and ``join`` are for the time before ``choose``.
    """

    sequences: list[TokenSequence]

    def choose(self) -> list[TokenEvent]:
        """Choose the next token of every sequence, or its end.

        Raises:
            NonFiniteError: If a logit is not finite; nothing is chosen then. See ``find_non_finite``.
        """

    def step(self, gone: Set[int] = frozenset()) -> None:
        """Run the model on the chosen tokens, for the sequences that have not ended and are not in ``gone``."""

    def drop(self, gone: Set[int]) -> None:
        """Remove sequences from the batch before their next token is chosen."""

    def join(self, other: Any) -> None:
        """Add the sequences of another batch of the same kind and model behind this batch's own.

        Raises:
            WrapError: If the model's cache cannot be joined.
        """

    def find_non_finite(self) -> set[int]:
        """Return the names of the sequences whose next logits are NaN or infinite."""


class DecodeBatch:
    """A ``SequenceBatch`` that runs the model step by step through a ``Stepper``.

    Args:
        stepper: A stepper that has read the prompts.
        next_logits: Logits of each sequence's next token.
        sequences: The sequences, in the order of the prompts.
    """

    def __init__(self, stepper: Stepper, next_logits: StepOutput, sequences: Sequence[TokenSequence]) -> None:
        self.sequences = list(sequences)
        self._stepper = stepper
        self._next = next_logits
        self._chosen: Int[Tensor, " batch"] | None = None
        self._ended: set[int] = set()

    @torch.inference_mode()
    def choose(self) -> list[TokenEvent]:
        """Choose the next token of every sequence, or its end.

        Raises:
            NonFiniteError: If a logit is not finite; nothing is chosen then. See ``find_non_finite``.
        """
        next_logits = self._next
        samplings = [sequence.sampling for sequence in self.sequences]
        is_greedy = find_draws(samplings) == "greedy"
        uniform = None if is_greedy else torch.stack([sequence.draw() for sequence in self.sequences])

        def choose(span: slice, answer: Distributions | None) -> Int[Tensor, " n"]:
            assert answer is not None
            return choose_tokens(answer, samplings[span], None if uniform is None else uniform[span])

        most = max(sampling.alternatives for sampling in samplings)
        table, chosen = choose_and_tabulate(next_logits, choose, most)
        tokens, self._chosen = read_table(table), chosen
        events = []
        for row, (sequence, (token,)) in enumerate(zip(self.sequences, tokens, strict=True)):
            states = None if next_logits.states is None else next_logits.states[0, row]
            attention = None if next_logits.attention is None else next_logits.attention[0, row]
            events.append(sequence.take(token, states, attention))
        self._ended = {event.sequence for event in events if event.finish is not None}
        return events

    def step(self, gone: Set[int] = frozenset()) -> None:
        """Run the model on the chosen tokens, for the sequences that have not ended and are not in ``gone``."""
        kept = self._leave(self._ended | gone)
        if self.sequences:
            assert self._chosen is not None
            self._next = self._stepper.step(self._chosen if kept is None else self._chosen[kept])

    def drop(self, gone: Set[int]) -> None:
        """Remove sequences from the batch before their next token is chosen."""
        kept = self._leave(gone)
        if self.sequences and kept is not None:
            self._next = self._next.select(kept)

    def _leave(self, gone: Set[int]) -> list[int] | None:
        """Free the rows of these sequences; return the places of those that stay, None where all do."""
        kept = [row for row, sequence in enumerate(self.sequences) if sequence.name not in gone]
        if len(kept) == len(self.sequences):
            return None
        self.sequences = [self.sequences[row] for row in kept]
        if kept:
            self._stepper.keep(kept)
        return kept

    def join(self, other: DecodeBatch) -> None:
        """Add the sequences of another batch of the same model behind this batch's own.

        Raises:
            WrapError: If the model's cache cannot be joined.
        """
        self._stepper.join(other._stepper)
        self._next = self._next.join(other._next)
        self.sequences += other.sequences

    def find_non_finite(self) -> set[int]:
        """Return the names of the sequences whose next logits are NaN or infinite."""
        fine = self._next.logits.isfinite().all(-1).all(0).tolist()
        return {sequence.name for sequence, is_fine in zip(self.sequences, fine, strict=True) if not is_fine}


def decode(
    stepper: Stepper,
    next_logits: StepOutput,
    lengths: Sequence[int],
    sampling: Sampling,
    seeds: Sequence[int],
    closed: Set[int] = frozenset(),
) -> Iterator[TokenEvent]:
    """Choose tokens until every sequence has ended.

    Args:
        stepper: A stepper that has read the prompts.
        next_logits: Logits after each prompt.
        lengths: Number of tokens of each prompt.
        sampling: Settings by which tokens are chosen.
        seeds: One seed per sequence.
        closed: Names of sequences to end early; checked after each token.
    """
    room = [(stepper.context or 2**62) - length for length in lengths]
    sequences = [TokenSequence(i, sampling, seed, room[i]) for i, seed in enumerate(seeds)]
    yield from decode_batch(DecodeBatch(stepper, next_logits, sequences), closed)


def decode_batch(batch: SequenceBatch, closed: Set[int] = frozenset()) -> Iterator[TokenEvent]:
    """Choose tokens until every sequence of a batch has ended; see ``decode``."""
    while batch.sequences:
        yield from batch.choose()
        batch.step(closed)
