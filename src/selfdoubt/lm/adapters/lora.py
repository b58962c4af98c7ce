"""Adds, saves, loads and merges LoRA through PEFT; the model keeps its class, and the files are PEFT's own.

Two files, ``adapter_config.json`` and ``adapter_model.safetensors``, hold it. PEFT alone, and what reads PEFT, loads
them. Everything here also works on a wrapped model, whose LoRA layers lie inside replaced leaves.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialize
from torch import nn

from selfdoubt import compat, storage, targets
from selfdoubt.errors import BaseMismatchError, ConfigError, TargetError, WrapError, require
from selfdoubt.fields import build_broken_file_error
from selfdoubt.lm.adapters.peft_config import CONFIG, WEIGHTS, check_ranks, read_config
from selfdoubt.wrapping import get_base_name, get_source, innermost

_NAME = "default"


def add_lora(
    model: nn.Module, *, r: int = 64, alpha: float = 64.0, dropout: float = 0.0, targets: str | None = None
) -> nn.Module:
    """Put fresh LoRA into a model's layers, in place; afterwards only LoRA trains, and outputs are as before.

    In half precision LoRA keeps float32 weights, as in plain PEFT.

    Args:
        model: A Hugging Face model that is not wrapped yet; its linear layers may be packed by bitsandbytes.
        r: Rank, at least 1.
        alpha: LoRA's scale times its rank.
        dropout: Dropout of LoRA's input while training, in [0, 1).
        targets: A regex over full parameter names. None: all linear layers but the output head.

    Returns:
        The model itself.

    Raises:
        ConfigError: If a setting is out of range, or the model has LoRA already.
        TargetError: If the regex hits nothing; names the nearest parameters.
        WrapError: If the regex hits layers that are neither linear nor embeddings.
        MissingExtraError: If PEFT is not installed.
    """
    if r < 1:
        raise ConfigError(f"LoRA's rank must be at least 1, got {r}; try r=64")
    if not 0 <= dropout < 1:
        raise ConfigError(f"LoRA's dropout must be at least 0 and below 1, got {dropout}; try dropout=0")
    peft = require("peft", "train")
    names = _layers(model, targets)
    config = peft.LoraConfig(
        r=r, lora_alpha=int(alpha) if alpha == int(alpha) else alpha, lora_dropout=dropout,
        target_modules=shorten_names(names, [name for name, _ in model.named_modules()]), task_type="CAUSAL_LM",
        fan_in_fan_out=any(compat.is_transposed(model.get_submodule(name)) for name in names),
    )  # fmt: skip
    _inject(model, config)
    return model


def save_lora(model: nn.Module, folder: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Write a model's LoRA as plain PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        model: A model with LoRA, wrapped or not.
        folder: Folder to write, made if missing; LoRA in it is replaced.
        base: Name or folder of the base model; taken from the model's config if None.

    Returns:
        The folder.

    Raises:
        ConfigError: If the model has no LoRA.
    """
    inner = innermost(model)
    names = list_lora_names(inner)
    if not names:
        raise ConfigError("the model has no LoRA to save; put some in with add_lora(model, r=64)")
    peft = require("peft", "train")
    state = {name: tensor for name, tensor in inner.state_dict().items() if name in names}
    tensors = peft.get_peft_model_state_dict(inner, state, adapter_name=_NAME, save_embedding_layers=False)
    config = inner.peft_config[_NAME].to_dict() | {  # type: ignore[union-attr, index]
        "inference_mode": True,
        "base_model_name_or_path": base or get_source(inner),
    }
    write_peft(
        folder, config, {f"base_model.model.{get_base_name(inner, name)}": tensor for name, tensor in tensors.items()}
    )
    return Path(folder)


def load_lora(model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False) -> nn.Module:
    """Put the LoRA of a folder, ours or plain PEFT's, into a model, in place.

    Args:
        model: The base model, not wrapped yet.
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        trainable: True lets LoRA train further.

    Returns:
        The model itself.

    Raises:
        LoadError: If a file is missing or broken, or is another adapter than LoRA.
        BaseMismatchError: If it was made for a model of other names or shapes; the model must then be loaded again.
        ConfigError: If the model has LoRA already.
        MissingExtraError: If PEFT is not installed.
    """
    folder = Path(folder)
    settings = read_config(folder)
    peft = require("peft", "train")
    tensors = storage.read_tensors(folder / WEIGHTS)
    check_ranks(folder, settings, tensors)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # settings of newer versions; below is an error where they matter
            config = peft.LoraConfig.from_pretrained(str(folder))
    except Exception as error:
        raise build_broken_file_error(folder / CONFIG, error) from error
    config.inference_mode = not trainable
    base = config.base_model_name_or_path
    try:
        _inject(model, config)
        result = peft.set_peft_model_state_dict(model, tensors, adapter_name=_NAME)
    except ConfigError:
        raise
    except Exception as error:
        raise _other_base(folder, base, " ".join(str(error).split())[:300]) from error
    lacking = sorted(list_lora_names(model) & set(result.missing_keys))
    if lacking or result.unexpected_keys:
        what = f"lacks {lacking[0]}" if lacking else f"has {result.unexpected_keys[0]}, which the model lacks"
        raise _other_base(folder, base, f"it {what}")
    return model


