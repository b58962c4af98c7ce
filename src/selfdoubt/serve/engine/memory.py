"""Bounds on a server's memory: few shapes of products, a small cache of them, and free memory that is returned.

In half precision on a CPU, torch computes products with oneDNN, which compiles a kernel for every number of rows that
it meets and keeps up to 1,024 of them, about 0.6 MB each. A server meets every number of rows, so its products are
filled up to one of a few, and fewer kernels are kept.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from selfdoubt import kernels
from selfdoubt.compat import is_transposed
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.members import Wrapped
from selfdoubt.rows import Replacement

#: Rows per member that a product may have; more are computed in pieces of the largest.
SIZES = (*range(1, 13), 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
#: Compiled products that oneDNN keeps, where the environment does not say otherwise.
CAPACITY, VARIABLE = 320, "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
#: Free memory goes back when a process has grown by so many bytes; it is looked at every so many seconds.
SLACK, SECONDS = 32 * 2**20, 10.0


def bound_process() -> None:
    """Bound what this process keeps, whatever it is asked; call it before a model computes anything."""
    limit_compiled()
    GiveBack().start()


def limit_compiled() -> None:
    """Let oneDNN keep at most ``CAPACITY`` compiled products; without effect once it has computed one."""
    os.environ.setdefault(VARIABLE, str(CAPACITY))


def limit_shapes(lm: RiskAwareLM) -> None:
    """Let the products of a model in half precision on a CPU have row counts of ``SIZES`` only, in place.

    Rows of a product do not see each other: answers are those of another batch size. A compiled model keeps its shapes.
    """
    model = lm.model
    wrapped = [m for m in model.modules() if isinstance(m, Wrapped)]
    if next(model.parameters()).device.type != "cpu" or any(m.spec.compile for m in wrapped):
        return
    members = model.spec.members(training=False) if isinstance(model, Wrapped) else 1
    for module in model.modules():
        kernel = vars(module).get("kernel") if isinstance(module, Replacement) else None
        if kernel in (kernels.linear, kernels.embedding):
            if _is_half(next(iter(module.deviations.values()))):  # type: ignore[operator]
                module.kernel = _filled_kernel(kernel)  # type: ignore[assignment]
        elif (type(module) is nn.Linear or is_transposed(module)) and _is_half(module.weight):
            module.forward = _filled(module.forward, members)


def pieces(rows: int) -> list[tuple[int, int]]:
    """Cut this many rows into pieces: (rows, the size that they are filled up to)."""
    most = SIZES[-1]
    found = [(most, most)] * (rows // most)
    rest = rows % most
    return [*found, (rest, SIZES[bisect_left(SIZES, rest)])] if rest else found


def _is_half(parameter: Any) -> bool:
    return isinstance(parameter, Tensor) and parameter.dtype in (torch.bfloat16, torch.float16)


def _filled(forward: Callable[[Tensor], Tensor], members: int) -> Callable[[Tensor], Tensor]:
    """A linear layer's forward, on rows filled up."""

    exact = {members * size for size in SIZES}

    def run(x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        count = x.shape[:-1].numel()
        if count in exact:
            return forward(x)
        each = members if count % members == 0 else 1
        if x.shape[0] == count <= SIZES[-1] * each:  # one token per row, as in every step: no need to fold
            extra = each * SIZES[bisect_left(SIZES, count // each)] - count
            return forward(F.pad(x, (0, 0) * (x.ndim - 1) + (0, extra)))[:count]
        flat = x.reshape(count, x.shape[-1])
        found, first = [], 0
        for rows, size in pieces(count // each):
            piece = flat[first : first + rows * each]
            first += rows * each
            if size > rows:
                found.append(forward(F.pad(piece, (0, 0, 0, (size - rows) * each)))[: rows * each])
            else:
                found.append(forward(piece))
        y = found[0] if len(found) == 1 else torch.cat(found)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return run


def _filled_kernel(kernel: kernels.Kernel) -> kernels.Kernel:
    """What deviations add, on rows of every member filled up."""

    def run(leaf: nn.Module, x: Tensor, deviations: kernels.Deviations) -> Tensor:
        members = len(next(iter(deviations.values())))
        tail = x.shape[-1:] if x.is_floating_point() else x.shape[:0]  # ids have no features
        folded = x.reshape(members, -1, *tail)
        if folded.shape[1] in SIZES:
            return kernel(leaf, x, deviations)
        found, first = [], 0
        for rows, size in pieces(folded.shape[1]):
            piece = folded[:, first : first + rows]
            first += rows
            if size > rows:
                piece = F.pad(piece, (0, 0) * len(tail) + (0, size - rows))
            found.append(kernel(leaf, piece.flatten(0, 1), deviations).unflatten(0, (members, -1))[:, :rows])  # type: ignore[no-untyped-call]
        y = found[0] if len(found) == 1 else torch.cat(found, 1)
        return y.reshape(*x.shape[: x.ndim - len(tail)], y.shape[-1])

    return run


class GiveBack(threading.Thread):
    """A thread that returns free memory, which glibc keeps in its heaps, to the system; elsewhere it ends at once.

    Args:
        slack: Bytes that the process may grow by before free memory is returned.
        seconds: Time between two looks.
    """

    def __init__(self, slack: int = SLACK, seconds: float = SECONDS) -> None:
        super().__init__(name="selfdoubt-memory", daemon=True)
        self.times = 0  #: how often memory was returned
        self._slack, self._seconds = slack, seconds
        self._floor = 0
        self._trim = _of_glibc("malloc_trim")

    def run(self) -> None:
        """Look every few seconds, as long as the process lives."""
        while self.look():
            time.sleep(self._seconds)

    def look(self) -> bool:
        """Return free memory if the process has grown; False where that cannot be done."""
        size = resident()
        if self._trim is None or size is None:
            return False
        if size - self._floor > self._slack:
            self._trim(0)  # without the interpreter's lock: only who allocates meanwhile waits, some 20 ms
            self.times += 1
            self._floor = resident() or size
        self._floor = min(self._floor, size)
        return True


def resident() -> int | None:
    """Return the bytes that this process has in memory, or None where ``/proc`` does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError, AttributeError):
        return None


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc, or None where another C library is in use."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
        found: Callable[..., int] = getattr(library, name)
    except (OSError, TypeError, AttributeError):
        return None
    return found
