"""Memory in use, and the most of it: of torch on a GPU, of the process (Linux) on a CPU."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

import torch


def now() -> int:
    """Return the bytes in use: on a GPU by tensors, on a CPU by the process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def peak() -> int:
    """Return the most bytes in use since ``forget_peak``."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")  # as ru_maxrss, which cannot be set back


def forget_peak() -> None:
    """Return freed memory to the system, and forget the peak of loading: steps count from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match, f"/proc/self/status has no {name}"
    return int(match[1]) * 1024
