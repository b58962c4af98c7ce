"""Builds what a config describes: the frozen base with wrapper and LoRA, and the Lightning Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning
import torch
from lightning.pytorch import callbacks, loggers, strategies
from torch import nn

from selfdoubt import vote
from selfdoubt.errors import ConfigError, require
from selfdoubt.lm.adapters.lora import add_lora
from selfdoubt.lm.load import load_model
from selfdoubt.train.config import TrainConfig
from selfdoubt.train.devices import choose_device, count_devices
from selfdoubt.train.encode import prepare_tokenizer
from selfdoubt.wrapping import innermost


def build_model(config: TrainConfig) -> tuple[nn.Module, Any]:
    """Build the wrapped model, its added parameters in float32, and its tokenizer with the template it learns.

    Raises:
        LoadError: If the model cannot be read.
        ConfigError: If the config does not suit the model.
    """
    base, tokenizer = load_model(
        config.model,
        dtype=config.dtype,
        device=choose_device(config) if config.quantize else "cpu",  # packed weights cannot be moved
        quantize=config.quantize,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    prepare_tokenizer(tokenizer, config.prompt)
    settings = cast(Any, base).config.get_text_config()
    context = getattr(settings, "max_position_embeddings", None)
    if isinstance(context, int) and config.max_length > context:
        raise ConfigError(
            f"max_length={config.max_length}, and {config.model} reads at most {context} tokens; use {context}"
        )
    window = getattr(settings, "sliding_window", None)
    if config.pack and isinstance(window, int) and config.max_length > window:
        raise ConfigError(
            f"packed rows of {config.max_length} tokens are longer than the sliding window of {config.model} "
            f"({window}), whose borders packing cannot keep; use max_length={window}, or no packing"
        )
    wrapped = wrap_base(base, config)
    if config.precision != "bf16-true" and config.strategy != "fsdp":  # FSDP shards groups of one dtype
        train_in_float32(wrapped)
    if config.checkpointing:
        inner: Any = innermost(wrapped)
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return wrapped, tokenizer


def train_in_float32(model: nn.Module) -> None:
    """Convert the parameters that train to float32, in place: small steps would be lost in shorter types."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def wrap_base(base: nn.Module, config: TrainConfig) -> nn.Module:
    """Wrap the base as the config says, with LoRA beneath any wrapper except voters; only added parameters train."""
    if isinstance(config.wrapper, vote.Wrapper):
        return config.wrapper(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = add_lora(
            base, r=config.lora_r, alpha=config.lora_alpha, dropout=config.lora_dropout, targets=config.lora_targets
        )
    return model if config.wrapper is None else config.wrapper(model)


def build_trainer(config: TrainConfig, run: Path, batches: int, *, has_validation: bool) -> lightning.Trainer:
    """Build a Trainer for a config: checkpoints, loggers, strategy and limits.

    Args:
        config: The settings.
        run: Folder for checkpoints and logs.
        batches: Batches of an epoch on one device.
        has_validation: True if there is a validation loss to choose the best weights by.

    Raises:
        MissingExtraError: If a logger or DeepSpeed is asked for and not installed.
    """
    hooks: list[lightning.Callback] = [
        callbacks.ModelCheckpoint(
            dirpath=run, filename="last", every_n_train_steps=config.checkpoint_every, enable_version_counter=False
        )
    ]
    if has_validation:
        hooks.append(callbacks.ModelCheckpoint(
            dirpath=run, filename="best", monitor="val/loss", save_on_train_epoch_end=False,
            enable_version_counter=False,
        ))  # fmt: skip
        if config.patience is not None:
            hooks.append(callbacks.EarlyStopping("val/loss", patience=config.patience))
    chosen = _loggers(config, run)
    if chosen:
        hooks.append(callbacks.LearningRateMonitor())
    return lightning.Trainer(
        accelerator=config.accelerator,
        devices=config.devices or "auto",
        num_nodes=config.nodes,
        strategy=_strategy(config),
        precision=config.precision,
        max_epochs=config.epochs,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip or None,
        val_check_interval=max(1, round(batches * config.val_every)) if has_validation else None,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if has_validation else 0,
        use_distributed_sampler=False,  # ours knows the devices
        callbacks=hooks,
        logger=chosen or False,
        log_every_n_steps=1 if batches < 200 else 10,
        enable_progress_bar=config.progress,
        enable_model_summary=False,
        default_root_dir=run,
    )


def _strategy(config: TrainConfig) -> Any:
    if config.strategy == "ddp" or (config.strategy == "auto" and count_devices(config) > 1):
        # Frozen buffers are alike everywhere: they need not be sent.
        return strategies.DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    if config.strategy == "fsdp":
        return strategies.ModelParallelStrategy(data_parallel_size=count_devices(config), tensor_parallel_size=1)
    if config.strategy.startswith("deepspeed"):
        require("deepspeed", "deepspeed")
    return config.strategy


def _loggers(config: TrainConfig, run: Path) -> list[Any]:
    names = config.logger_names()
    made: list[Any] = []
    if "csv" in names:
        made.append(loggers.CSVLogger(run, name="log", version=""))
    if "tensorboard" in names:
        require("tensorboard", "train")
        made.append(loggers.TensorBoardLogger(str(run), name="tensorboard"))
    if "wandb" in names:
        require("wandb", "train")
        made.append(loggers.WandbLogger(project="selfdoubt", save_dir=run))
    return made
