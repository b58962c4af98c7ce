"""Compiled decoder layers for training steps, for ``compile=True``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from selfdoubt.lm.hidden_states import find_decoder_layers
from selfdoubt.wrapping import innermost


class CompiledLayers:
    """Compiled forwards of a model's decoder layers, which take the place of the plain ones while it is ``on``.

    Layers are compiled one by one, so that all share the code of the first. The first lengths have code of their own;
    from the second on it is for any length. Validation and answers, of ever other shapes, run the plain ones.

    Args:
        model: A wrapped or plain language model.
        backend: Compiler, as ``torch.compile`` names it.

    Raises:
        ConfigError: If the model has no stack of decoder layers.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Any]]] = [
            (layer, torch.compile(layer.forward, backend=backend)) for layer in find_decoder_layers(innermost(model))
        ]

    def on(self) -> None:
        """Run the compiled forwards from now on, also where a backward pass runs a layer again."""
        for layer, forward in self._forwards:
            layer.forward = forward

    def off(self) -> None:
        """Run the plain forwards again."""
        for layer, _ in self._forwards:
            vars(layer).pop("forward", None)
