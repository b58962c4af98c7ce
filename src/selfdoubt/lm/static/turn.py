"""A turn of a batch in slots: a step of the model, the choice of the next tokens, and their scores, all on the device.

It reads and writes tensors of fixed shapes and addresses, and no value reaches the host: it can be compiled as one
graph, or captured as a CUDA graph. Free slots run along; their results are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.distributions import Distributions
from selfdoubt.lm.grouped_queries import group_compiled_queries
from selfdoubt.lm.sampling import Draws, Sampling, choose_on_device
from selfdoubt.lm.static.step import StaticStep
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.token_table import TokenTable, choose_and_tabulate

#: Slots that there is room for from the beginning.
_ROOM = 256


@dataclass(frozen=True)
class TurnOutput:
    """The tokens that a turn chose, with their scores, for each slot."""

    table: TokenTable
    states: Float[Tensor, "slots layers width"] | None = None  #: hidden states in which the token was chosen
    attention: Float[Tensor, "slots attended heads"] | None = None  #: attention of the position on itself

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the host reads."""
        return [x for x in (self.table.numbers, self.states, self.attention) if x is not None]


class TurnBuffers:
    """The inputs of turns, at fixed addresses: the last token of each slot, and the settings of its draw.

    Args:
        device: Device of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.version = 0  #: a number that grows where the tensors move elsewhere
        self._ids = torch.zeros(_ROOM, dtype=torch.long, device=device)
        self._settings = torch.zeros(3, _ROOM, dtype=torch.float64, device=device)

    def make_room(self, slots: int) -> None:
        """Make room for this many slots."""
        if slots > len(self._ids):
            ids, settings = self._ids, self._settings
            self.version += 1
            self._ids, self._settings = ids.new_zeros(2 * slots), settings.new_zeros(3, 2 * slots)
            self._ids[: len(ids)], self._settings[:, : len(ids)] = ids, settings

    def ids(self, slots: int) -> Int[Tensor, " slots"]:
        """Return the last token of each slot."""
        return self._ids[:slots]

    def settings(self, slots: int) -> Float[Tensor, "3 slots"]:
        """Return temperature, top_p and draw of each slot, see ``describe_sampling``."""
        return self._settings[:, :slots]

    def put(self, slots: Sequence[int], ids: Int[Tensor, " batch"], settings: Float[Tensor, "3 batch"]) -> None:
        """Write the last tokens and the settings of the sequences in these slots."""
        index = torch.tensor(slots, device=self._device)
        self._ids[index] = ids
        self._settings[:, index] = settings

    def put_draws(self, slots: Sequence[int], draws: Sequence[Tensor]) -> None:
        """Write the draws of the sequences in these slots, without waiting for the device."""
        row = torch.zeros(max(slots) + 1, dtype=torch.float64, pin_memory=self._device.type == "cuda")
        row[list(slots)] = torch.stack(list(draws))
        self._settings[2, : len(row)].copy_(row, non_blocking=True)

    def move(self, slots: Sequence[int], size: int) -> None:
        """Move the entries of these slots to the first of ``size`` ones, in this order."""
        self.make_room(size)
        index = torch.tensor(slots, dtype=torch.long, device=self._device)
        self._ids[: len(slots)] = self._ids[index]
        self._settings[:, : len(slots)] = self._settings[:, index]


def describe_sampling(samplings: Sequence[Sampling], draws: Sequence[Tensor] | None) -> Float[Tensor, "3 batch"]:
    """Return temperature, top_p and draw of each sequence, on the host; the draw is 0 without ``draws``."""
    uniform = torch.zeros(len(samplings), dtype=torch.float64) if draws is None else torch.stack(list(draws))
    temperature, top_p = ([getattr(s, name) for s in samplings] for name in ("temperature", "top_p"))
    return torch.stack(
        [torch.tensor(temperature, dtype=torch.float64), torch.tensor(top_p, dtype=torch.float64), uniform]
    )


class DecodeTurn:
    """A turn for one size of the cache, one kind of draws and one number of alternatives.

    Args:
        step: The step of the model.
        buffers: The inputs.
        draws: Kind of draws.
        alternatives: Number of the most probable tokens that come with each token.
        compiled: Compile the turn as one graph, at its first run.
    """

    def __init__(
        self, step: StaticStep, buffers: TurnBuffers, draws: Draws, alternatives: int, *, compiled: bool = False
    ) -> None:
        self._step, self._draws, self._alternatives = step, draws, alternatives
        slots = step.cache.slots
        self._ids, self._settings = buffers.ids(slots), buffers.settings(slots)
        self._compiled = torch.compile(self.compute, fullgraph=True, dynamic=False) if compiled else None

    def __call__(self) -> TurnOutput:
        """Run the model on the last tokens, choose the next ones, and write them and the positions in place."""
        with self.probing():
            return self.run_probed()

    @property
    def is_compiled(self) -> bool:
        """True if the turn runs as one compiled graph."""
        return self._compiled is not None

    def probing(self) -> AbstractContextManager[None]:
        """Return a context in which probes record ``run_probed``."""
        return self._step.probing()

    def run_probed(self) -> TurnOutput:
        """Run the turn within a block of ``probing``, compiled or not."""
        if self._compiled is None:
            return self.compute()
        with group_compiled_queries():
            return self._compiled()

    def compute(self) -> TurnOutput:
        """Compute the turn, within a block of ``probing``."""
        step = self._step.run_probed(self._ids)
        output, chosen = choose_on_turn(step, self._settings, self._draws, self._alternatives)
        self._ids.copy_(chosen)
        return output

    def save(self) -> tuple[Tensor, Tensor]:
        """Return a copy of the tensors that a turn changes and does not write again: last tokens and positions."""
        return self._ids.clone(), self._step.cache.positions.clone()

    def restore(self, saved: tuple[Tensor, Tensor]) -> None:
        """Set the sequences back to where they were."""
        self._ids.copy_(saved[0])
        self._step.cache.positions.copy_(saved[1])


def choose_on_turn(
    step: StepOutput, settings: Float[Tensor, "3 batch"], draws: Draws, alternatives: int
) -> tuple[TurnOutput, Int[Tensor, " batch"]]:
    """Choose the next tokens of a step, ``(members, batch, classes)``; return them after their scores.

    Args:
        step: Logits, and what else the step gave.
        settings: Temperature, top_p and draw of each sequence, see ``sampling.choose_on_device``.
        draws: Kind of draws.
        alternatives: Number of the most probable tokens that come with each token.
    """

    def choose(span: slice, answer: Distributions | None) -> Int[Tensor, " n"]:
        assert answer is not None
        temperature, top_p, uniform = settings[:, span]
        return choose_on_device(answer, temperature, top_p, uniform, draws)

    table, chosen = choose_and_tabulate(step, choose, alternatives)
    states, attention = (None if x is None else x[0] for x in (step.states, step.attention))
    return TurnOutput(table, states, attention), chosen