def has_lora(folder: str | os.PathLike[str]) -> bool:
    """Return True if a folder holds an adapter of PEFT."""
    return (Path(folder) / CONFIG).is_file()


def list_lora_names(model: nn.Module) -> set[str]:
    """Return the names in ``model.state_dict()`` that belong to LoRA, wrapped or not."""
    layers = [name for name, _ in compat.list_lora_layers(model)]
    inside = {name for name in model.state_dict() if any(name.startswith(f"{layer}.") for layer in layers)}
    return {name for name in inside if not compat.is_beneath_adapter(name)}


def leave_casts_to_autocast(model: nn.Module, *, active: bool) -> None:
    """Leave the dtype of LoRA's input to autocast if ``active``; else LoRA casts it to its own weights' dtype.

    Without this a float32 copy of every layer's input is made, and kept for the backward pass.
    """
    for _, layer in compat.list_lora_layers(model):
        layer.cast_input_dtype_enabled = not active


def merge_lora(model: nn.Module) -> nn.Module:
    """Fold LoRA into the weights beneath it and take it away, in place; a wrapped model shares those weights.

    Returns:
        The model itself.

    Raises:
        ConfigError: If the model has no LoRA.
        WrapError: If a weight is packed, or tied to another, or the sum is not finite; then nothing was merged,
            except for a sum.
    """
    check_mergeable(model)
    for path, layer in list(compat.list_lora_layers(model)):
        try:
            layer.merge(safe_merge=True)
        except (ValueError, RuntimeError) as error:
            name = get_base_name(model, path)
            raise WrapError(f"LoRA of {name} cannot be merged ({error}); train or download it again") from error
        targets.replace_module(model, path, layer.get_base_layer())
    inner = innermost(model)
    if hasattr(inner, "peft_config"):
        del inner.peft_config
    return model


def check_mergeable(model: nn.Module) -> None:
    """Check that LoRA can be merged, as far as that shows before its numbers are known.

    Raises:
        ConfigError: If the model has no LoRA.
        WrapError: If a weight is packed, or tied to another.
    """
    layers = list(compat.list_lora_layers(model))
    if not layers:
        raise ConfigError("the model has no LoRA to merge; load it together with its adapter folder")
    tied = _tied(model)
    for path, layer in layers:
        name, base = get_base_name(model, path), layer.get_base_layer()
        if compat.is_quantized(base):
            raise WrapError(
                f"LoRA cannot be merged into the packed weights of {name} ({type(base).__name__}): load the base "
                "without quantize, e.g. dtype='bfloat16', and merge there"
            )
        if id(base.weight) in tied:
            raise WrapError(
                f"the weight of {name} is tied to another layer's, and merging LoRA would change both: leave it "
                "unmerged, or train without LoRA in it"
            )


def write_peft(folder: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, Any]) -> None:
    """Write PEFT's two files, each whole or not at all, the config last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"
    remove_lora(folder)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    storage.write_file(folder / WEIGHTS, serialize(whole, metadata={"format": "pt"}))
    storage.write_file(folder / CONFIG, text.encode())


def remove_lora(folder: Path) -> None:
    """Take PEFT's files out of a folder, the config first."""
    (folder / CONFIG).unlink(missing_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)


def shorten_names(names: Collection[str], among: Iterable[str]) -> list[str]:
    """Return the last parts of layers' names, as in PEFT's files, if they pick the same layers; else the full names."""
    short = {name.rpartition(".")[2] for name in names}
    everywhere = {name for name in among if name.rpartition(".")[2] in short}
    return sorted(short if everywhere == set(names) else names)


def _layers(model: nn.Module, regex: str | None) -> list[str]:
    """Return the names of the layers that get LoRA."""
    if regex is None:
        head = compat.get_output_head(model)
        return [name for name, m in model.named_modules() if _is_linear(m) and m is not head]
    try:
        leaves = targets.find_leaves(model, regex)
    except TargetError as error:
        raise TargetError(
            str(error).replace("param_filter=", "LoRA's targets=", 1).replace("param_filter", "targets")
        ) from None
    for leaf in leaves:
        if not (_is_linear(leaf.module) or isinstance(leaf.module, nn.Embedding)):
            raise WrapError(
                f"LoRA goes into linear and embedding layers, and {leaf.name} is {type(leaf.module).__name__}; "
                "narrow the regex, e.g. targets='q_proj|v_proj'"
            )
    return [leaf.name for leaf in leaves]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or compat.is_transposed(module)


def _inject(model: nn.Module, config: Any) -> None:
    """Put PEFT's layers into the model, their weights in float32 where the model's are shorter."""
    peft = require("peft", "train")
    if hasattr(model, "peft_config") or any(True for _ in compat.list_lora_layers(model)):
        raise ConfigError("the model has LoRA already: merge it first with merge_lora(model), or load a fresh model")
    with _quietly():
        peft.inject_adapter_in_model(config, model, adapter_name=_NAME)
        require("peft.tuners.tuners_utils", "train").cast_adapter_dtype(model, _NAME)


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out")  # it is set right where it is wrong
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # merging tied weights is refused
        yield


def _tied(model: nn.Module) -> set[int]:
    """Return the ids of parameters that have more than one owner."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}


def _other_base(folder: Path, base: str | None, why: str) -> BaseMismatchError:
    return BaseMismatchError(f"the LoRA in {folder} was made for another base model than this ({base}): {why}")
