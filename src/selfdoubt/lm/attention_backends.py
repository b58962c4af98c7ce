"""Kernels of attention: cuDNN's is left out where lengths change, because it makes a plan for every new length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def steady_attention() -> Iterator[None]:
    """Run attention without cuDNN in the block, and restore the user's setting after it.

    cuDNN builds a plan for each new shape. In decoding every step has one, and the plans took 62 % of the host's time
    on an H200; the other kernels need none.
    """
    before: bool = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    if not before:
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
