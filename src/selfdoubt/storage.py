"""Saves the parameters that wrapping added, kilobytes to megabytes, and loads them onto the same base model.

A folder holds ``added.safetensors`` and ``selfdoubt.json`` (the wrappers' settings, the base model and its fingerprint,
versions, reference quantiles). ``selfdoubt.json`` is written last and by a rename: a folder that has it is whole, and
checksums in it say whether the folder is still as it was saved (``manifest.py``).
LoRA beneath the wrappers has files of its own (``lm/adapters/adapter.py``); the manifest then says ``"lora": true``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary, ref

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from selfdoubt import targets
from selfdoubt.compat import is_lora_weight
from selfdoubt.errors import BaseMismatchError, ConfigError, LoadError, SelfdoubtError, TargetError, WrapError
from selfdoubt.fields import FieldError, build_broken_file_error
from selfdoubt.fingerprint import compute_fingerprint, find_difference
from selfdoubt.manifest import (
    LEARNT,
    MANIFEST,
    MANIFEST_FORMAT,
    WEIGHTS,
    from_json,
    plain_manifest,
    read_manifest,
    stamp,
    to_json,
    verify,
    write_file,
    write_manifest,
)  # fmt: skip
from selfdoubt.members import Wrapped
from selfdoubt.rows import list_added_names
from selfdoubt.spec import Spec
from selfdoubt.version import __version__
from selfdoubt.wrapping import get_source, innermost

__all__ = [
    "LEARNT",
    "MANIFEST",
    "WEIGHTS",
    "from_json",
    "load",
    "read_manifest",
    "read_tensors",
    "restore",
    "rewrap",
    "save",
    "stamp",
    "to_json",
    "verify",
    "write_file",
    "write_manifest",
]  # fmt: skip

#: A rank above this must be that of tensors which are there: making them first would take memory.
_LARGE_RANK = 1024


def save(
    wrapped: nn.Module | SavesItself,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    extra: Mapping[str, Any] | None = None,
    elsewhere: Collection[str] = (),
) -> Path:
    """Write the parameters that wrapping added or that still train; the base model itself is not written.

    Args:
        wrapped: A wrapped model; with ``elsewhere``, or with ``LEARNT`` entries in ``extra``, also a plain one. Or a
            ``RiskAwareLM``, which saves all of itself.
        folder: Folder to write, made if missing; an adapter in it is replaced.
        base: Name or folder of the base model; taken from a Hugging Face config if None.
        revision: Revision of the base model.
        extra: More entries for ``selfdoubt.json``, e.g. ``{"reference": ...}``.
        elsewhere: Names in ``wrapped.state_dict()`` that another file stores, e.g. LoRA's.

    Returns:
        The folder.

    Raises:
        WrapError: If nothing was added to the model.
        ConfigError: If an entry of ``extra`` could not be read back, or the model belongs to a ``RiskAwareLM``
            whose reference answers or calibration would be dropped.
    """
    if isinstance(wrapped, SavesItself):
        return wrapped.save(folder, base=base, revision=revision)
    check_saved(wrapped, elsewhere, extra)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = wrapped.state_dict()
    names = set(list_added_names(wrapped)) | {n for n, p in wrapped.named_parameters() if p.requires_grad}
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(names - set(elsewhere))}
    base_model = innermost(wrapped)
    manifest = plain_manifest({
        "format": MANIFEST_FORMAT,
        "wrappers": [to_json(spec) for spec in _specs(wrapped)],
        "base": {
            "name": base or get_source(base_model),
            "revision": revision,
            "class": type(base_model).__name__,
            "fingerprint": compute_fingerprint(wrapped, elsewhere),
        },
        "versions": {"selfdoubt": __version__, "torch": str(torch.__version__)},
        **({"trained": wrapped.is_trained} if isinstance(wrapped, Wrapped) and wrapped.has_members else {}),
        **(extra or {}),
    })  # fmt: skip
    # The old manifest goes first: between the two renames the folder says that it is not whole, never a mix.
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)
    if tensors:
        write_file(folder / WEIGHTS, serialize(tensors))
    write_manifest(folder, manifest)
    return folder


def check_saved(wrapped: nn.Module, elsewhere: Collection[str] = (), extra: Mapping[str, Any] | None = None) -> None:
    """Check that there are parameters to save, and that saving the model alone would not drop learnt entries.

    Raises:
        WrapError: If nothing was added to the model.
        ConfigError: If a language model around it has reference answers or a calibration, and ``extra`` lacks them.
    """
    if not isinstance(wrapped, Wrapped) and not elsewhere and not LEARNT & set(extra or {}):
        raise WrapError(
            f"{type(wrapped).__name__} is not wrapped, so there is nothing to save: wrap it first, e.g. "
            "vote.Wrapper()(model), or give it reference answers with selfdoubt.prepare(model, folder)"
        )
    reference = _OWNERS.get(wrapped)
    owner = None if reference is None else reference()
    lacking = [] if owner is None else sorted(owner.learnt() - set(extra or {}))
    if lacking:
        raise ConfigError(
            f"the language model around this one has a {' and a '.join(lacking)}, which saving the model alone would "
            "drop; save all of it with lm.save(folder)"
        )


@runtime_checkable
class SavesItself(Protocol):
    """A model with more than weights to save, such as ``RiskAwareLM``."""

    def learnt(self) -> frozenset[str]:
        """Return the entries of ``LEARNT`` that it has."""

    def save(self, folder: str | os.PathLike[str], *, base: str | None = None, revision: str | None = None) -> Path:
        """Write all of it."""


_OWNERS: WeakKeyDictionary[nn.Module, ref[SavesItself]] = WeakKeyDictionary()


def register_owner(model: nn.Module, owner: SavesItself) -> None:
    """Register the object that saves a model as a whole; only weak references to both are kept."""
    _OWNERS[model] = ref(owner)


def load(folder: str | os.PathLike[str], model: nn.Module) -> Wrapped:
    """Wrap a base model with the settings and the weights of an adapter folder.

    Raises:
        LoadError: If the folder is missing, broken, of a newer format, or has LoRA that the model has not.
        BaseMismatchError: If the weights were made for another base model.
    """
    wrapped = restore(folder, model)
    if not isinstance(wrapped, Wrapped):
        raise LoadError(
            f"{folder} brings no wrapper (but LoRA, reference answers or a calibration): load it with "
            f"RiskAwareLM.load(..., adapter={str(folder)!r})"
        )
    return wrapped


def restore(folder: str | os.PathLike[str], model: nn.Module, manifest: Mapping[str, Any] | None = None) -> nn.Module:
    """Wrap as ``load`` does; if the folder brings LoRA alone, and the model has it, return the model itself.

    Args:
        folder: An adapter folder.
        model: Its base model, with the folder's LoRA where it has some.
        manifest: The folder's, if it was read and verified by the caller.

    Raises:
        LoadError: If the folder is missing, broken, of a newer format, or has LoRA that the model has not.
        BaseMismatchError: If the weights were made for another base model.
    """
    folder = Path(folder)
    if manifest is None:
        manifest = read_manifest(folder)
        verify(folder, manifest)
    if manifest.get("lora") and not any(is_lora_weight(name) for name, _ in model.named_parameters()):
        raise LoadError(
            f"{folder} has LoRA beneath its wrapper, and the model has none yet: load both with "
            f"RiskAwareLM.load(..., adapter={str(folder)!r})"
        )
    tensors: dict[str, Tensor] = {}
    if manifest["wrappers"] or (folder / WEIGHTS).exists():
        tensors = read_tensors(folder / WEIGHTS)
    for entry in manifest["wrappers"]:
        _check_sizes(folder, entry, tensors)
    wrapped = rewrap(folder, manifest, model)
    if any(_list_wrong_names(wrapped, tensors)):
        wrapped = rewrap(folder, manifest, model, with_earlier_defaults=True)
    _check_fits(folder, wrapped, tensors, manifest["base"])
    wrapped.load_state_dict(tensors, strict=False)
    if isinstance(wrapped, Wrapped) and wrapped.has_members:
        wrapped.is_trained = manifest.get("trained", True)  # older versions let the mean answer
    return wrapped


def rewrap(
    folder: Path, manifest: Mapping[str, Any], model: nn.Module, *, with_earlier_defaults: bool = False
) -> nn.Module:
    """Wrap the model freshly with the settings of a manifest.

    Args:
        folder: Its folder, for messages.
        manifest: The manifest.
        model: The base model.
        with_earlier_defaults: True takes the layers that wrappers without a ``param_filter`` had in version 0.2.

    Raises:
        LoadError: If a setting cannot be read.
        BaseMismatchError: If a wrapper finds nothing to replace.
    """
    wrapped = model
    for i, entry in enumerate(manifest["wrappers"]):
        try:
            spec = from_json(entry, f"wrappers[{i}]")
            if with_earlier_defaults:
                spec = _choose_earlier_layers(spec, entry["method"], wrapped)
            wrapped = spec(wrapped)  # type: ignore[operator]
        except TargetError as error:
            raise BaseMismatchError(f"{folder} does not fit {type(model).__name__}: {error}") from None
        except SelfdoubtError:
            raise
        except Exception as error:  # settings that this model cannot take fail wherever they are used
            raise build_broken_file_error(folder / MANIFEST, error) from error
    return wrapped


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        LoadError: If it is missing or broken, or a number in it is not finite.
    """
    try:
        if not path.is_file():
            raise FileNotFoundError("no such file")
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
        raise LoadError(f"{path} cannot be read ({why}); save or download the adapter again") from None
    for name, tensor in tensors.items():
        if tensor.is_complex() or (tensor.is_floating_point() and not tensor.float().isfinite().all()):
            raise LoadError(f"{path} has a number in {name} that is not finite; save or download the adapter again")
    return tensors


