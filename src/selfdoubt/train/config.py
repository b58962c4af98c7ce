"""One typed recipe. Every field is a flag of ``selfdoubt train`` and a key of its ``--config`` file."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from selfdoubt.errors import ConfigError


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how. The defaults are those of the published tutorial where it has one.

    Raises:
        ConfigError: If a setting is out of range.
    """

    data: str = field(metadata={"help": "A JSON, JSONL, CSV, TSV or Parquet file, or a data set's name on the hub."})
    out: str = field(metadata={"help": "The adapter folder to write."})
    model: str = _setting("pocket", "A model folder, a hub name, or 'pocket'.")
    wrapper: Literal["vote", "sample", "sculpt", "none"] = _setting(
        "vote", "What learns: voters; LoRA with sampling noise, with a scale branch, or alone (none)."
    )

    n_voters: int = _setting(3, "vote: number of voters.")
    rank: int | None = _setting(16, "vote: rank of a deviation; 0 for full ones.")
    weight_noise: float = _setting(0.2, "vote: initial size of a deviation, relative to the weights.")
    alpha: float = _setting(1.0, "vote: scale of the deviations.")
    param_filter: str | None = _setting(
        None, "vote, sample: regex over parameter names; left out, query and value projections."
    )
    voters_see: Literal["own", "all"] = _setting(
        "own", "vote: each voter learns from its own share of a batch (a step costs one pass), or all from everything."
    )
    n_samples: int = _setting(5, "sample: passes at evaluation.")
    noise: float = _setting(0.1, "sample: probability of dropping a feature.")
    n_layers: int = _setting(2, "sculpt: layers of the scale branch.")
    sculpt_loss: Literal["draws", "closed"] = _setting(
        "closed", "sculpt: learn from draws of the logits, or from their closed expectation."
    )
    draws: int = _setting(4, "sculpt: draws a token, where it learns from draws.")
    lora_r: int = _setting(64, "sample, sculpt, none: rank of LoRA.")
    lora_alpha: float = _setting(64.0, "LoRA's scale, divided by its rank.")
    lora_dropout: float = _setting(0.0, "LoRA's dropout.")
    lora_targets: str | None = _setting(None, "Regex of LoRA's layers; left out, all linear layers but the head.")

    prompt: Literal["auto", "chat", "alpaca"] = _setting(
        "auto", "The model's chat template, the Alpaca prompt, or the template where there is one."
    )
    loss_on: Literal["response", "all"] = _setting("response", "Which tokens count.")
    max_length: int = _setting(400, "Longest example in tokens; longer ones are cut at their end.")
    pack: bool = _setting(False, "Put several short examples into one row, with borders that attention respects.")
    val_share: float = _setting(0.02, "Share of the examples for validation and reference quantiles.")
    question_column: str | None = _setting(None, "Column of the question, where its name does not say it.")
    answer_column: str | None = _setting(None, "Column of the answer to learn, where its name does not say it.")
    answers_name: Literal["text", "index", "label", "letter"] | None = _setting(
        None, "How an answer names one of the choices, where it could mean two: text, index, label or letter."
    )
    limit: int | None = _setting(None, "Use only the first so many examples.")
    workers: int = _setting(0, "Processes that read data.")

    epochs: int = _setting(5, "Times through the data.")
    max_steps: int | None = _setting(None, "End after so many steps.")
    batch_size: int = _setting(12, "Rows of a step on one device.")
    accumulate: int = _setting(1, "Batches whose gradients are added before a step.")
    lr: float = _setting(2e-4, "Highest learning rate.")
    schedule: Literal["constant", "cosine"] = _setting("constant", "How the rate falls.")
    warmup: int = _setting(0, "Steps in which the rate rises.")
    optimizer: Literal["adamw", "adamw8bit"] = _setting("adamw", "adamw8bit keeps its state in 8 bits.")
    weight_decay: float = _setting(0.0, "AdamW's weight decay.")
    clip: float = _setting(1.0, "Largest norm of a gradient; 0 for no limit.")
    val_every: float = _setting(0.25, "Share of an epoch between two validations.")
    patience: int | None = _setting(None, "End when so many validations brought no better loss.")

    precision: Literal["bf16-mixed", "32-true", "bf16-true"] = _setting("bf16-mixed", "Lightning's precision.")
    dtype: str = _setting("auto", "Type of the base's weights; auto takes the checkpoint's own.")
    quantize: Literal["nf4"] | None = _setting(None, "nf4 keeps the frozen base in 4 bits.")
    checkpointing: bool = _setting(False, "Compute activations again in the backward pass: slower and smaller.")
    strategy: Literal["auto", "ddp", "ddp_notebook", "fsdp", "deepspeed_stage_2", "deepspeed_stage_3"] = _setting(
        "auto", "How several devices share the work; auto takes ddp."
    )
    accelerator: Literal["auto", "cpu", "gpu"] = _setting("auto", "What to train on.")
    devices: int = _setting(1, "Devices, or processes on a CPU; 0 takes all.")
    nodes: int = _setting(1, "Machines.")

    loggers: str = _setting("csv", "csv, tensorboard, wandb or none; several with commas.")
    resume: bool = _setting(False, "Go on from the last checkpoint in the folder.")
    checkpoint_every: int = _setting(200, "Steps between two checkpoints to resume from.")
    reference: int = _setting(100, "Validation questions that the result answers for its percentiles; 0 for none.")
    reference_tokens: int = _setting(64, "Most tokens of a reference answer.")
    push: str | None = _setting(None, "Upload the result to the hub under this name.")
    merge: bool = _setting(False, "sample, sculpt, none: also write the base with LoRA merged into it.")
    progress: bool = _setting(True, "Show a progress bar.")
    seed: int = _setting(0, "Same seed, same voters, batches and losses.")
    revision: str | None = _setting(None, "The model's branch, tag or commit on the hub.")
    trust_remote_code: bool = _setting(False, "Run code that comes with the model.")

    def __post_init__(self) -> None:
        for setting in fields(self):
            _check_type(setting.name, getattr(self, setting.name))
        at_least = {
            "n_voters": 1, "n_samples": 1, "n_layers": 1, "draws": 1, "lora_r": 1, "epochs": 1, "batch_size": 1,
            "accumulate": 1, "nodes": 1, "max_length": 8, "checkpoint_every": 1,
            "rank": 0, "workers": 0, "warmup": 0, "devices": 0, "clip": 0, "weight_decay": 0, "weight_noise": 0,
            "limit": 2, "reference": 0, "reference_tokens": 1, "max_steps": 1, "patience": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.lr < 1:
            raise ConfigError(f"lr must be between 0 and 1, got {self.lr}; try 2e-4")
        if not 0 <= self.val_share < 1:
            raise ConfigError(f"val_share must be at least 0 and below 1, got {self.val_share}; try 0.02")
        if not 0 < self.val_every <= 1:
            raise ConfigError(f"val_every is a share of an epoch, above 0 and at most 1, got {self.val_every}")
        if self.wrapper == "vote" and self.voters_see == "own" and self.batch_size % self.n_voters:
            near = -(-self.batch_size // self.n_voters) * self.n_voters
            raise ConfigError(
                f"each of {self.n_voters} voters learns from its own share of a batch, and batch_size="
                f"{self.batch_size} does not divide; use batch_size={near}, or voters_see='all'"
            )
        if self.quantize and self.wrapper == "vote" and not self.rank:
            raise ConfigError("4-bit weights cannot take full deviations; use a rank, e.g. rank=16")
        if self.merge and self.wrapper == "vote":
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

    def logger_names(self) -> tuple[str, ...]:
        """The loggers, one by one."""
        return tuple(name for item in self.loggers.split(",") if (name := item.strip()) not in ("", "none"))


def read_config(path: str | Path | None, flags: Mapping[str, Any]) -> TrainConfig:
    """A config from a TOML file and flags; a flag wins.

    Raises:
        ConfigError: If the file cannot be read, or a key is unknown or missing.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"--config {path} cannot be read: {error}; see docs/train.md for an example") from None
    values |= flags
    known = {f.name: f for f in fields(TrainConfig)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{path} has the key {name!r}, and the keys are {', '.join(known)}")
    missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
    if missing:
        raise ConfigError(f"training needs {' and '.join(missing)}: give --{missing[0]}, or put it into --config")
    for name, value in values.items():
        _check_type(name, value)
    return TrainConfig(**values)


def to_toml(config: TrainConfig) -> str:
    """The resolved settings, as ``read_config`` takes them; what is None is left out."""
    lines = []
    for name, value in asdict(config).items():
        if isinstance(value, bool):
            lines.append(f"{name} = {str(value).lower()}")
        elif isinstance(value, str):
            # A TOML basic string escapes as JSON does.
            lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        elif value is not None:
            lines.append(f"{name} = {value!r}")
    return "\n".join(lines) + "\n"


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(TrainConfig)


def _check_type(name: str, value: Any) -> None:
    """A config file may hold anything: a wrong type or choice is said before it is used."""
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
    wanted = " or ".join(
        ", ".join(map(repr, get_args(o))) if get_origin(o) is Literal else "nothing" if o is NoneType else o.__name__
        for o in options
    )
    raise ConfigError(f"{name} must be {wanted}, got {value!r}")
