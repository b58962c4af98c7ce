"""Bounds on a server's memory: few shapes of products, a small cache of them, and free memory that is returned.

In half precision on a CPU, and with prepacked weights, torch computes products with oneDNN, which compiles a kernel for
every number of rows that it meets and keeps up to 1,024 of them, about 0.6 MB each. A server meets every number of
rows, so its products are filled up to one of a few, and fewer kernels are kept.
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
from selfdoubt.lm.prepacked import MOST_ROWS, find_products
from selfdoubt.members import Wrapped, count_rows
from selfdoubt.rows import Replacement

#: Rows per member that a product may have; more are computed in pieces of the largest.
ROW_COUNTS = (*range(1, 13), 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
#: Compiled products that oneDNN keeps, where the environment does not say otherwise.
CACHE_CAPACITY, CACHE_VARIABLE = 320, "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
#: Bytes that a process may grow by before free memory is returned, and seconds between two checks.
TRIM_GROWTH, TRIM_INTERVAL = 32 * 2**20, 10.0


def bound_process_memory() -> None:
    """Bound the memory that this process keeps, for any requests; call it before a model computes anything."""
    limit_compiled_products()
    MemoryTrimmer().start()


def limit_compiled_products() -> None:
    """Let oneDNN keep at most ``CACHE_CAPACITY`` compiled products; without effect once it has computed one."""
    os.environ.setdefault(CACHE_VARIABLE, str(CACHE_CAPACITY))


def limit_shapes(lm: RiskAwareLM) -> None:
    """Let the products of a model that oneDNN computes have row counts of ``ROW_COUNTS`` only, in place.

    Rows of a product do not see each other: answers are those of another batch size. A compiled model keeps its shapes.
    Prepacked weights count as unchanged from now on.
    """
    model = lm.model
    wrapped = [m for m in model.modules() if isinstance(m, Wrapped)]
    if next(model.parameters()).device.type != "cpu" or any(m.spec.compile for m in wrapped):
        return
    members, products = count_rows(model), find_products(model)
    for module in model.modules():
        kernel = vars(module).get("kernel") if isinstance(module, Replacement) else None
        if kernel in (kernels.linear, kernels.embedding):
            if _is_half(next(iter(module.deviations.values()))):  # type: ignore[operator]
                module.kernel = _filled_kernel(kernel)  # type: ignore[assignment]
        elif type(module) is nn.Linear or is_transposed(module):
            if _is_half(module.weight):
                module.forward = _filled(products.get(module, module.forward), members)
            elif module in products:  # in float32, larger products are not oneDNN's
                module.forward = _filled(products[module], members, MOST_ROWS[torch.float32])


def split_rows(rows: int) -> list[tuple[int, int]]:
    """Cut this many rows into pieces: (rows, the size that they are filled up to)."""
    most = ROW_COUNTS[-1]
    full = [(most, most)] * (rows // most)
    rest = rows % most
    return [*full, (rest, ROW_COUNTS[bisect_left(ROW_COUNTS, rest)])] if rest else full


def _is_half(parameter: Any) -> bool:
    return isinstance(parameter, Tensor) and parameter.dtype in (torch.bfloat16, torch.float16)


def _filled(forward: Callable[[Tensor], Tensor], members: int, most: int | None = None) -> Callable[[Tensor], Tensor]:
    """Return a linear layer's forward, on rows filled up; beyond ``most`` rows, on the rows as they are."""

    exact = {members * size for size in ROW_COUNTS}

    def run(x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        count = x.shape[:-1].numel()
        if count in exact or (most is not None and count > most):
            return forward(x)
        each = members if count % members == 0 else 1
        if x.shape[0] == count <= ROW_COUNTS[-1] * each:  # one token per row, as in every step: no need to fold
            extra = each * ROW_COUNTS[bisect_left(ROW_COUNTS, count // each)] - count
            return forward(F.pad(x, (0, 0) * (x.ndim - 1) + (0, extra)))[:count]
        flat = x.reshape(count, x.shape[-1])
        outputs, first = [], 0
        for rows, size in split_rows(count // each):
            piece = flat[first : first + rows * each]
            first += rows * each
            if size > rows:
                outputs.append(forward(F.pad(piece, (0, 0, 0, (size - rows) * each)))[: rows * each])
            else:
                outputs.append(forward(piece))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    return run


def _filled_kernel(kernel: kernels.Kernel) -> kernels.Kernel:
    """Return a kernel, which computes what deviations add, on rows of every member filled up."""

    def run(leaf: nn.Module, x: Tensor, deviations: kernels.Deviations) -> Tensor:
        members = len(next(iter(deviations.values())))
        tail = x.shape[-1:] if x.is_floating_point() else x.shape[:0]  # ids have no features
        folded = x.reshape(members, -1, *tail)
        if folded.shape[1] in ROW_COUNTS:
            return kernel(leaf, x, deviations)
        outputs, first = [], 0
        for rows, size in split_rows(folded.shape[1]):
            piece = folded[:, first : first + rows]
            first += rows
            if size > rows:
                piece = F.pad(piece, (0, 0) * len(tail) + (0, size - rows))
            outputs.append(kernel(leaf, piece.flatten(0, 1), deviations).unflatten(0, (members, -1))[:, :rows])  # type: ignore[no-untyped-call]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return y.reshape(*x.shape[: x.ndim - len(tail)], y.shape[-1])

    return run


class MemoryTrimmer(threading.Thread):
    """A thread that returns free memory, which glibc keeps in its heaps, to the system; elsewhere it ends at once.

    Args:
        slack: Bytes that the process may grow by before free memory is returned.
        seconds: Time between two checks.
    """

    def __init__(self, slack: int = TRIM_GROWTH, seconds: float = TRIM_INTERVAL) -> None:
        super().__init__(name="selfdoubt-memory", daemon=True)
        self.times = 0  #: number of times that memory was returned
        self._slack, self._seconds = slack, seconds
        self._floor = 0
        self._malloc_trim = _find_in_glibc("malloc_trim")

    def run(self) -> None:
        """Check every few seconds, as long as the process lives."""
        while self.trim():
            time.sleep(self._seconds)

    def trim(self) -> bool:
        """Return free memory to the system if the process has grown; return False if that cannot be done."""
        size = resident_bytes()
        if self._malloc_trim is None or size is None:
            return False
        if size - self._floor > self._slack:
            self._malloc_trim(0)  # without the interpreter's lock: only threads that allocate wait, 20 ms
            self.times += 1
            self._floor = resident_bytes() or size
        self._floor = min(self._floor, size)
        return True


def resident_bytes() -> int | None:
    """Return the bytes that this process has in memory, or None where ``/proc`` does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError, AttributeError):
        return None


def _find_in_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc, or None where another C library is in use."""
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018
        function: Callable[..., int] = getattr(library, name)
    except (OSError, TypeError, AttributeError):
        return None
    return function
