"""Save what wrapping added, kilobytes to megabytes, and put it back onto the same base model.

A folder holds ``added.safetensors`` and ``selfdoubt.json`` (the wrappers' settings, the base model and its fingerprint,
versions, reference quantiles). ``selfdoubt.json`` is written last and by a rename: a folder that has it is whole.
LoRA beneath the wrappers lies in files of its own beside them (``lm/adapter.py``); the card then says ``"lora": true``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from selfdoubt import __version__
from selfdoubt.errors import BaseMismatchError, LoadError, TargetError, WrapError
from selfdoubt.members import Spec, Wrapped, innermost, source
from selfdoubt.rows import added_names

FORMAT = 1
WEIGHTS, CARD = "added.safetensors", "selfdoubt.json"
#: Entries of the card that are worth a folder without any weights.
LEARNT = frozenset({"reference", "calibration"})
METHODS = ("vote", "sample", "sculpt")


def save(
    wrapped: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    extra: Mapping[str, Any] | None = None,
    elsewhere: Collection[str] = (),
) -> Path:
    """Write what wrapping added or left training; the base model itself is not written.

    Args:
        wrapped: A wrapped model; with ``elsewhere``, or with ``LEARNT`` entries in ``extra``, also a plain one.
        folder: Made if missing; an adapter in it is replaced.
        base: Name or folder of the base model; taken from a Hugging Face config if None.
        revision: Revision of the base model.
        extra: More entries for ``selfdoubt.json``, e.g. ``{"reference": ...}``.
        elsewhere: Names in ``wrapped.state_dict()`` that another file holds, and that are not the base's either.

    Returns:
        The folder.

    Raises:
        WrapError: If nothing was added to the model.
    """
    if not isinstance(wrapped, Wrapped) and not elsewhere and not LEARNT & set(extra or {}):
        raise WrapError(
            f"{type(wrapped).__name__} is not wrapped, so there is nothing to save: wrap it first, e.g. "
            "vote.Wrapper()(model)"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = wrapped.state_dict()
    wanted = set(added_names(wrapped)) | {n for n, p in wrapped.named_parameters() if p.requires_grad}
    tensors = {name: state[name].detach().cpu().contiguous() for name in sorted(wanted - set(elsewhere))}
    base_model = innermost(wrapped)
    card = {
        "format": FORMAT,
        "wrappers": [to_json(spec) for spec in _specs(wrapped)],
        "base": {
            "name": base or source(base_model),
            "revision": revision,
            "class": type(base_model).__name__,
            "fingerprint": fingerprint(wrapped, elsewhere),
        },
        "versions": {"selfdoubt": __version__, "torch": str(torch.__version__)},
        **(extra or {}),
    }
    text = json.dumps(card, indent=2, allow_nan=False) + "\n"
    # The old card goes first: between the two renames the folder says that it is not whole, never a mix.
    (folder / CARD).unlink(missing_ok=True)
    (folder / WEIGHTS).unlink(missing_ok=True)
    if tensors:
        write(folder / WEIGHTS, serialize(tensors))
    write(folder / CARD, text.encode())
    return folder


def write(path: Path, data: bytes) -> None:
    """Write a file by a rename, so that it is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def load(folder: str | os.PathLike[str], model: nn.Module) -> Wrapped:
    """Wrap a base model as a folder says, with the weights in it.

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


def restore(folder: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """As ``load``; where only LoRA was trained, and the model has it by now, the model itself.

    Raises:
        LoadError: If the folder is missing, broken, of a newer format, or has LoRA that the model has not.
        BaseMismatchError: If the weights were made for another base model.
    """
    folder = Path(folder)
    card = read_card(folder)
    if card.get("lora") and not any(".lora_" in name for name, _ in model.named_parameters()):
        raise LoadError(
            f"{folder} has LoRA beneath its wrapper, and the model has none yet: load both with "
            f"RiskAwareLM.load(..., adapter={str(folder)!r})"
        )
    wrapped = rewrap(folder, card, model)
    tensors: dict[str, Tensor] = {}
    if card["wrappers"] or (folder / WEIGHTS).exists():
        tensors = read_tensors(folder / WEIGHTS)
    _check_fits(folder, wrapped, tensors, card["base"])
    wrapped.load_state_dict(tensors, strict=False)
    return wrapped


def rewrap(folder: Path, card: Mapping[str, Any], model: nn.Module) -> nn.Module:
    """The model in fresh wrappers with the settings of a card.

    Raises:
        LoadError: If a setting cannot be read.
        BaseMismatchError: If a wrapper finds nothing to replace.
    """
    wrapped = model
    try:
        for entry in card["wrappers"]:
            wrapped = from_json(entry)(wrapped)  # type: ignore[operator]
    except TargetError as error:
        raise BaseMismatchError(f"{folder} does not fit {type(model).__name__}: {error}") from None
    except (LoadError, WrapError):
        raise
    except Exception as error:  # settings of a wrong type fail wherever they are used
        raise _broken(folder / CARD, error) from error
    return wrapped


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        LoadError: If it is missing or broken.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path} cannot be read ({error}); save or download the adapter again") from None


def read_card(folder: Path) -> dict[str, Any]:
    """``selfdoubt.json`` of an adapter folder.

    Raises:
        LoadError: If it is missing, not JSON, lacks an entry, or has a newer format.
    """
    path = folder / CARD
    if not path.is_file():
        raise LoadError(f"{folder} is not an adapter folder: it has no {CARD}; make one with selfdoubt.save")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        version, entries = card["format"], card["wrappers"]
        bare = card.get("lora") or any(card.get(name) for name in LEARNT)  # these need no wrapper
        _ = [entry["method"] for entry in (entries if bare else [entries[0], *entries])]
        _, _ = card["base"]["name"], [abs(s) + n for s, n in card["base"]["fingerprint"].values()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _broken(path, error) from None
    if version != FORMAT:
        raise LoadError(f"{path} has format {version}, and this version reads {FORMAT}; upgrade selfdoubt")
    return dict(card)


def _broken(path: Path, error: Exception) -> LoadError:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return LoadError(f"{path} is broken ({text}); save or download it again")


def to_json(spec: Spec) -> dict[str, Any]:
    """A wrapper's settings as plain data."""
    method = type(spec).__module__.rpartition(".")[2]
    settings = {f.name: getattr(spec, f.name) for f in fields(spec)}  # type: ignore[arg-type]
    if isinstance(settings.get("distribution"), type):
        settings["distribution"] = settings["distribution"].__name__
    elif "distribution" in settings:
        noise = settings["distribution"]
        settings["distribution"] = {"name": type(noise).__name__, **asdict(noise)}
    return {"method": method, **settings}


