"""Switches off the fused path of ``nn.TransformerEncoderLayer``, which reads weights without calling their layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_LOCK = Lock()
_STATE = {"users": 0, "before": True}  # blocks that run now, in all threads; the setting before the first


@contextmanager
def switch_fused_layers_off(condition: bool) -> Iterator[None]:
    """Run the block without fused layers if the condition holds; the switch is that of all threads."""
    if not condition:
        yield
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
