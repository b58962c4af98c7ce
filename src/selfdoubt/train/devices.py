"""Devices of a training run: their kind, their number, and the settings that depend on them."""

from __future__ import annotations

import os

import torch

from selfdoubt.train.config import TrainConfig

#: Rows are padded to a multiple of this many tokens on a GPU, whose libraries prepare each new shape for a while.
GPU_PADDING = 64


def choose_device(config: TrainConfig) -> str:
    """Return the device of this process: "cpu", or a GPU by the number that its launcher gave it."""
    on_gpu = config.accelerator != "cpu" and torch.cuda.is_available()
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu else "cpu"


def count_devices(config: TrainConfig) -> int:
    """Return the number of devices that train together."""
    return (config.devices or max(1, torch.cuda.device_count())) * config.nodes


def choose_padding(config: TrainConfig) -> int:
    """Return the number of tokens to a multiple of which rows are padded; 1 pads to the longest row."""
    if isinstance(config.pad_to, int):
        return config.pad_to
    return 1 if choose_device(config) == "cpu" else GPU_PADDING