def from_json(entry: Mapping[str, Any]) -> Spec:
    """The wrapper that ``to_json`` described.

    Raises:
        LoadError: If the method or a setting is unknown.
    """
    settings = dict(entry)
    method = settings.pop("method", None)
    if method not in METHODS:
        raise LoadError(f"unknown wrapper {method!r}, this version knows {', '.join(METHODS)}; upgrade selfdoubt")
    module = import_module(f"selfdoubt.{method}")
    try:
        if isinstance(distribution := settings.get("distribution"), str):
            settings["distribution"] = getattr(module, distribution)
        elif isinstance(distribution, dict):
            chosen = dict(distribution)
            settings["distribution"] = getattr(module, chosen.pop("name"))(**chosen)
        settings["shared_inputs"] = tuple(settings.get("shared_inputs", ()))
        spec: Spec = module.Wrapper(**settings)
    except (TypeError, AttributeError, KeyError) as error:
        raise LoadError(
            f"the settings of {method} cannot be read ({error}); see help(selfdoubt.{method}.Wrapper)"
        ) from None
    return spec


def fingerprint(wrapped: nn.Module, elsewhere: Collection[str] = ()) -> dict[str, list[float]]:
    """Mean size and length of up to eight frozen, unquantised parameters, by name: enough to tell two bases apart.

    Rounding to another float type changes a mean by far less than the tolerance in ``load``.
    """
    added = {*added_names(wrapped), *elsewhere}
    frozen = {
        name: p
        for name, p in wrapped.named_parameters()
        if name not in added and not p.requires_grad and p.is_floating_point()
    }
    names = [name for name, p in frozen.items() if p.ndim == 1] or list(frozen)
    chosen = {names[round(i * (len(names) - 1) / 7)] for i in range(8)} if names else set()
    return {name: [_size(frozen[name]), frozen[name].numel()] for name in sorted(chosen)}


def _size(p: Tensor) -> float:
    return float(p.detach().double().abs().mean())


def _check_fits(folder: Path, wrapped: nn.Module, tensors: dict[str, Tensor], base: dict[str, Any]) -> None:
    state = wrapped.state_dict()
    wanted = set(added_names(wrapped))
    missing, unknown = sorted(wanted - set(tensors)), sorted(set(tensors) - set(state))
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model lacks"
        raise BaseMismatchError(f"{folder} was made for another base model than this ({base['name']}): it {what}")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise BaseMismatchError(
                f"{folder} was made for another base model than this ({base['name']}): {name} is "
                f"{tuple(tensor.shape)}, and this base wants {tuple(state[name].shape)}"
            )
    found = dict(wrapped.named_parameters())
    for name, (size, numel) in base["fingerprint"].items():
        p = found.get(name)
        if p is None or p.numel() != numel or abs(_size(p) - size) > 0.01 * abs(size):
            raise BaseMismatchError(
                f"{folder} was made for another base model than this: {name} differs; load it onto {base['name']}"
            )


def _specs(model: nn.Module) -> list[Spec]:
    """Specs from the innermost wrapper outwards."""
    return [*_specs(model.module), model.spec] if isinstance(model, Wrapped) else []