def _check_sizes(folder: Path, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare the settings that decide how large a wrapper is with the tensors, before it is made.

    Raises:
        LoadError: If they differ.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor.ndim}
    sizes: dict[str, set[int]] = {}
    if entry["method"] == "vote":
        sizes = _sizes_of_vote(entry, shapes)
    elif entry["method"] == "sculpt":
        sizes = _sizes_of_sculpt(entry, shapes)
    for name, measured in sizes.items():
        if measured != {entry[name]}:
            expected = " or ".join(map(str, sorted(measured))) or "that of its tensors"
            raise build_broken_file_error(
                folder / MANIFEST, FieldError(name, f"{expected} as in {WEIGHTS}", str(entry[name]))
            )


def _sizes_of_vote(entry: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, set[int]]:
    deviations = {name: shape for name, shape in shapes.items() if ".deviations." in name}
    ranks = {shape[1] for name, shape in deviations.items() if name.endswith(".weight_b") and len(shape) > 1}
    sizes = {"n_voters": {shape[0] for shape in deviations.values()}}
    # Leaves that take no low rank have full deviations, whatever the rank.
    return sizes | ({"rank": ranks} if ranks or (entry["rank"] or 0) > _LARGE_RANK else {})


def _sizes_of_sculpt(entry: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, set[int]]:
    heads: dict[str, dict[int, int]] = {}
    for name, shape in shapes.items():
        head, _, layer = name.rpartition(".branch.")
        if head and layer.endswith(".weight") and ".deviations." not in layer:
            heads.setdefault(head, {})[int(layer.partition(".")[0])] = shape[0]
    if entry["n_layers"] > 1:
        ranks = {layers[min(layers)] for layers in heads.values()}
        return {"n_layers": {len(layers) for layers in heads.values()}, "rank": ranks}
    return {"n_layers": {max(1, len(layers) - 1) for layers in heads.values()}}  # one layer of low rank is two


