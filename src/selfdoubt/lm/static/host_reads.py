"""Finds what no CUDA graph can hold, before it is captured: values that the host reads, and copies from or to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations that give the host a value, or a shape that depends on one.
_READS = frozenset({
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2",
    "bincount",
})  # fmt: skip
_COPIES = frozenset({"_to_copy", "to", "copy_"})


class HostReadGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which an operation raises that reads a value or copies between the host and a device.

    Args:
        device: Kind of device whose values count; None takes every one but the CPU.

    Raises:
        RuntimeError: Within the block, with the name of the operation.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _READS and any(self._counts(x) for x in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{name} reads a value of the device, which no graph can hold")
        result = func(*args, **(kwargs or {}))
        if name in _COPIES:
            tensors = [x for x in (*tree_leaves((args, kwargs)), *tree_leaves(result)) if isinstance(x, Tensor)]
            if len({x.device.type for x in tensors}) > 1:
                raise RuntimeError(f"{name} copies between the host and the device, which no graph can hold")
        return result

    def _counts(self, x: Any) -> bool:
        return isinstance(x, Tensor) and (
            x.device.type != "cpu" if self._device is None else x.device.type == self._device
        )
