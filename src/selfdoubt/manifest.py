"""``selfdoubt.json``, the manifest of an adapter folder: read field by field, with checksums over all that it covers.

The checksum ``manifest`` is over the other entries of the file; each file in ``COVERED`` that belongs to the adapter
has its own. A folder from before there were checksums, or whose checksums were taken out, is read without them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from selfdoubt.errors import ConfigError, LoadError
from selfdoubt.fields import (
    STORED_COMPILE,
    FieldCheck,
    FieldError,
    anything,
    ascending,
    build_broken_file_error,
    choice,
    flag,
    listing,
    nonempty,
    number,
    optional,
    read_object,
    record,
    shorten_value,
    table,
    text,
    whole,
)  # fmt: skip
from selfdoubt.spec import Spec
from selfdoubt.wrapper_text import METHODS

MANIFEST_FORMAT = 1
WEIGHTS, MANIFEST = "added.safetensors", "selfdoubt.json"
#: Entries of the manifest that are worth a folder without any weights.
LEARNT = frozenset({"reference", "calibration"})
LORA = ("adapter_config.json", "adapter_model.safetensors")
#: A tokenizer counts where the first of these is there: it decides what a model reads.
TOKENIZER = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
COVERED = (WEIGHTS, *LORA, *TOKENIZER)


def write_file(path: Path, data: bytes) -> None:
    """Write a file and rename it into place, so that it exists as a whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def read_manifest(folder: str | os.PathLike[str], *, sealed: bool = True) -> dict[str, Any]:
    """Read ``selfdoubt.json`` of an adapter folder; ``verify`` checks the files next to it.

    Args:
        folder: An adapter folder.
        sealed: Refuse a manifest that does not match its checksum.

    Raises:
        LoadError: If it is missing, not JSON, of a newer format, lacks an entry, has one of a wrong kind or out of
            range, or was changed since its checksum was made.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        lacks = f"{MANIFEST} in it is not a file" if path.exists() else f"it has no {MANIFEST}"
        raise LoadError(f"{folder} is not an adapter folder: {lacks}; make one with selfdoubt.save")
    manifest = read_object(path)
    try:
        version = whole(1)(manifest.get("format"), "format")
        if version != MANIFEST_FORMAT:
            raise LoadError(f"{path} has format {version}, and this version reads {MANIFEST_FORMAT}; upgrade selfdoubt")
        check_manifest(manifest)
        digest = _digest_of(manifest) if sealed and "checksums" in manifest else None
    except (FieldError, RecursionError) as error:
        raise build_broken_file_error(path, error) from None
    if digest is not None and digest != manifest["checksums"]["manifest"]:
        raise _changed(Path(folder), MANIFEST)
    return manifest


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Check every entry that is read of a manifest.

    Raises:
        FieldError: If one is missing, of a wrong kind or out of range.
    """
    checked = _MANIFEST(manifest, "")
    if not (checked["wrappers"] or checked.get("lora") or any(checked.get(key) for key in LEARNT)):
        raise FieldError("wrappers", "a list of at least one", "none")


