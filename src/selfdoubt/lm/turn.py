"""A turn of a batch in slots: a step of the model, the choice of the next tokens, and their scores, all on the device.

It reads and writes tensors of fixed shapes and addresses, and no value reaches the host: it can be compiled as one
graph, or captured as a CUDA graph. Free slots run along; their results are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.lm.sampling import Draws, Sampling, choose_on_device
from selfdoubt.lm.static_step import StaticStep
from selfdoubt.lm.stepper import StepOutput
from selfdoubt.lm.token_table import TokenTable, tabulate

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
    """The inputs of turns, at fixed addresses: the last token of each slot, the settings of its draws, and a draw.

    Args:
        device: Device of the tensors.
        room: Slots that there is room for.
    """

    def __init__(self, device: torch.device, room: int = _ROOM) -> None:
        self.room = room
        self._ids = torch.zeros(room, dtype=torch.long, device=device)
        self._settings = torch.zeros(3, room, dtype=torch.float64, device=device)

    def ids(self, slots: int) -> Int[Tensor, " slots"]:
        """Return the last token of each slot."""
        return self._ids[:slots]

    def settings(self, slots: int) -> Float[Tensor, "3 slots"]:
        """Return temperature, top_p and draw of each slot."""
        return self._settings[:, :slots]

    def set_sampling(self, slots: Sequence[int], samplings: Sequence[Sampling]) -> None:
        """Write the settings of the sequences in these slots."""
        values = torch.tensor([[s.temperature for s in samplings], [s.top_p for s in samplings]], dtype=torch.float64)
        self._settings[:2, list(slots)] = values.to(self._settings.device)

    def move(self, slots: Sequence[int]) -> None:
        """Move the entries of these slots to the first ones, in this order."""
        index = torch.tensor(slots, dtype=torch.long, device=self._ids.device)
        self._ids[: len(slots)] = self._ids[index]
        self._settings[:, : len(slots)] = self._settings[:, index]


class Turn:
    """A turn for one size of the cache, one kind of draws and one number of alternatives.

    Args:
        step: The step of the model.
        buffers: The inputs.
        draws: Kind of draws.
        alternatives: Number of the most probable tokens that come with each token.
    """

    def __init__(self, step: StaticStep, buffers: TurnBuffers, draws: Draws, alternatives: int) -> None:
        self._step, self._buffers, self._draws, self._alternatives = step, buffers, draws, alternatives

    def __call__(self) -> TurnOutput:
        """Run the model on the last tokens, choose the next ones, and write them and the positions in place."""
        slots = self._step.cache.slots
        ids, settings = self._buffers.ids(slots), self._buffers.settings(slots)
        output, chosen = choose_and_tabulate(self._step.run(ids), settings, self._draws, self._alternatives)
        ids.copy_(chosen)
        return output


def choose_and_tabulate(
    step: StepOutput, settings: Float[Tensor, "3 batch"], draws: Draws, alternatives: int
) -> tuple[TurnOutput, Int[Tensor, " batch"]]:
    """Choose the next tokens of a step, ``(members, batch, classes)``; return them after their scores.

    Args:
        step: Logits, and what else the step gave.
        settings: Temperature, top_p and draw of each sequence, see ``sampling.choose_on_device``.
        draws: Kind of draws.
        alternatives: Number of the most probable tokens that come with each token.
    """
    mixed = step.mixture
    chosen = choose_on_device(mixed, settings[0], settings[1], settings[2], draws)
    table = tabulate(step.at(None), chosen[:, None], alternatives, mixed[:, None])
    states, attention = (None if x is None else x[0] for x in (step.states, step.attention))
    return TurnOutput(table, states, attention), chosen
