"""Finds what no CUDA graph can hold, before it is captured: values that the host reads, and copies from or to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations that give the host a value, or a shape that depends on one.
READS = frozenset({
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "unique_dim_consecutive", "bincount", "multinomial", "repeat_interleave", "allclose",
})  # fmt: skip
_COPIES = frozenset({"_to_copy", "to", "copy_"})
_INDEXED = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})


def decompose(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation by its parts under a mode; ``NotImplemented`` if it has none.

    In inference mode operations that are made of others arrive whole.
    """
    is_attention = func.overloadpacket is torch.ops.aten.scaled_dot_product_attention
    if func.namespace == "prim" or is_attention:
        return NotImplemented
    if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


def has_mask(args: Any) -> bool:
    """Return True if an indexing operation gets a mask, whose number of true values is a shape."""
    return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1:2]))


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
        result = decompose(self, func, args, kwargs or {})
        if result is not NotImplemented:
            return result
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if self._counts(x)]
        masks = name in _INDEXED and has_mask(args)
        # repeat_interleave with one number is not among these: its operation of this name takes a tensor of numbers.
        if given and (masks or name in READS):
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
