"""Ways to run the steps of decoding, and their choice."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from selfdoubt.errors import ConfigError

#: eager: step by step over a cache that grows. static: over a cache of fixed size. captured: the static step as a CUDA
#: graph. compiled: the static step compiled, and captured where there is a GPU. auto: captured on a GPU, else eager.
StepMode = Literal["auto", "eager", "static", "captured", "compiled"]


def check_step_mode(mode: str) -> StepMode:
    """Return a mode that is known.

    Raises:
        ConfigError: If it is not.
    """
    if mode not in get_args(StepMode):
        raise ConfigError(f"step must be one of {', '.join(get_args(StepMode))}, got {mode!r}")
    return mode  # type: ignore[return-value]


def choose_step_mode(mode: StepMode, device: torch.device) -> StepMode:
    """Return the mode for a device, never "auto".

    Raises:
        ConfigError: If steps are to be captured where there is no CUDA GPU.
    """
    is_cuda = device.type == "cuda"
    if mode == "auto":
        return "captured" if is_cuda else "eager"
    if mode == "captured" and not is_cuda:
        raise ConfigError(
            f"step='captured' needs a CUDA GPU, and the model is on {device}; use step='static' or 'auto'"
        )
    return mode
