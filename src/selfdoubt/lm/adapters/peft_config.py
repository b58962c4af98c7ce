"""Reads ``adapter_config.json``, PEFT's settings of LoRA; entries that change its output are checked one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from selfdoubt.errors import LoadError
from selfdoubt.fields import (
    SCALE,
    WIDTH,
    FieldError,
    build_broken_file_error,
    choice,
    either,
    flag,
    listing,
    nonempty,
    number,
    optional,
    read_object,
    record,
    table,
    text,
    whole,
)  # fmt: skip
from selfdoubt.manifest import LORA

CONFIG, WEIGHTS = LORA
_texts = listing(nonempty)
#: Entries that change LoRA's output; other keys are kept, since a newer PEFT may write more.
_CONFIG = record(
    {},
    {
        "base_model_name_or_path": optional(text),
        "r": whole(1, WIDTH),
        "lora_alpha": number(-SCALE, SCALE),
        "lora_dropout": number(0, 1),
        "target_modules": optional(either(text, _texts)),
        "exclude_modules": optional(either(text, _texts)),
        "target_parameters": optional(_texts),
        "layers_to_transform": optional(either(whole(), listing(whole()))),
        "layers_pattern": optional(either(text, _texts)),
        "rank_pattern": optional(table(whole(1, WIDTH))),
        "alpha_pattern": optional(table(number(-SCALE, SCALE))),
        "bias": choice("none", "all", "lora_only"),
        "modules_to_save": optional(_texts),
        **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "use_qalora"), flag),
    },
    open_ended=True,
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``adapter_config.json`` of a folder that also has LoRA's weights.

    Raises:
        LoadError: If a file is missing or broken, or it is another adapter than LoRA.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise LoadError(f"{folder} holds no LoRA: it has no {CONFIG}; give a folder that PEFT or selfdoubt wrote")
    config = read_object(path)
    try:
        kind = nonempty(config.get("peft_type"), "peft_type")
        if kind != "LORA":
            raise LoadError(
                f"{path} is an adapter of type {kind[:60]}, and only LORA can be loaded; merge it into its base with "
                "PEFT"
            )
        checked = _CONFIG(config, "")
    except FieldError as error:
        raise build_broken_file_error(path, error) from None
    if checked.get("modules_to_save") or config.get("trainable_token_indices") or checked.get("bias", "none") != "none":
        raise LoadError(
            f"{path} also trains weights of the base (modules_to_save, trainable_token_indices or bias), "
            "and only LoRA can be loaded; merge it into its base with PEFT, and load that model"
        )
    if not (folder / WEIGHTS).is_file():
        raise LoadError(
            f"{folder} has {CONFIG} and no {WEIGHTS}: download it again (pickled adapter_model.bin is never read: "
            "save it again with a newer PEFT)"
        )
    return config


def check_ranks(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare the ranks of a config with the tensors, before layers of these ranks are made.

    Raises:
        LoadError: If a rank is larger than that of any tensor.
    """
    factors = [t for key, t in tensors.items() if t.ndim and re.search(r"\.lora_(embedding_)?A(\.|$)", key)]
    largest = max((t.shape[0] for t in factors), default=None)
    ranks = {"r": config.get("r", 8)} | {f"rank_pattern.{k}": r for k, r in (config.get("rank_pattern") or {}).items()}
    for key, rank in ranks.items():
        if largest is not None and rank > largest:
            raise build_broken_file_error(
                folder / CONFIG, FieldError(key, f"at most {largest}, as in {WEIGHTS}", str(rank))
            )
