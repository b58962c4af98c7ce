"""From a training checkpoint, of one file or sharded over devices, to an adapter folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfdoubt.errors import LoadError, require
from selfdoubt.train.build import model_of
from selfdoubt.train.config import read
from selfdoubt.train.encode import stored
from selfdoubt.train.publish import publish

SETTINGS = "config.toml"


def export_checkpoint(checkpoint: Path, out: Path) -> Path:
    """Write the adapter that a run would have left, had it ended at a checkpoint.

    Args:
        checkpoint: ``run/last.ckpt`` or ``run/best.ckpt`` of an adapter folder: a file, or a folder of FSDP2 or
            DeepSpeed.
        out: The adapter folder to write.

    Raises:
        LoadError: If the checkpoint or the settings beside it cannot be read.
        MissingExtraError: If it is DeepSpeed's, and DeepSpeed is not installed.
    """
    settings = checkpoint.parent / SETTINGS
    if not checkpoint.exists() or not settings.is_file():
        raise LoadError(
            f"{checkpoint} is no checkpoint of a run with its {SETTINGS} beside it; give run/last.ckpt of an adapter"
        )
    config = read(settings, {})
    content = load(checkpoint)
    model, tokenizer = model_of(config)
    put(model, content["state_dict"], checkpoint)
    found = stored(config, checkpoint.parent / "data")
    history = {
        "losses": content.get("train_losses", []), "val_loss": None, "val_accuracy": None,
        "train": len(found.train), "val": len(found.val), "empty": found.empty, "cut": found.cut,
    }  # fmt: skip
    publish(config, model, tokenizer, out, history=history, val=found.val)
    return out


def load(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, its shards put together.

    Raises:
        LoadError: If it cannot be read.
    """
    try:
        if checkpoint.is_file():
            return dict(torch.load(checkpoint, map_location="cpu", weights_only=False))
        if (checkpoint / ".metadata").is_file():
            return _from_shards(checkpoint)
        if (checkpoint / "checkpoint").is_dir():  # DeepSpeed's
            zero = require("deepspeed.utils.zero_to_fp32", "deepspeed")
            whole = zero.get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
            prefix = "_forward_module."
            return {"state_dict": {name.removeprefix(prefix): tensor for name, tensor in whole.items()}}
    except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
        text = " ".join(str(error).split())[:200]
        raise LoadError(f"{checkpoint} cannot be read ({text}); give another checkpoint, or train again") from None
    raise LoadError(f"{checkpoint} is neither a file nor a folder of shards that FSDP2 or DeepSpeed wrote")


def _from_shards(folder: Path) -> dict[str, Any]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as work:
        whole = Path(work) / "whole.pt"
        dcp_to_torch_save(folder, whole)
        content = torch.load(whole, map_location="cpu", weights_only=False)
    extra = folder / "meta.pt"  # what Lightning keeps beside the shards
    beside = torch.load(extra, map_location="cpu", weights_only=False) if extra.is_file() else {}
    return {**beside, **content}


def put(model: nn.Module, state: dict[str, torch.Tensor], source: Path) -> None:
    """Load what trains into a model; names are those of the LightningModule around it.

    Raises:
        LoadError: If a parameter that trains is missing.
    """
    own = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    lacking = [name for name, p in model.named_parameters() if p.requires_grad and name not in own]
    if lacking:
        raise LoadError(f"{source} lacks {lacking[0]}; it was written by a run with other settings")
    model.load_state_dict(own, strict=False)
