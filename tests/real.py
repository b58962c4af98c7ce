"""Real pretrained models, where somebody has put them: tests that need one skip themselves elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("SELFDOUBT_REAL_MODELS", "~/.cache/real-models")).expanduser()


def model(name: str) -> Path:
    """The folder of ``smollm2`` (SmolLM2-135M-Instruct), ``gemma`` (Gemma-3-270m) or ``qwen`` (Qwen2.5-Coder-0.5B)."""
    folder = FOLDER / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"no real model in {folder}; point SELFDOUBT_REAL_MODELS at a folder with {name} in it")
    return folder
