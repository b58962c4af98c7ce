"""Saves and loads an adapter folder: the wrappers' parameters and, beneath them, LoRA in PEFT's own files.

::

    selfdoubt.json              wrappers, base and its fingerprint, reference quantiles, checksums; written last
    added.safetensors           parameters that the wrappers added, if any
    adapter_config.json         with LoRA: PEFT's files, which PEFT alone loads as well
    adapter_model.safetensors
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from selfdoubt import storage
from selfdoubt.errors import ConfigError, LoadError
from selfdoubt.lm.adapters import lora, peft_config
from selfdoubt.lm.calibration import Calibration, read_calibration
from selfdoubt.spec import Spec

#: Entry of the manifest: the number of answers that the reference quantiles are of.
REFERENCE_SIZE = "reference_size"


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    extra: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a whole adapter folder: the wrappers' parameters, and LoRA if the model has it.

    Args:
        model: A wrapped model, with or without LoRA, or a plain one with LoRA.
        folder: Folder to write, made if missing; an adapter in it is replaced.
        base: Name or folder of the base model; taken from the model's config if None.
        revision: Revision of the base model.
        extra: More entries for ``selfdoubt.json``, e.g. ``{"reference": ...}``.
        tokenizer: Tokenizer to save with the adapter; None leaves a tokenizer in the folder as it is.

    Returns:
        The folder.

    Raises:
        ConfigError: If the model's ``RiskAwareLM`` has reference answers or a calibration, and ``extra`` lacks them.
        WrapError: If the model has neither a wrapper nor LoRA.
    """
    folder = Path(folder)
    names = lora.list_lora_names(model)
    storage.check_saved(model, names, extra)
    # Without its manifest a folder is not an adapter of ours: it is removed before anything changes, and written last.
    (folder / storage.MANIFEST).unlink(missing_ok=True)
    lora.remove_lora(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if names:
        lora.save_lora(model, folder, base=base)
        extra = {**(extra or {}), "lora": True}
    return storage.save(model, folder, base=base, revision=revision, extra=extra, elsewhere=names)


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder whose manifest was read and checked, once."""

    path: Path
    manifest: Mapping[str, Any] | None  #: None for a folder that plain PEFT wrote
    calibration: Calibration | None = None

    @property
    def has_lora(self) -> bool:
        """True if LoRA lies beneath the wrappers."""
        return self.manifest is None or bool(self.manifest.get("lora"))

    @property
    def has_voters(self) -> bool:
        """True if one of the wrappers is ``vote``."""
        return self.manifest is not None and any(entry["method"] == "vote" for entry in self.manifest["wrappers"])

    @property
    def reference(self) -> Mapping[str, list[float]] | None:
        """Reference quantiles by score; None where there are none."""
        return None if self.manifest is None else self.manifest.get("reference")

    @property
    def reference_size(self) -> int | None:
        """Number of reference answers; None where the folder does not say it."""
        return None if self.manifest is None else self.manifest.get(REFERENCE_SIZE)

    @property
    def has_weights(self) -> bool:
        """True if it changes its base: LoRA, or a wrapper that is more than a density's statistics."""
        wrappers = () if self.manifest is None else self.manifest["wrappers"]
        return self.has_lora or any(entry["method"] != "density" for entry in wrappers)

    @property
    def tokenizer(self) -> Path | None:
        """The folder, if it holds a tokenizer, whose chat template may differ from the base's; else None."""
        return self.path if (self.path / "tokenizer_config.json").is_file() else None

    def choose_base(self, base: str | None = None, revision: str | None = None) -> tuple[str, str | None]:
        """Return name and revision of the base model: the arguments, else those that the folder names.

        Raises:
            LoadError: If a file of plain PEFT is missing or broken.
            ConfigError: If neither names a base.
        """
        if base is not None:
            return base, revision
        if self.manifest is None:
            name, known = peft_config.read_config(self.path).get("base_model_name_or_path"), None
        else:
            name, known = self.manifest["base"]["name"], self.manifest["base"].get("revision")
        if not name:
            raise ConfigError(f"{self.path} does not say which model it was made for; name it, e.g. --model FOLDER")
        return name, revision or known

    def apply(self, model: nn.Module, wrapper: Spec | None = None) -> nn.Module:
        """Put the adapter onto its base model: LoRA first, in place, then the wrappers.

        Args:
            model: The base model, without wrapper and LoRA.
            wrapper: Wrapper to put around the model with its LoRA; only for a folder of plain PEFT.

        Returns:
            The model, wrapped as the folder or ``wrapper`` says; only the wrappers' parameters train.

        Raises:
            LoadError: If a file is missing or broken.
            BaseMismatchError: If the adapter was made for another model.
        """
        if self.has_lora:
            lora.load_lora(model, self.path)
            model.requires_grad_(False)
        if self.manifest is not None:
            return storage.restore(self.path, model, self.manifest)
        return model if wrapper is None else wrapper(model)  # type: ignore[operator]


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], wrapper: Spec | None = None) -> nn.Module:
    """Check an adapter folder and put it onto its base model; see ``AdapterFolder.apply``.

    Raises:
        LoadError: If a file is missing or broken.
        BaseMismatchError: If the adapter was made for another model.
        ConfigError: If the folder brings a wrapper and another is given.
    """
    return check_adapter(folder, wrapper).apply(model, wrapper)


def read_adapter(folder: str | os.PathLike[str], wrapper: Spec | None = None) -> AdapterFolder:
    """Read and check the manifest of an adapter folder, which is quick: do it before a large model loads.

    Raises:
        LoadError: If it is not an adapter folder, or a file is missing or broken, its calibration included.
        ConfigError: If it brings a wrapper and another is given.
    """
    folder = Path(folder)
    if lora.has_lora(folder) and not (folder / storage.MANIFEST).exists():
        peft_config.read_config(folder)
        return AdapterFolder(folder, None)
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
        return AdapterFolder(folder, manifest, read_calibration(manifest))
    except LoadError as error:
        raise LoadError(f"{folder / storage.MANIFEST}: {error}") from None


def check_adapter(folder: str | os.PathLike[str], wrapper: Spec | None = None) -> AdapterFolder:
    """Read an adapter folder as ``read_adapter`` does, and check that its files are those that were saved.

    Raises:
        LoadError: If a file is missing, broken, or was changed after it was saved.
        ConfigError: If the folder brings a wrapper and another is given.
    """
    adapter = read_adapter(folder, wrapper)
    if adapter.manifest is not None:
        storage.verify(folder, adapter.manifest)
    return adapter
