"""The batch size that fits the memory, for ``batch_size="auto"``: a step keeps its rows, and only their number at a
time changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from selfdoubt.errors import ConfigError
from selfdoubt.lm.adapters.lora import leave_casts_to_autocast
from selfdoubt.lm.hardware import read_cpu_memory
from selfdoubt.train.batches import Batch, collate, pack_rows, round_up
from selfdoubt.train.config import ROWS_OF_A_STEP, TrainConfig, load_config
from selfdoubt.train.devices import choose_device, choose_padding, count_devices

#: Share of the free memory of a CPU that a step may take.
_USABLE = 0.8


def resolve_batch_size(
    config: TrainConfig, examples: Any, loss: Callable[[nn.Module, TrainConfig, Batch], Tensor], model: nn.Module,
    settings: Path,
) -> TrainConfig:  # fmt: skip
    """Return a config with numbers in the place of ``batch_size="auto"``; one without it as it is.

    A step has ``ROWS_OF_A_STEP * accumulate`` rows. As many of them run at a time as fit the memory, in equal batches
    whose gradients are added, so that the result does not depend on the memory. On a GPU a step of the longest examples
    is tried with ever fewer rows; on a CPU its memory is counted on few rows and extrapolated.

    Args:
        config: The settings.
        examples: Encoded examples to learn from.
        loss: Loss of a model, with a config, on a batch.
        model: The model that trains; on a GPU it is moved there.
        settings: The resolved settings of a run, which one that resumes takes.

    Raises:
        ConfigError: If several devices train, not even one row fits, or a run that resumes has no such settings.
    """
    if config.batch_size != "auto":
        return config
    rows = ROWS_OF_A_STEP * config.accumulate
    if config.resume and settings.is_file():
        before = load_config(settings, {})
        if not isinstance(before.batch_size, int) or before.batch_size * before.accumulate != rows:
            raise ConfigError(
                f"batch_size='auto' with accumulate={config.accumulate} is {rows} rows a step, and the run to resume "
                f"had {before.batch_size} * {before.accumulate}; give batch_size and accumulate as in {settings}"
            )
        return replace(config, batch_size=before.batch_size, accumulate=before.accumulate)
    if count_devices(config) > 1:
        raise ConfigError("batch_size='auto' measures one device; give a number for several")
    sizes = list_batch_sizes(rows, config.groups)
    device = torch.device(choose_device(config))

    def run(size: int) -> None:
        batch = build_longest_batch(config, examples, size)
        with torch.enable_grad(), _autocast(config, device):
            total = loss(model, config, move_data_to_device(batch, device))
        total.backward()  # type: ignore[no-untyped-call]

    model.train()
    leave_casts_to_autocast(model, active=config.precision == "bf16-mixed")
    size = _try_sizes(model, sizes, run, device) if device.type == "cuda" else _estimate_size(model, sizes, run)
    leave_casts_to_autocast(model, active=False)
    return replace(config, batch_size=size, accumulate=rows // size)


def list_batch_sizes(rows: int, groups: int) -> list[int]:
    """Return the numbers of rows at a time into which a step divides, the largest first: each is at most half of the
    one before it, and a multiple of the groups.

    Example:
        >>> list_batch_sizes(12, groups=1), list_batch_sizes(24, groups=3)
        ([12, 6, 3, 1], [24, 12, 6, 3])

    Raises:
        ConfigError: If the rows do not divide by the groups.
    """
    if rows % groups:
        raise ConfigError(
            f"each of {groups} voters learns from its own share of a batch, and the {rows} rows of batch_size='auto' "
            f"do not divide; use batch_size={-(-rows // groups) * groups}, or voter_batch='repeat'"
        )
    sizes: list[int] = []
    for size in range(rows, 0, -1):
        if rows % size == 0 and size % groups == 0 and (not sizes or 2 * size <= sizes[-1]):
            sizes.append(size)
    return sizes


def build_longest_batch(config: TrainConfig, examples: Any, size: int) -> Batch:
    """Build a batch of the longest examples, repeated where there are too few; with packing its rows are full."""
    lengths = examples.with_format("torch")["length"][:]
    order = [int(i) for i in torch.argsort(lengths, descending=True, stable=True)]
    rows: Sequence[Sequence[int]] = [[i] for i in order]
    width = round_up(int(lengths.max()), choose_padding(config), config.max_length)
    if config.pack:
        rows, width = pack_rows(order, lengths, config.max_length), config.max_length
    chosen = [rows[i % len(rows)] for i in range(size)]
    plain = examples.with_format(None)
    return collate([[plain[i] for i in row] for row in chosen], 1, width, packed=config.pack)


def count_peak_bytes(run: Callable[[], None]) -> int:
    """Return the most bytes of tensors that were alive at a time while a function ran, without those before it.

    It counts what torch's operations return, on a CPU: not their own scratch memory, nor what allocators keep.
    """
    counter = _AllocationCounter()
    with counter:
        run()
    return counter.peak


class _AllocationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which the storages of all results are counted while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = func(*args, **(kwargs or {}))
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), before)
        return results

    def _add(self, storage: Any, before: set[int]) -> None:
        address = storage.data_ptr()
        if not address or address in before or address in self._alive:
            return
        self._alive[address] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, address)

    def _remove(self, address: int) -> None:
        self.now -= self._alive.pop(address, 0)


def _estimate_size(model: nn.Module, sizes: Sequence[int], run: Callable[[int], None]) -> int:
    """Return the largest size whose memory, which grows linearly with the rows, is free.

    Raises:
        ConfigError: If none is.
    """
    _, free = read_cpu_memory()
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    usable = _USABLE * free - 3 * trained  # their gradients, and AdamW's two moments
    small = sizes[-2:] if len(sizes) > 1 else sizes
    with _unchanged(model, torch.device("cpu")):
        peaks = {}
        for size in reversed(small):
            peaks[size] = count_peak_bytes(lambda size=size: run(size))  # type: ignore[misc]
            model.zero_grad(set_to_none=True)
    low, high = min(peaks), max(peaks)
    per_row = (peaks[high] - peaks[low]) / (high - low) if high > low else 0.0
    for size in sizes:
        if peaks[low] + per_row * (size - low) <= usable:
            return size
    raise _lack_of_memory(sizes[-1])


def _try_sizes(model: nn.Module, sizes: Sequence[int], run: Callable[[int], None], device: torch.device) -> int:
    """Return the largest size whose step succeeds on a GPU, next to the state of the optimiser.

    Raises:
        ConfigError: If none does.
    """
    model.to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    with _unchanged(model, device):
        for size in sizes:
            try:
                moments = [torch.empty_like(p) for p in (*trained, *trained)]
                run(size)
                torch.cuda.synchronize(device)
            except torch.cuda.OutOfMemoryError:
                continue
            else:
                return size
            finally:
                moments = []  # noqa: F841
                model.zero_grad(set_to_none=True)
                gc.collect()
                torch.cuda.empty_cache()
    raise _lack_of_memory(sizes[-1])


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave a model without gradients and the random numbers as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)


def _autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    is_mixed = config.precision == "bf16-mixed"
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False) if is_mixed else nullcontext()


def _lack_of_memory(rows: int) -> ConfigError:
    count = "a single row" if rows == 1 else f"{rows} rows"
    return ConfigError(
        f"a step of {count} does not fit the memory; use --checkpointing, --quantize nf4, or a smaller max_length"
    )
