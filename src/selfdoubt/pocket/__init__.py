"""The pocket model: a small Llama that knows some geography, shipped with the package.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["evaluation_file", "folder", "reference_file", "voters_folder"]

_HERE = Path(__file__).resolve().parent


def folder() -> Path:
    """Return the folder of the shipped model, in Hugging Face layout."""
    return _HERE / "model"


def evaluation_file() -> Path:
    """Return the file of questions that measure the pocket model, with the truth for each."""
    return _HERE / "evaluation.jsonl"


def reference_file() -> Path:
    """Return the questions that its reference quantiles come from; it shares no city with the evaluation file."""
    return _HERE / "reference.jsonl"


def voters_folder() -> Path:
    """Return the three voters that come with the model, an adapter folder."""
    return _HERE / "voters"
