"""Limits the number of threads that compute a step on a CPU."""

from __future__ import annotations

import os

import torch

from selfdoubt.lm.model import RiskAwareLM


def limit_threads(lm: RiskAwareLM, threads: int | None = None) -> None:
    """Leave a core to the threads that answer requests; on another device nothing changes.

    Threads of a step wait for each other many times per token. If they take every core, each token that is sent pushes
    one of them aside, and all wait for it: with a small model that halves the speed.

    Args:
        lm: The model.
        threads: None is one less than torch would use, or the value of ``OMP_NUM_THREADS``.
    """
    is_on_cpu = next(lm.model.parameters()).device.type == "cpu"
    if not is_on_cpu or (threads is None and "OMP_NUM_THREADS" in os.environ):
        return
    torch.set_num_threads(threads or max(1, torch.get_num_threads() - 1))
