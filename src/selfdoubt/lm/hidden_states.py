"""Hidden states of decoder layers: captured while a model runs, and averaged over chosen positions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfdoubt.errors import ConfigError

#: Positions of hidden states: the last user token; where the answer's first token is chosen; and the mean over all
#: positions where a token of the answer is chosen. Each is the base's where that answers, else the mean over members.
Position = Literal["question", "first", "mean"]
POSITIONS: tuple[Position, ...] = get_args(Position)


@dataclass(frozen=True)
class StateKey:
    """The name of a stored hidden state: ``position.layer``; layer 0 is the first.

    Example:
        >>> StateKey.parse("first.2")
        StateKey(position='first', layer=2)
        >>> str(StateKey("mean", 0))
        'mean.0'
    """

    position: Position
    layer: int

    def __str__(self) -> str:
        return f"{self.position}.{self.layer}"

    @classmethod
    def parse(cls, name: str) -> StateKey:
        """Parse a key as ``str`` prints it.

        Raises:
            ConfigError: If it is not ``position.layer``.
        """
        position, _, layer = name.rpartition(".")
        if position not in POSITIONS or not layer.isdecimal():
            raise ConfigError(f"states are named like 'first.2' (position.layer), got {name!r}")
        return cls(position, int(layer))


class AnswerStates(NamedTuple):
    """Hidden states of one answer after some decoder layers, one row per layer, float32 on the host."""

    layers: tuple[int, ...]  #: 0 is the first decoder layer
    question: Float[Tensor, "layers width"]
    first: Float[Tensor, "layers width"]
    mean: Float[Tensor, "layers width"]

    def get(self, key: StateKey) -> Float[Tensor, " width"] | None:
        """Return the state of a position and layer; None where the layer is missing."""
        if key.layer not in self.layers:
            return None
        rows: Tensor = getattr(self, key.position)
        return rows[self.layers.index(key.layer)]


def find_decoder_layers(base: nn.Module) -> nn.ModuleList:
    """Return the stack of a Hugging Face decoder: its longest list of modules of one class.

    Raises:
        ConfigError: If it has none.
    """
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len({type(child) for child in m}) == 1]
    if not lists:
        raise ConfigError(f"{type(base).__name__} has no stack of decoder layers to take hidden states from")
    return max(lists, key=len)


def find_decoder_layer(base: nn.Module, layer: int) -> nn.Module:
    """Return one layer of the stack; 0 is the first.

    Raises:
        ConfigError: If the model lacks this layer.
    """
    stack = find_decoder_layers(base)
    if not 0 <= layer < len(stack):
        raise ConfigError(f"{type(base).__name__} has the decoder layers 0 to {len(stack) - 1}, and not {layer}")
    return stack[layer]


class _Outputs:
    """Outputs of some modules, which the hooks of one thread fill."""

    def __init__(self, count: int) -> None:
        self.values: list[Any] = [None] * count
        self.thread = 0

    def build_hook(self, place: int) -> Callable[[nn.Module, Any, Any], None]:
        """Build a hook that keeps the output of the module at this place."""

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or threading.get_ident() == self.thread:
                self.values[place] = output[0] if isinstance(output, tuple) else output

        return keep


class OutputRecorder:
    """A recorder of the outputs of some modules.

    Its hooks are the same objects each time, so that a compiled graph that holds them stays valid.

    Args:
        layers: The modules, in the order in which their outputs are returned.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self._outputs = _Outputs(len(self.layers))
        self._hooks = [self._outputs.build_hook(place) for place in range(len(self.layers))]

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record while the block runs."""
        self._outputs.thread = threading.get_ident()  # another thread may run the same model
        self._outputs.values[:] = [None] * len(self.layers)
        pairs = zip(self.layers, self._hooks, strict=True)
        handles = [layer.register_forward_hook(hook) for layer, hook in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> list[Any]:
        """Return the outputs of the last run, None for a module that did not run, and forget them."""
        values = list(self._outputs.values)
        self._outputs.values[:] = [None] * len(values)
        return values


class HiddenStatePooler:
    """A pooler that averages hidden states over chosen columns of a padded batch while it is read in pieces.

    Args:
        spans: For each sequence, places ``(first, end)`` to average over, counted from its own first token.
        lengths: Tokens in each sequence.
        padded: Side of the padding.
    """

    def __init__(
        self,
        spans: Sequence[Sequence[tuple[int, int]]],
        lengths: Sequence[int],
        padded: Literal["left", "right"] = "left",
    ) -> None:
        self._weights = torch.zeros(len(spans), len(spans[0]), max(lengths))
        for row, (places, length) in enumerate(zip(spans, lengths, strict=True)):
            pad = max(lengths) - length if padded == "left" else 0
            for span, (first, end) in enumerate(places):
                self._weights[row, span, pad + first : pad + end] = 1 / max(1, end - first)
        self.means: Float[Tensor, "batch spans layers width"] | None = None  #: None until a piece was read

    def add(self, first: int, states: Float[Tensor, "batch t layers width"]) -> None:
        """Add the hidden states of the columns from ``first`` on."""
        weights = self._weights[:, :, first : first + states.shape[1]].to(states.device)
        # What stands on padding may be anything, also infinite: it must not even be multiplied by zero.
        used = (weights > 0).any(1)[:, :, None, None]
        part = torch.einsum("bst,btlw->bslw", weights, states.float().masked_fill(~used, 0.0))
        self.means = part if self.means is None else self.means + part
