"""The device that a model runs on: free memory, bandwidth, attention backends, threads and number formats."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from selfdoubt.errors import ConfigError

#: Bytes that a measurement of the bandwidth copies: far more than a cache holds.
_COPIED = {"cpu": 2**27, "cuda": 2**30}
#: Instructions of a CPU that compute products of bfloat16, as /proc/cpuinfo names them.
_BF16_FLAGS = ("amx_bf16", "avx512_bf16")


@dataclass(frozen=True)
class Device:
    """A device and its state.

    Bandwidth counts bytes read and bytes written per second, as a large copy reaches it.
    """

    kind: str  #: "cpu" or "cuda"
    name: str
    total_bytes: int
    free_bytes: int
    bandwidth: float
    threads: int | None  #: of a product on a CPU
    cores: int | None
    bf16: tuple[str, ...]  #: what computes products of bfloat16: instructions of a CPU, or "tensor cores"
    attention: tuple[str, ...]  #: kernels of scaled_dot_product_attention that are on


def read_device(text: str | None) -> torch.device:
    """Return the device of a name; None takes a GPU where there is one.

    Raises:
        ConfigError: If there is no such device, or none that a model can run on.
    """
    count = torch.cuda.device_count()
    there = "cpu" if not count else "cpu, cuda" + "".join(f", cuda:{i}" for i in range(count))
    try:
        device = torch.device(text or ("cuda" if count else "cpu"))
    except RuntimeError:
        raise ConfigError(f"no device is called {text!r}; this machine has {there}") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise ConfigError(f"this machine has no device {text!r}; it has {there}")
    return device


def describe_device(device: torch.device) -> Device:
    """Return what is known of a device; its bandwidth is measured, for less than a second."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        threads, cores = None, None
        bf16: tuple[str, ...] = ("tensor cores",) if torch.cuda.is_bf16_supported(including_emulation=False) else ()
    else:
        total, free = read_cpu_memory()
        info = _read_text("/proc/cpuinfo")
        match = re.search(r"model name\s*:\s*(.+)", info)
        name = match[1].strip() if match else "CPU"
        threads, cores = torch.get_num_threads(), _count_cores()
        bf16 = tuple(flag for flag in _BF16_FLAGS if re.search(rf"\b{flag}\b", info))
    bandwidth = measure_bandwidth(device)
    return Device(device.type, name, total, free, bandwidth, threads, cores, bf16, list_attention_kernels(device.type))


def read_cpu_memory() -> tuple[int, int]:
    """Return the machine's memory, and the part of it that programs can still take, bytes."""
    values = {name: 1024 * int(kb) for name, kb in re.findall(r"(\w+):\s+(\d+) kB", _read_text("/proc/meminfo"))}
    if "MemAvailable" in values:
        total, free = values["MemTotal"], values["MemAvailable"]
        limit = _read_text("/sys/fs/cgroup/memory.max").strip()
        if limit.isdigit() and int(limit) < total:  # a container's
            used = int(_read_text("/sys/fs/cgroup/memory.current").strip() or 0)
            total, free = int(limit), min(free, max(0, int(limit) - used))
        return total, free
    page = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    total = page * os.sysconf("SC_PHYS_PAGES") if page else 0
    return total, total // 2  # no more is known where there is no /proc


def measure_bandwidth(device: torch.device, rounds: int = 5) -> float:
    """Return the bytes per second, read and written, of the quickest of some copies."""
    source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return 2 * source.numel() / min(seconds)


def synchronize(device: torch.device) -> None:
    """Wait for all work on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def list_attention_kernels(kind: str) -> tuple[str, ...]:
    """Return the kernels that ``scaled_dot_product_attention`` may choose on a kind of device."""
    if kind == "cpu":
        return ("flash", "math")
    switches: dict[str, Callable[[], bool]] = {
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "mem-efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "math": torch.backends.cuda.math_sdp_enabled,
    }
    return tuple(name for name, is_on in switches.items() if is_on())


def _count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
