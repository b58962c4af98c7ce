"""The settings of a training run. Every field is a flag of ``selfdoubt train`` and a key of its ``--config`` file."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from selfdoubt.errors import ConfigError
from selfdoubt.setting import setting
from selfdoubt.train.wrapper_settings import build_wrapper, choose_wrapper, to_toml_value, wrapper_to_toml

if TYPE_CHECKING:
    from selfdoubt import sample, sculpt, vote

    WrapperSettings: TypeAlias = vote.Wrapper | sample.Wrapper | sculpt.Wrapper
else:  # torch is imported where a config is made, not where the flags are listed
    WrapperSettings = Any


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run: model, wrapper, data, optimiser, devices. Defaults are those of the published tutorial.

    Args:
        wrapper: The wrapper to train: ``vote.Wrapper`` trains its voters; ``sample.Wrapper`` and ``sculpt.Wrapper``
            train with LoRA beneath them; None, the default, trains LoRA alone: on real
            models voters at equal cost made neither answers nor a head of ``p_correct`` better.

    The help texts of the other fields are those of their flags.

    Raises:
        ConfigError: If a setting is out of range, or two contradict each other.
    """

    data: str = setting(MISSING, "A JSON, JSONL, CSV, TSV or Parquet file, or a data set's name on the hub.")
    out: str = setting(MISSING, "The adapter folder to write.")
    model: str = setting(
        "pocket", "A model folder, a GGUF file (org/name:file.gguf for one on the hub), a hub name, or 'pocket'."
    )
    wrapper: WrapperSettings | None = None

    voter_batch: Literal["split", "repeat"] = setting(
        "split",
        "vote: split a batch, so that each voter learns from its own share and a step costs one pass, or repeat it for "
        "every voter.",
    )
    sculpt_loss: Literal["draws", "closed"] = setting(
        "closed", "sculpt: learn from draws of the logits, or from their closed expectation."
    )
    draws: int = setting(4, "sculpt: draws per token, where it learns from draws.")
    lora_r: int = setting(64, "sample, sculpt, none: rank of LoRA.")
    lora_alpha: float = setting(64.0, "LoRA's scale, divided by its rank.")
    lora_dropout: float = setting(0.0, "LoRA's dropout.")
    lora_targets: str | None = setting(None, "Regex of LoRA's layers; left out, all linear layers but the head.")

    prompt: Literal["auto", "chat", "alpaca"] = setting(
        "auto", "The model's chat template, the Alpaca prompt, or the template where there is one."
    )
    loss_on: Literal["response", "all"] = setting("response", "Tokens that count in the loss.")
    max_length: int = setting(400, "Longest example in tokens; longer ones are cut at their end.")
    pack: bool = setting(False, "Put several short examples into one row, with borders that attention respects.")
    val_share: float = setting(0.02, "Share of the examples for validation and reference quantiles.")
    question_column: str | None = setting(None, "Column of the question, where its name does not say it.")
    answer_column: str | None = setting(None, "Column of the answer to learn, where its name does not say it.")
    answers_name: Literal["text", "index", "label", "letter"] | None = setting(
        None, "Form in which an answer names a choice, where it could mean two: text, index, label or letter."
    )
    limit: int | None = setting(None, "Use only this many examples, the first ones.")
    workers: int = setting(0, "Processes that read data.")

    epochs: int = setting(5, "Number of passes over the data.")
    max_steps: int | None = setting(None, "Largest number of steps.")
    batch_size: int = setting(12, "Rows of a step on one device.")
    accumulate: int = setting(1, "Batches whose gradients are added before a step.")
    lr: float = setting(2e-4, "Highest learning rate.")
    schedule: Literal["constant", "cosine"] = setting("constant", "Schedule of the learning rate after warm-up.")
    warmup: int = setting(0, "Steps of warm-up, in which the learning rate rises.")
    optimizer: Literal["adamw", "adamw8bit"] = setting("adamw", "adamw8bit keeps its state in 8 bits.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    clip: float = setting(1.0, "Largest norm of a gradient; 0 for no limit.")
    val_every: float = setting(0.25, "Share of an epoch between two validations.")
    patience: int | None = setting(None, "End when this many validations brought no better loss.")

    precision: Literal["bf16-mixed", "32-true", "bf16-true"] = setting("bf16-mixed", "Lightning's precision.")
    dtype: str = setting("auto", "Type of the base's weights; auto takes the checkpoint's own.")
    quantize: Literal["nf4"] | None = setting(None, "nf4 keeps the frozen base in 4 bits.")
    checkpointing: bool = setting(False, "Compute activations again in the backward pass: slower and smaller.")
    strategy: Literal["auto", "ddp", "ddp_notebook", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"] = setting(
        "auto", "Strategy for several devices; auto takes ddp."
    )
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", "Kind of device to train on.")
    devices: int = setting(1, "Devices, or processes on a CPU; 0 takes all.")
    nodes: int = setting(1, "Machines.")

    loggers: str = setting("csv", "csv, tensorboard, wandb or none; several with commas.")
    resume: bool = setting(False, "Resume from the last checkpoint in the folder.")
    checkpoint_every: int = setting(200, "Steps between two checkpoints to resume from.")
    reference: int = setting(100, "Validation questions that the result answers for its percentiles; 0 for none.")
    reference_tokens: int = setting(64, "Most tokens of a reference answer.")
    push: str | None = setting(None, "Upload the result to the hub under this name.")
    merge: bool = setting(False, "sample, sculpt, none: also write the base with LoRA merged into it.")
    progress: bool = setting(True, "Show a progress bar.")
    seed: int = setting(0, "Same seed, same voters, batches and losses.")
    revision: str | None = setting(None, "The model's branch, tag or commit on the hub.")
    trust_remote_code: bool = setting(False, "Run code that comes with the model.")

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.name != "wrapper":
                _check_type(each.name, getattr(self, each.name))
        _check_wrapper(self.wrapper)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.lr < 1:
            raise ConfigError(f"lr must be between 0 and 1, got {self.lr}; try 2e-4")
        if not 0 <= self.val_share < 1:
            raise ConfigError(f"val_share must be at least 0 and below 1, got {self.val_share}; try 0.02")
        if not 0 < self.val_every <= 1:
            raise ConfigError(f"val_every is a share of an epoch, above 0 and at most 1, got {self.val_every}")
        if self.batch_size % self.groups:
            near = -(-self.batch_size // self.groups) * self.groups
            raise ConfigError(
                f"each of {self.groups} voters learns from its own share of a batch, and batch_size="
                f"{self.batch_size} does not divide; use batch_size={near}, or voter_batch='repeat'"
            )
        if self.quantize and self.method == "vote" and not getattr(self.wrapper, "rank", None):
            raise ConfigError("4-bit weights cannot take full deviations; use a rank, e.g. rank=16")
        if self.loss_on == "all" and getattr(self.wrapper, "start", "prompt") == "answer":
            raise ConfigError(
                "voters with start='answer' do not read prompts, and loss_on='all' would train them on prompts; use "
                "loss_on='response'"
            )
        if self.merge and self.method == "vote":
            raise ConfigError(
                "voters cannot be merged into one model; export an adapter of each: selfdoubt export --peft"
            )
        if self.merge and self.quantize:
            raise ConfigError(
                "LoRA cannot be merged into 4-bit weights; train without quantize, or merge later: selfdoubt export"
            )
        if self.quantize and self.strategy in ("fsdp", "deepspeed_stage_3"):
            raise ConfigError(f"4-bit weights cannot be sharded by {self.strategy}; use strategy='ddp'")
        unknown = set(self.logger_names()) - {"csv", "tensorboard", "wandb"}
        if unknown:
            raise ConfigError(f"loggers must be csv, tensorboard, wandb or none, got {', '.join(sorted(unknown))}")

    @property
    def method(self) -> str:
        """The wrapper's name: "vote", "sample", "sculpt" or "none"."""
        return "none" if self.wrapper is None else type(self.wrapper).__module__.rpartition(".")[2]

    @property
    def voters_per_row(self) -> int:
        """Voters that read each row of a training batch: all of them if the batch is repeated, else one."""
        return int(getattr(self.wrapper, "n_voters", 1)) if self.voter_batch == "repeat" else 1

    @property
    def groups(self) -> int:
        """Groups of rows that a training batch is split into, one per voter."""
        return int(getattr(self.wrapper, "n_voters", 1)) // self.voters_per_row

    def logger_names(self) -> tuple[str, ...]:
        """Return the loggers, one by one."""
        return tuple(name for item in self.loggers.split(",") if (name := item.strip()) not in ("", "none"))

    def to_json(self) -> dict[str, Any]:
        """Return plain data; the wrapper as the manifest of an adapter holds it."""
        from selfdoubt.manifest import to_json

        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return values | {"wrapper": None if self.wrapper is None else to_json(self.wrapper)}

    def to_toml(self) -> str:
        """Return the settings as TOML, as ``load_config`` reads them; settings that are None are left out."""
        values = {name: value for name, value in self.to_json().items() if value is not None}
        table = values.pop("wrapper", None)
        lines = [] if table else ['wrapper = "none"']
        lines += [f"{name} = {to_toml_value(value)}" for name, value in values.items()]
        return "\n".join(lines) + "\n" + (wrapper_to_toml(table) if table else "")


#: Least values of numbers.
_AT_LEAST = {
    "draws": 1, "lora_r": 1, "epochs": 1, "batch_size": 1, "accumulate": 1, "nodes": 1, "max_length": 8,
    "checkpoint_every": 1, "workers": 0, "warmup": 0, "devices": 0, "clip": 0, "weight_decay": 0, "limit": 2,
    "reference": 0, "reference_tokens": 1, "max_steps": 1, "patience": 1,
}  # fmt: skip


def load_config(path: str | Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """Read a config from a TOML file and flags; a flag wins.

    Args:
        path: The file; it may also be one that an earlier version wrote, with the wrapper's settings among the others.
        flags: Values by name: fields of ``TrainConfig`` and of ``WrapperFlags``.

    Raises:
        ConfigError: If the file cannot be read, or a key is unknown or missing.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"--config {path} cannot be read: {error}; see docs/train.md for an example") from None
    flags = dict(flags)
    seed = flags.get("seed", values.get("seed", 0))
    wrapper = choose_wrapper(values, flags, seed=seed)
    if "voters_see" in values:  # the name in files of an earlier version
        values.setdefault("voter_batch", {"own": "split", "all": "repeat"}.get(values.pop("voters_see")))
    values |= flags
    known = {f.name: f for f in fields(TrainConfig)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{path} has the key {name!r}, and the keys are {', '.join(known)}")
    missing = [name for name, f in known.items() if _is_required(f) and name not in values]
    if missing:
        raise ConfigError(f"training needs {' and '.join(missing)}: give --{missing[0]}, or put it into --config")
    for name, value in values.items():
        _check_type(name, value)
    return TrainConfig(**values, wrapper=build_wrapper(wrapper))


def _is_required(each: Any) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _check_wrapper(wrapper: Any) -> None:
    """Check that a wrapper is one of the three, and one that training takes.

    Raises:
        ConfigError: If it is not.
    """
    if wrapper is None:
        return
    from selfdoubt import sample, sculpt, vote

    if not isinstance(wrapper, (vote.Wrapper, sample.Wrapper, sculpt.Wrapper)):
        raise ConfigError(
            f"wrapper must be vote.Wrapper(...), sample.Wrapper(...), sculpt.Wrapper(...) or None, got {wrapper!r}"
        )
    if wrapper.compile:
        raise ConfigError("training runs a model's trunk and head apart, not as one graph; leave compile out")


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def _check_type(name: str, value: Any) -> None:
    """Check one value: a config file may hold anything.

    Raises:
        ConfigError: If it is of another type than the field, or none of its choices.
    """
    kind = _types()[name]
    options = get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)
    for option in options:
        if get_origin(option) is Literal and value in get_args(option):
            return
        if option is NoneType and value is None:
            return
        if option is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return
        if option in (int, bool, str) and type(value) is option:
            return
    expected = " or ".join(
        ", ".join(map(repr, get_args(o))) if get_origin(o) is Literal else "nothing" if o is NoneType else o.__name__
        for o in options
    )
    raise ConfigError(f"{name} must be {expected}, got {value!r}")