def verify(folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> None:
    """Check that the files next to a manifest are those that were saved with it.

    Raises:
        LoadError: If one is missing, was changed, or came later.
    """
    if "checksums" not in manifest:
        return
    folder = Path(folder)
    kept = {file: digest for file, digest in manifest["checksums"].items() if file != "manifest"}
    for file, digest in kept.items():
        if not (folder / file).is_file():
            raise LoadError(f"{folder / file} cannot be read (it is missing); save or download the adapter again")
        if _digest(folder / file) != digest:
            raise _changed(folder, file)
    for file in _present(folder, manifest):
        if file not in kept:
            raise LoadError(
                f"{folder / file} was not there when the adapter was saved; remove it, or {_accept(folder)}"
            )


def write_manifest(folder: str | os.PathLike[str], manifest: Mapping[str, Any]) -> Path:
    """Write ``selfdoubt.json`` with checksums of itself and of the files that are in the folder now.

    Returns:
        Path of ``selfdoubt.json``.

    Raises:
        ConfigError: If an entry could not be read back.
        ValueError: If an entry cannot be stored as JSON.
    """
    plain = plain_manifest(manifest)
    folder = Path(folder)
    sums = {"manifest": _digest_of(plain)} | {file: _digest(folder / file) for file in _present(folder, plain)}
    write_file(folder / MANIFEST, (json.dumps({**plain, "checksums": sums}, indent=2, allow_nan=False) + "\n").encode())
    return folder / MANIFEST


def plain_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest as plain JSON data, without checksums.

    Raises:
        ConfigError: If an entry could not be read back.
        ValueError: If an entry cannot be stored as JSON.
    """
    kept = {key: value for key, value in manifest.items() if key != "checksums"}
    plain: dict[str, Any] = json.loads(json.dumps(kept, allow_nan=False))
    try:
        check_manifest(plain)
    except FieldError as error:
        raise ConfigError(f"{MANIFEST} cannot be written: {error}") from None
    return plain


def stamp(folder: str | os.PathLike[str]) -> Path:
    """Accept an adapter folder as it is now, after a change by hand: write the checksums of its files.

    Example::

        python -c "from selfdoubt import storage; storage.stamp('FOLDER')"

    Returns:
        ``selfdoubt.json``.

    Raises:
        LoadError: If an entry of ``selfdoubt.json`` cannot be read.
    """
    return write_manifest(folder, read_manifest(folder, sealed=False))


def to_json(spec: Spec) -> dict[str, Any]:
    """Return a wrapper's settings as plain data."""
    method = type(spec).__module__.rpartition(".")[2]
    names = {f.name: STORED_COMPILE if f.name == "compile" else f.name for f in fields(spec)}  # type: ignore[arg-type]
    settings = {stored: getattr(spec, name) for name, stored in names.items()}
    if isinstance(settings.get("distribution"), type):
        settings["distribution"] = settings["distribution"].__name__
    elif "distribution" in settings:
        noise = settings["distribution"]
        settings["distribution"] = {"name": type(noise).__name__, **asdict(noise)}
    return {"method": method, **settings}


def from_json(entry: Mapping[str, Any], path: str = "wrapper") -> Spec:
    """Return the wrapper that ``to_json`` described; settings that are left out have their defaults.

    Raises:
        LoadError: If the method or a setting is unknown, of a wrong kind or out of range.
    """
    try:
        return _wrapper(entry, path, complete=False)
    except FieldError as error:
        raise LoadError(f"{error}; see help(selfdoubt.vote.Wrapper), and those of sample and sculpt") from None


def _wrapper(entry: Any, path: str, *, complete: bool = True) -> Spec:
    record({"method": anything}, open_ended=True)(entry, path)
    method = entry["method"]
    if method not in METHODS:
        raise FieldError(
            f"{path}.method", f"one of {', '.join(METHODS)} (a newer selfdoubt may know more)", shorten_value(method)
        )
    module = import_module(f"selfdoubt.{method}")
    kinds: dict[str, FieldCheck] = {"method": anything, **module.Wrapper.kinds}
    if method == "sample":
        kinds["distribution"] = _noise if complete else _partial_noise
    elif method == "sculpt":
        kinds["distribution"] = choice("Normal", "Laplace")
    needed = {name: kind for name, kind in kinds.items() if complete and name not in module.Wrapper.newer}
    settings = record(needed, kinds)(entry, path)
    del settings["method"]
    if isinstance(noise := settings.get("distribution"), str):
        settings["distribution"] = getattr(module, noise)
    elif noise is not None:
        settings["distribution"] = getattr(module, noise.pop("name"))(**noise)
    try:
        spec: Spec = module.Wrapper(**settings)
    except ConfigError as error:  # settings that are right alone, and not together
        raise FieldError(path, "settings that fit together", str(error)) from None
    return spec


def _noise(value: Any, path: str) -> dict[str, Any]:
    """Check the distribution of a sample."""
    known = import_module("selfdoubt.sample")
    names = choice("Bernoulli", "Normal")
    chosen = record({"name": names}, open_ended=True)(value, path)["name"]
    return dict(record({"name": names, **getattr(known, chosen).kinds})(value, path))


def _partial_noise(value: Any, path: str) -> dict[str, Any]:
    """Check the distribution of a sample: its name, and those of its settings that are given."""
    known = import_module("selfdoubt.sample")
    names = choice("Bernoulli", "Normal")
    value = {"name": value} if isinstance(value, str) else value
    chosen = record({"name": names}, open_ended=True)(value, path)["name"]
    return dict(record({"name": names}, getattr(known, chosen).kinds)(value, path))


def _calibration(value: Any, path: str) -> Any:
    """Check no more than that it is a table: ``lm/calibration.py`` knows its fields."""
    return table(anything)(value, path)


def _sha256(value: Any, path: str) -> str:
    if not isinstance(value, str) or len(value) != 64 or set(value) - set("0123456789abcdef"):
        raise FieldError(path, "a SHA-256 in hexadecimal digits", shorten_value(value))
    return value


def _fingerprint(value: Any, path: str) -> tuple[float, ...]:
    listing(anything, 2, 3)(value, path)  # older files lack the third
    checks = zip((number(0), whole(0), number()), value, strict=False)
    return tuple(check(item, f"{path}[{i}]") for i, (check, item) in enumerate(checks))


_MANIFEST = record(
    {
        "format": anything,
        "wrappers": listing(_wrapper, 0, len(METHODS)),
        "base": record(
            {"name": optional(nonempty), "fingerprint": table(_fingerprint)},
            {"revision": optional(text), "class": text},
        ),
    },
    {
        "lora": flag,
        "trained": flag,
        "reference": optional(table(ascending)),
        "reference_size": optional(whole(1)),
        "calibration": optional(_calibration),
        "checksums": record({"manifest": _sha256}, dict.fromkeys(COVERED, _sha256)),
    },
    open_ended=True,
)


def _present(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of the covered files that are in a folder and belong to its adapter."""
    expected = [
        WEIGHTS,
        *(LORA if manifest.get("lora") else ()),
        *(TOKENIZER if (folder / TOKENIZER[0]).is_file() else ()),
    ]
    return [file for file in expected if (folder / file).is_file()]


def _digest_of(manifest: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in manifest.items() if key != "checksums"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"{path} cannot be read ({error}); save or download the adapter again") from None


def _changed(folder: Path, file: str) -> LoadError:
    return LoadError(
        f"{folder / file} was changed after it was saved, as its checksum shows; save or download the adapter again, "
        f"or {_accept(folder)}"
    )


def _accept(folder: Path) -> str:
    return f'accept the folder as it is: python -c "from selfdoubt import storage; storage.stamp({str(folder)!r})"'
