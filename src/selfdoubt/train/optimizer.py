"""Optimisers of a training run: AdamW in one kernel for all parameters, or with its state in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from selfdoubt.compat import allow_clipping, find_eight_bit_adamw
from selfdoubt.train.config import TrainConfig

#: Devices on which all of torch's versions that are supported here have a fused kernel.
_FUSED_ON = ("cpu", "cuda")


def build_optimizer(config: TrainConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Build the optimiser that a config names.

    AdamW runs fused, one kernel for all parameters of a device and type, where torch has such a kernel (CPUs and GPUs);
    elsewhere as a few operations on lists of them. Both compute the same step up to rounding.

    Raises:
        MissingExtraError: If its state is to have 8 bits, and bitsandbytes is not installed.
    """
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        optimizer: torch.optim.Optimizer = find_eight_bit_adamw()(parameters, **settings)
        return optimizer
    if all(p.is_floating_point() and p.device.type in _FUSED_ON for p in parameters):
        return allow_clipping(torch.optim.AdamW(parameters, fused=True, **settings))
    return torch.optim.AdamW(parameters, foreach=True, **settings)
