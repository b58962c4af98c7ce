"""Exports an adapter for other tools: one PEFT folder per voter, or a whole model with LoRA merged into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfdoubt import storage
from selfdoubt.errors import ConfigError, WrapError
from selfdoubt.lm.adapters import lora, peft_config, voters
from selfdoubt.lm.adapters.adapter import AdapterFolder, check_adapter, save_adapter
from selfdoubt.lm.adapters.new_folder import new_folder
from selfdoubt.lm.load import load_model, resolve_model
from selfdoubt.members import Wrapped
from selfdoubt.rows import list_added_names

ADAPTER = "adapter"


def export_peft(
    source: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[Path]:
    """Write ordinary PEFT adapters: ``voter-0``, ``voter-1``, ... for voters; for LoRA its two files alone.

    ``PeftModel.from_pretrained(base, out / "voter-0")`` then gives exactly the logits of the first voter. What no PEFT
    adapter can hold is left out: the scale branch of a sculpt, and the noise of sample around LoRA.

    Args:
        source: A wrapped model, or an adapter folder; of a folder's base model only the config is read.
        out: Folder to write: missing, empty, or exported before.
        base: Name or folder of the base model; None takes what the model or the folder says.
        revision: Revision of the base model.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The PEFT folders.

    Raises:
        WrapError: If there are no voters and no LoRA, or LoRA cannot hold a deviation.
        LoadError: If the folder or the base model's config cannot be read.
        ConfigError: If ``out`` holds something else, or the base is unknown.
        MissingExtraError: If PEFT is not installed.

    Warns:
        UserWarning: If deviations are full: each voter is then as large as the layers it changes.
    """
    is_folder = not isinstance(source, nn.Module)
    sources = (source,) if is_folder else ()
    with new_folder(out, {"kind": "peft"}, sources) as new:  # type: ignore[arg-type]
        if isinstance(source, nn.Module):
            exported = voters.read_voters(source, base)
        else:
            folder = Path(source)
            checked = check_adapter(folder)
            _check_weights(checked)
            if checked.has_lora and not checked.has_voters:
                for file in (peft_config.WEIGHTS, peft_config.CONFIG):
                    shutil.copyfile(folder / file, new / file)
                return [Path(out)]
            exported = voters.load_voters(checked, base=base, revision=revision, trust_remote_code=trust_remote_code)
        written = voters.write_voters(exported, new)
    return [Path(out) / folder.name for folder in written]


def export_merged(
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    name: str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a whole model folder with an adapter's LoRA merged into it, and its tokenizer.

    Where the adapter has a wrapper or knows reference answers, ``out / "adapter"`` is the adapter of the merged model:
    ``RiskAwareLM.load(out, adapter=out / "adapter")`` answers as before, but for rounding.

    Args:
        adapter: An adapter folder with LoRA, or a folder of plain PEFT.
        out: Folder to write: missing, empty, or exported before.
        base: Name or folder of the base model; None takes the one that the folder names.
        name: Name of the merged model in the manifest of its adapter; None takes ``out``.
        dtype: The weights' type; "auto" takes the checkpoint's own.
        revision: Revision of the base model.
        trust_remote_code: Run code that comes with the model.

    Returns:
        ``out``.

    Raises:
        WrapError: If the adapter has no LoRA, or it cannot be merged.
        LoadError: If the folder or the base model cannot be read.
        ConfigError: If ``out`` holds something else, the base is unknown, or the wrapper picked layers of LoRA itself.
    """
    folder, out = Path(adapter), Path(out)
    source = check_adapter(folder)
    _check_weights(source)
    if not source.has_lora:
        raise WrapError(f"{folder} has no LoRA to merge; voters become PEFT adapters instead: selfdoubt export --peft")
    manifest = source.manifest or {"wrappers": []}
    base, revision = source.choose_base(base, revision)
    with new_folder(out, {"kind": "merged", "base": base}, (folder, resolve_model(base))) as new:
        model, tokenizer = load_model(
            base, tokenizer=source.tokenizer, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
        )
        merged = _merged(source.apply(model), model, folder, manifest)
        model.save_pretrained(new)  # type: ignore[operator]
        tokenizer.save_pretrained(new)
        made_again = {"format", "wrappers", "base", "versions", "lora", "checksums"}
        extra = {key: value for key, value in manifest.items() if key not in made_again}
        if isinstance(merged, Wrapped) or storage.LEARNT & set(extra):
            save_adapter(merged, new / ADAPTER, base=name or str(out), extra=extra)
    return out


def _check_weights(adapter: AdapterFolder) -> None:
    """Raise ``WrapError`` if an adapter adds no weights to its base."""
    if not adapter.has_weights:
        raise WrapError(
            f"{adapter.path} adds no weights to its base model, only statistics, reference answers or a calibration, "
            "so there is nothing to export; other tools can use the base model as it is"
        )


def _merged(wrapped: nn.Module, model: nn.Module, folder: Path, manifest: Mapping[str, Any]) -> nn.Module:
    """Merge LoRA into the model that ``wrapped`` shares its weights with, and wrap that as before."""
    added = {name: wrapped.state_dict()[name] for name in list_added_names(wrapped)}
    lora.merge_lora(model)
    again = storage.rewrap(folder, manifest, model)
    if set(list_added_names(again)) != set(added):
        other = sorted(set(added) ^ set(list_added_names(again)))[0]
        raise ConfigError(
            f"the param_filter of {folder} picks other layers once LoRA is merged (as {other} shows), so it would mean "
            "something else; train with a filter on layer names, e.g. 'q_proj|v_proj'"
        )
    again.load_state_dict(added, strict=False)
    return again
