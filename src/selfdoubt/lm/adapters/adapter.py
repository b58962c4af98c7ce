"""An adapter folder of a language model: what its wrappers added and, beneath them, LoRA in PEFT's own files.

::

    selfdoubt.json              wrappers, base and its fingerprint, reference quantiles, checksums; written last
    added.safetensors           what the wrappers added, where they added something
    adapter_config.json         with LoRA: PEFT's files, which PEFT alone loads as well
    adapter_model.safetensors
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from selfdoubt import storage
from selfdoubt.errors import ConfigError, LoadError
from selfdoubt.lm.adapters import lora, peft_config
from selfdoubt.lm.calibration import read_calibration
from selfdoubt.members import Spec


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a whole adapter folder: what wrappers added, and LoRA where the model has it.

    Args:
        model: A wrapped model, with or without LoRA, or a plain one with LoRA.
        folder: Made if missing; an adapter in it is replaced.
        base: Name or folder of the base model; taken from the model's config if None.
        revision: Revision of the base model.
        extra: More entries for ``selfdoubt.json``, e.g. ``{"reference": ...}``.

    Returns:
        The folder.

    Raises:
        WrapError: If the model has neither a wrapper nor LoRA.
    """
    folder = Path(folder)
    names = lora.lora_names(model)
    # Without its manifest a folder is none of ours: it goes before anything changes, and comes last.
    (folder / storage.MANIFEST).unlink(missing_ok=True)
    lora.remove_lora(folder)
    if names:
        lora.save_lora(model, folder, base=base)
        extra = {**(extra or {}), "lora": True}
    return storage.save(model, folder, base=base, revision=revision, extra=extra, elsewhere=names)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], wrapper: Spec | None = None) -> nn.Module:
    """Put an adapter onto its base model: LoRA first, in place, then the wrappers.

    Args:
        model: The base model, without wrapper and LoRA.
        folder: An adapter folder, or one that plain PEFT wrote.
        wrapper: Only for a folder of plain PEFT: what goes around the model with its LoRA.

    Returns:
        The model, wrapped where the folder or ``wrapper`` says so; nothing in it trains but what wrappers added.

    Raises:
        LoadError: If a file is missing or broken.
        BaseMismatchError: If the adapter was made for another model.
        ConfigError: If the folder brings a wrapper and another is given.
    """
    manifest = check_adapter(folder, wrapper)
    if manifest is None or manifest.get("lora"):
        lora.load_lora(model, folder)
        model.requires_grad_(False)
    if manifest is not None:
        return storage.restore(folder, model, manifest)
    return model if wrapper is None else wrapper(model)  # type: ignore[operator]


def read_adapter(folder: str | os.PathLike[str], wrapper: Spec | None = None) -> dict[str, Any] | None:
    """What can be said of an adapter folder before a large model loads: its manifest, or None for plain PEFT's.

    Raises:
        LoadError: If it is not an adapter folder, or a file is missing or broken, its calibration included.
        ConfigError: If it brings a wrapper and another is given.
    """
    folder = Path(folder)
    if lora.has_lora(folder) and not (folder / storage.MANIFEST).exists():
        peft_config.read_config(folder)
        return None
    manifest = storage.read_manifest(folder)
    if wrapper is not None:
        raise ConfigError("an adapter brings its own wrapper: give either adapter=... or wrapper=...")
    if manifest.get("lora"):
        peft_config.read_config(folder)
    elif lora.has_lora(folder):
        raise LoadError(
            f"{folder} has {peft_config.CONFIG}, and its {storage.MANIFEST} knows of no LoRA, so one of them belongs "
            "elsewhere; save both with save_adapter, or remove one"
        )
    try:
        read_calibration(manifest)
    except LoadError as error:
        raise LoadError(f"{folder / storage.MANIFEST}: {error}") from None
    return manifest


def check_adapter(folder: str | os.PathLike[str], wrapper: Spec | None = None) -> dict[str, Any] | None:
    """Read an adapter folder as ``read_adapter`` does, and check that its files are those that were saved.

    Raises:
        LoadError: If a file is missing, broken, or was changed after it was saved.
        ConfigError: If the folder brings a wrapper and another is given.
    """
    manifest = read_adapter(folder, wrapper)
    if manifest is not None:
        storage.verify(folder, manifest)
    return manifest


def base_of(
    folder: str | os.PathLike[str], base: str | None = None, revision: str | None = None
) -> tuple[str, str | None]:
    """Name and revision of an adapter's base model: those given, else those that the folder names.

    Raises:
        LoadError: If it is not an adapter folder.
        ConfigError: If there is no name.
    """
    if base is not None:
        return base, revision
    manifest = read_adapter(folder)
    named = (
        {"name": peft_config.read_config(Path(folder)).get("base_model_name_or_path")}
        if manifest is None
        else manifest["base"]
    )
    if not named["name"]:
        raise ConfigError(f"{folder} does not say which model it was made for; name it, e.g. --model FOLDER")
    return named["name"], revision or named.get("revision")


def own_tokenizer(folder: str | os.PathLike[str]) -> Path | None:
    """The folder, if it holds a tokenizer: training may have given it another chat template than the base has."""
    return Path(folder) if (Path(folder) / "tokenizer_config.json").is_file() else None
