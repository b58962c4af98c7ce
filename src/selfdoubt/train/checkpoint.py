"""Turns a training checkpoint, one file or sharded over devices, into an adapter folder.

A checkpoint is read as tensors and plain values; a file that holds other objects, which could run code, is refused.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfdoubt.errors import LoadError
from selfdoubt.train.build import build_model
from selfdoubt.train.config import load_config
from selfdoubt.train.encode import load_splits
from selfdoubt.train.publish import History, publish
from selfdoubt.train.shards import INDEX, read_deepspeed, read_shards

SETTINGS = "config.toml"


def export_checkpoint(checkpoint: Path, out: Path) -> Path:
    """Write the adapter of a run as if the run had ended at a checkpoint.

    Args:
        checkpoint: ``run/last.ckpt`` or ``run/best.ckpt`` of an adapter folder: a file, or a folder of FSDP2 or
            DeepSpeed.
        out: The adapter folder to write.

    Raises:
        LoadError: If the checkpoint or the settings next to it cannot be read, or if it holds more than data.
        MissingExtraError: If it is DeepSpeed's, and DeepSpeed is not installed.
    """
    settings = checkpoint.parent / SETTINGS
    if not checkpoint.exists() or not settings.is_file():
        raise LoadError(
            f"{checkpoint} is not a checkpoint of a run with its {SETTINGS} next to it; give run/last.ckpt of an "
            "adapter"
        )
    config = load_config(settings, {})
    content = read_checkpoint(checkpoint)
    model, tokenizer = build_model(config)
    load_trained_state(model, content["state_dict"], checkpoint)
    splits = load_splits(config, checkpoint.parent / "data")
    history = History(
        content.get("train_losses", []), train=len(splits.train), val=len(splits.val), empty=splits.empty,
        cut=splits.cut,
    )  # fmt: skip
    publish(config, model, tokenizer, out, history=history, val=splits.val)
    return out


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint, its shards put together.

    Raises:
        LoadError: If it cannot be read, or holds more than tensors and plain values.
        MissingExtraError: If it is DeepSpeed's, and DeepSpeed is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickles in other formats; those are refused
            if checkpoint.is_file():
                return dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
            if (checkpoint / INDEX).is_file():
                return read_shards(checkpoint)
            if (checkpoint / "checkpoint").is_dir():
                return read_deepspeed(checkpoint)
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"{checkpoint} holds more than tensors and plain values ({_shorten(error)}), which could run code, so it "
            "is not read; give a checkpoint that selfdoubt train wrote"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise LoadError(
            f"{checkpoint} cannot be read ({_shorten(error)}); give another checkpoint, or train again"
        ) from None
    raise LoadError(f"{checkpoint} is neither a file nor a folder of shards that FSDP2 or DeepSpeed wrote")


def _shorten(error: Exception) -> str:
    """Return an error's first sentence as one line; torch appends advice on how to trust a file."""
    text = str(error).rpartition("WeightsUnpickler error:")[2] or str(error)
    return " ".join(text.split())[:160]


def load_trained_state(model: nn.Module, state: dict[str, torch.Tensor], source: Path) -> None:
    """Load the parameters that train into a model; names are those of the LightningModule around it.

    Raises:
        LoadError: If a parameter that trains is missing.
    """
    trained = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and name not in trained]
    if lacking:
        raise LoadError(f"{source} lacks {lacking[0]}; it was written by a run with other settings")
    model.load_state_dict(trained, strict=False)
