"""Switches off the fused path of ``nn.TransformerEncoderLayer``, which reads weights without calling their layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn

from selfdoubt.rows import Replacement

_LOCK = Lock()
_STATE = {"users": 0, "before": True}  # blocks that run now, in all threads; the setting before the first


def has_fused_leaves(model: nn.Module) -> bool:
    """Return True if a replaced leaf lies within a layer whose fused path would step over it."""
    layers = (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer))
    return any(isinstance(m, Replacement) for layer in layers for m in layer.modules())


@contextmanager
def switch_fused_layers_off(condition: bool) -> Iterator[None]:
    """Run the block without fused layers if the condition holds; the switch is that of all threads."""
    if not condition:
        yield
        return
    if torch.compiler.is_compiling():  # a graph is captured without locks
        mha: Any = torch.backends.mha  # its functions are not captured; its setting is
        before, mha._is_fastpath_enabled = mha._is_fastpath_enabled, False
        try:
            yield
        finally:
            mha._is_fastpath_enabled = before
        return
    with _LOCK:
        if not _STATE["users"]:
            _STATE["before"] = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _STATE["users"] += 1
    try:
        yield
    finally:
        with _LOCK:
            _STATE["users"] -= 1
            if not _STATE["users"]:
                torch.backends.mha.set_fastpath_enabled(bool(_STATE["before"]))
