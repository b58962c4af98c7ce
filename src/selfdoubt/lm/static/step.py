"""The static step of a model: one token for every slot of a ``SlotCache``, with no value read by the host."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.compat import keeps_keys_only
from selfdoubt.lm.static.slots import SlotCache
from selfdoubt.lm.step_output import StepOutput
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.rows import expand

#: Attention functions that take a mask of summands.
_MASKED_ATTENTION = ("sdpa", "eager")


def find_obstacle(stepper: HFStepper) -> str | None:
    """Return the reason why a model cannot have a static cache; None where nothing speaks against it.

    Args:
        stepper: A stepper that has read a prompt.
    """
    strange = [layer for layer in stepper.cache.layers if not keeps_keys_only(layer)]
    if strange:
        return f"its cache has a {type(strange[0]).__name__}, which keeps more than keys and values"
    if not stepper.takes_positions:
        return "its forward takes no position_ids"
    kind = getattr(stepper.config, "_attn_implementation", None)
    if kind not in _MASKED_ATTENTION:
        return f"its attention is {kind!r}, which takes no mask of summands"
    if len({layer.keys.device for layer in stepper.cache.layers if layer.keys is not None}) > 1:
        return "its layers are on several devices"
    try:
        name_windows(SlotCache.like(stepper.cache, 1, 0, 0), getattr(stepper.config, "layer_types", None))
    except ValueError as error:
        return str(error)
    return None


class StaticStep:
    """A step of a model over a static cache.

    Args:
        stepper: Stepper that runs the model, and its probes.
        cache: The cache.
    """

    def __init__(self, stepper: HFStepper, cache: SlotCache) -> None:
        self.cache = cache
        self.stepper = stepper
        self._presented = cache.present()
        self._windows = name_windows(cache, getattr(stepper.config, "layer_types", None))
        self._dtype = cache.kept[0].keys.dtype

    def run(self, ids: Int[Tensor, " slots"]) -> StepOutput:
        """Run the model on one token per slot, at the slots' positions, which advance; free slots run along.

        Logits are ``(members, slots, classes)``. Everything happens on the device, in place.
        """
        with self.probing():
            return self.run_probed(ids)

    def probing(self) -> AbstractContextManager[None]:
        """Return a context in which probes record ``run_probed``."""
        return self.stepper.probing(1, self.cache.positions)

    def run_probed(self, ids: Int[Tensor, " slots"]) -> StepOutput:
        """Run the model as ``run`` does, within a block of ``probing``. It can be compiled as one graph."""
        rows, columns = self.stepper.rows_per_sequence, self.cache.begin_step()
        inputs = {
            "input_ids": expand(ids[:, None], rows),
            "position_ids": expand(columns[:, None], rows),
            "attention_mask": self._build_masks(),
            "past_key_values": self._presented,
            "use_cache": True,
        }
        output, _ = self.stepper.run_probed(inputs)
        self.cache.positions.add_(1)
        return output.at(-1)

    def _build_masks(self) -> Tensor | Mapping[str, Tensor]:
        if isinstance(self._windows, Mapping):
            return {name: self._build_mask(window) for name, window in self._windows.items()}
        return self._build_mask(self._windows)

    def _build_mask(self, window: int | None) -> Float[Tensor, "rows 1 1 length"]:
        return expand(self.cache.build_mask(window, self._dtype), self.stepper.rows_per_sequence)


def name_windows(cache: SlotCache, kinds: Any) -> Mapping[str, int | None] | int | None:
    """Return the window of each kind of layer by its name; or the only window where all layers have the same.

    Args:
        cache: The cache whose layers have the windows.
        kinds: Kind of each layer by name, as a model's config has it; None where it has none.

    Raises:
        ValueError: If layers differ, and their kinds do not.
    """
    if len(set(cache.windows)) == 1:
        return cache.windows[0]
    if kinds is None or len(kinds) < len(cache.layers):
        raise ValueError("its layers have different windows, and its config has no names of their kinds")
    named: dict[str, int | None] = {}
    for kind, layer in zip(kinds, cache.layers, strict=False):
        if layer is not None and named.setdefault(kind, layer.window) != layer.window:
            raise ValueError(f"its layers of the kind {kind!r} have different windows")
    return named