def _choose_earlier_layers(spec: Any, method: str, model: nn.Module) -> Any:
    """Return settings that name the layers of version 0.2: all for samples, the head for a density."""
    if spec.param_filter is None and method == "sample":
        return replace(spec, param_filter=targets.choose_default_filter(model))
    if spec.param_filter is None and method == "density":
        return replace(spec, param_filter=rf"^{re.escape(targets.find_heads(model)[0].name)}\.")
    return spec


def _list_wrong_names(wrapped: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the names of added parameters that are missing in tensors, and of tensors that the model lacks."""
    missing = set(list_added_names(wrapped)) - set(tensors)
    return sorted(missing), sorted(set(tensors) - set(wrapped.state_dict()))


def _check_fits(folder: Path, wrapped: nn.Module, tensors: dict[str, Tensor], base: dict[str, Any]) -> None:
    state = wrapped.state_dict()
    missing, unknown = _list_wrong_names(wrapped, tensors)
    another = f"{folder} was made for another base model than this" + (f" ({base['name']})" if base["name"] else "")
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model lacks"
        raise BaseMismatchError(f"{another}: it {what}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != state[name].is_floating_point():
            raise LoadError(f"{folder / WEIGHTS} has {tensor.dtype} in {name}, which holds {state[name].dtype}")
        if tensor.shape != state[name].shape:
            raise BaseMismatchError(
                f"{another}: {name} is {tuple(tensor.shape)}, and this base has {tuple(state[name].shape)}"
            )
    differing = find_difference(wrapped, base["fingerprint"])
    if differing is not None:
        raise BaseMismatchError(
            f"{folder} was made for another base model than this: {differing} differs; "
            f"load it onto {base['name'] or 'that one'}"
        )


def _specs(model: nn.Module) -> list[Spec]:
    """Return the specs from the innermost wrapper outwards."""
    return [*_specs(model.module), model.spec] if isinstance(model, Wrapped) else []
