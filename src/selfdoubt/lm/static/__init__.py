"""Decoding over a static key-value cache: slots, the step over them, and turns that are compiled or captured.

Import from its files: ``stepper`` has the step by itself, ``decoder`` whole batches of a model.
"""

from __future__ import annotations

__all__ = [
    "arena", "batch", "check", "cuda_graphs", "decoder", "results", "slots", "step", "stepper", "turn",
]  # fmt: skip
