"""``fit``: runs a training from a config to an adapter folder."""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_only
from torch import nn
from torch.distributed.tensor import DTensor

from selfdoubt.errors import ConfigError, SelfdoubtError
from selfdoubt.lm.adapters.export import export_merged
from selfdoubt.lm.adapters.new_folder import check_upload, upload
from selfdoubt.train.batch_size import resolve_batch_size
from selfdoubt.train.build import build_model, build_trainer
from selfdoubt.train.checkpoint import SETTINGS, load_trained_state
from selfdoubt.train.config import TrainConfig
from selfdoubt.train.datamodule import InstructionData
from selfdoubt.train.devices import count_devices
from selfdoubt.train.encode import Splits, prepare_splits
from selfdoubt.train.module import RiskAwareModule, compute_loss
from selfdoubt.train.publish import MERGED, History, check_publishable, publish

_ADVICE = (
    ".*does not have many workers.*", ".*Checkpoint directory .* exists.*", ".*is deprecated, use .*TreeSpec.*",
    ".*smaller than the logging interval.*", ".*GPU available but not used.*",
    ".*your dataloader is not resumable.*",  # the data module is
    ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing changes it in place
    ".*Detected an existing checkpoint.*", ".*Please use DTensor instead.*",
)  # fmt: skip
RUN = "run"  #: checkpoints, logs and encoded data, in a folder of the adapter's
DATA = "data"
FINISHED = "finished.ckpt"  #: trained weights, in RUN until the adapter is written


def fit(config: TrainConfig, trainer: lightning.Trainer | None = None) -> Path:
    """Fine-tune a model as a config says, and write its adapter folder.

    Args:
        config: The settings.
        trainer: A Trainer of your own; None makes one from the config. It must not have a distributed sampler, and must
            accumulate as many batches as the config says.

    Returns:
        The adapter folder: ``RiskAwareLM.load(config.model, adapter=folder)``.

    Raises:
        ConfigError: If settings contradict each other or the model, or a checkpoint to resume from is missing.
        DataError: If the data cannot be read.
        LoadError: If the model cannot be read.
        NonFiniteError: If the loss becomes NaN or infinite.
    """
    out = Path(config.out)
    run = out / RUN
    last = run / "last.ckpt"
    _check_folder(config, out, last)
    if config.push is not None:
        check_upload(config.push)
    lightning.seed_everything(config.seed, verbose=False)
    model, tokenizer = build_model(config)
    if _is_first():
        check_publishable(config, model, tokenizer, out)
    splits = prepare_splits(config, tokenizer, run / DATA)
    config = resolve_batch_size(config, splits.train, compute_loss, model, run / SETTINGS)
    data = InstructionData(splits, config)
    with _quietly():
        batches = len(data.steps(count_devices(config)))
        module = RiskAwareModule(model, config)
        driver = trainer or build_trainer(config, run, batches, has_validation=bool(len(splits.val)))
        if driver.is_global_zero:
            run.mkdir(parents=True, exist_ok=True)
            (run / SETTINGS).write_text(config.to_toml(), encoding="utf-8")
            _say(_summarize(module, splits))
        module.train()
        # A Trainer of one's own may keep any object in its checkpoints; ours hold data.
        driver.fit(module, data, ckpt_path=str(last) if config.resume else None, weights_only=trainer is None)
        losses = list(module.train_losses)  # a checkpoint brings those up to it
        best = _load_best_weights(driver, module, data, weights_only=trainer is None) if len(splits.val) else {}
        model = _whole(config, module).to(driver.strategy.root_device)  # Lightning has moved it to the CPU
    if driver.is_global_zero:
        history = History(
            losses, best.get("val/loss"), best.get("val/accuracy"), len(splits.train), len(splits.val), splits.empty,
            splits.cut,
        )  # fmt: skip
        with _kept(model, losses, run / FINISHED):
            publish(config, model, tokenizer, out, history=history, val=splits.val)
        if config.merge:
            export_merged(out, out / MERGED, base=config.model, revision=config.revision)
        if config.push is not None:
            _say(f"uploaded to {upload(out, config.push, without=RUN)}")
        _say(f'wrote {out}; try: selfdoubt ask --adapter {out} "..."')
    driver.strategy.barrier()
    return out


def _check_folder(config: TrainConfig, out: Path, last: Path) -> None:
    try:
        is_file = out.exists() and not out.is_dir()
    except (OSError, ValueError) as error:
        raise ConfigError(f"out={config.out!r} cannot be a folder's name ({error}); give another") from None
    if is_file or not config.out:
        raise ConfigError(f"out={config.out!r} is {'a file' if is_file else 'empty'}; give a folder")
    if config.resume and not last.exists():
        raise ConfigError(f"resume goes on from {last}, which is not there; train without --resume first")
    if not config.resume and _is_first():
        # What an earlier run left would be mixed with this one's; encoded data are named by what they are.
        for old in (out / RUN).glob("*"):
            if old.is_dir() and old.name != DATA:
                shutil.rmtree(old)
            elif old.is_file():
                old.unlink()


def _is_first() -> bool:
    """Return whether this process is the one that writes."""
    return bool(getattr(rank_zero_only, "rank", 0) == 0)


@contextmanager
def _kept(model: nn.Module, losses: list[float], path: Path) -> Iterator[None]:
    """Keep a finished run's weights in a file until its adapter is written.

    Raises:
        SelfdoubtError: If it could not be written; says how to make it from the file.
    """
    trained = {f"model.{name}": p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}
    torch.save({"state_dict": trained, "train_losses": losses}, path)
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SelfdoubtError(
            f"the run is finished, and its adapter could not be written ({why}); make it from the trained weights: "
            f"selfdoubt export {path} NEW_FOLDER --checkpoint"
        ) from error
    path.unlink()


def _load_best_weights(
    driver: lightning.Trainer, module: RiskAwareModule, data: InstructionData, *, weights_only: bool
) -> Mapping[str, float]:
    """Load the weights with the lowest validation loss into the module, and return their loss and accuracy."""
    last = driver.validate(module, data, verbose=False)[0]
    saved = next((c for c in driver.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor), None)
    if saved is None or saved.best_model_score is None or not float(saved.best_model_score) < last["val/loss"]:
        return last
    return driver.validate(module, data, ckpt_path=saved.best_model_path, verbose=False, weights_only=weights_only)[0]


def _whole(config: TrainConfig, module: RiskAwareModule) -> nn.Module:
    """Return the trained model on this device alone: where it was sharded, a fresh one with the trained weights."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not any(isinstance(p, DTensor) for p in trained.values()):
        return module.model
    state = {name: cast(DTensor, p).full_tensor().detach().cpu() for name, p in trained.items()}
    model, _ = build_model(config)
    load_trained_state(model, state, Path(config.out))
    return model


def _summarize(module: RiskAwareModule, splits: Splits) -> str:
    config = module.config
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in module.parameters())
    notes = [f"{splits.empty} left out, having no response within the length"] if splits.empty else []
    notes += [f"{splits.cut} cut to {config.max_length}"] if splits.cut else []
    return (
        f"{config.method} on {config.model}: {trained:,} of {everything:,} parameters train; "
        f"{len(splits.train):,} examples to learn from, {len(splits.val):,} to validate"
        + (f" ({', '.join(notes)})" if notes else "")
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence Lightning's advice, which does not apply: the code says what is done otherwise, and why."""
    log = logging.getLogger("lightning.pytorch")
    before = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for message in _ADVICE:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            log.setLevel(before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
