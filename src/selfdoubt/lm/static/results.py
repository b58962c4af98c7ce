"""Results of turns on their way to the host: they are copied while the device goes on, and waited for when read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selfdoubt.lm.static.turn import TurnOutput
from selfdoubt.lm.token_table import ScoredId, TokenTable, read_table


class ChosenToken(NamedTuple):
    """A token that was chosen for a sequence, with what its step gave, on the host."""

    token: ScoredId
    states: Float[Tensor, "layers width"] | None
    attention: Float[Tensor, "attended heads"] | None


class TurnResult:
    """The results of a turn, for the sequences that took part in it.

    Args:
        output: The tensors that the turn wrote; on a GPU they may be overwritten by the next turn of the same stream.
        rows: Row of each sequence, by its name.
    """

    def __init__(self, output: TurnOutput, rows: Mapping[int, int]) -> None:
        self._rows = dict(rows)
        self._event: torch.cuda.Event | None = None
        numbers = output.table.numbers
        if numbers.device.type == "cuda":
            copies = [self._copy(x) for x in (numbers, output.states, output.attention)]
            assert copies[0] is not None
            output = TurnOutput(replace(output.table, numbers=copies[0]), copies[1], copies[2])
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(numbers.device))
        self._output = output

    @staticmethod
    def _copy(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def holds(self, name: int) -> bool:
        """Return whether a sequence took part."""
        return name in self._rows

    def read(self, names: Sequence[int]) -> dict[int, ChosenToken]:
        """Return the tokens of these sequences, as far as they took part.

        Raises:
            NonFiniteError: If logits of one of them were NaN or infinite.
        """
        table, present = self._select(names)
        if not present:
            return {}
        tokens = read_table(table)
        states, attention = self._output.states, self._output.attention
        chosen = {}
        for (token,), name in zip(tokens, present, strict=True):
            row = self._rows[name]
            chosen[name] = ChosenToken(
                token,
                None if states is None else states[row].clone(),
                None if attention is None else attention[row].clone(),
            )
        return chosen

    def find_non_finite(self, names: Sequence[int]) -> set[int]:
        """Return those of these sequences whose logits were NaN or infinite."""
        table, present = self._select(names)
        fine = table.entropies[:, 0].isfinite().all(-1).tolist()
        return {name for name, is_fine in zip(present, fine, strict=True) if not is_fine}

    def _select(self, names: Sequence[int]) -> tuple[TokenTable, list[int]]:
        """Return the table of these sequences once it is there, and their names."""
        if self._event is not None:
            self._event.synchronize()
        present = [name for name in names if name in self._rows]
        table = self._output.table
        return replace(table, numbers=table.numbers[[self._rows[name] for name in present]]), present
