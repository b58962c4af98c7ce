"""GGUF files, as llama.cpp writes them: how they are named, checks of their header, and loading by transformers.

A file's metadata holds all of a model: config, tokenizer, chat template. Other files of its folder are not read.
"""

from __future__ import annotations

import mmap
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfdoubt import compat
from selfdoubt.errors import LoadError, require

_SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ON_HUB = re.compile(r"(?P<repository>[\w.-]+(/[\w.-]+)?):(?P<file>(?!/)[^:]+\.gguf)", re.IGNORECASE)

#: Widths in bytes of the metadata's value types; 8 is a string and 9 an array.
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_NUMBERS = {2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
#: Types of tensors whose values are stored as they are; all others are quantised, in blocks.
_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


@dataclass(frozen=True)
class GgufHeader:
    """The part of a GGUF file's header that decides how it loads."""

    architecture: str
    licence: str | None
    splits: int  #: number of files that the model is split into
    dtype: torch.dtype  #: the weights' own type; bfloat16 where they are quantised
    size: int  #: bytes that the whole file has, at least


def find_gguf(name: str) -> str | None:
    """Return the file, or the hub's ``org/name:file.gguf``, that a name stands for; None if it names no GGUF file.

    Args:
        name: A file; ``folder:file.gguf``; a hub name with ``:file.gguf``. A file without the suffix counts by its
            first bytes.

    Raises:
        LoadError: If a file ``*.gguf`` is named that does not exist.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return str(path) if _has_suffix(path) or _read_magic(path) == _MAGIC else None
    if not _has_suffix(path):
        return None
    folder, colon, file = name.rpartition(":")
    inside = Path(folder).expanduser() if colon else path.parent
    if colon and inside.is_dir():
        if (inside / file).is_file():
            return str(inside / file)
    elif _ON_HUB.fullmatch(name):
        return name
    there = ", ".join(file.name for file in list_gguf(inside)[:8])
    repair = f"there are {there}" if there else "for one on the hub write org/name:file.gguf"
    raise LoadError(f"no GGUF file at {name!r}; {repair}")


def list_gguf(folder: Path) -> list[Path]:
    """Return the GGUF files of a folder by name; none where it does not exist."""
    return sorted(path for path in folder.iterdir() if _has_suffix(path)) if folder.is_dir() else []


def choose_gguf(folder: Path) -> Path | None:
    """Return the one GGUF file of a folder; None where it has none.

    Raises:
        LoadError: If there are several.
    """
    files = list_gguf(folder)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:8]) + (", ..." if len(files) > 8 else "")
        raise LoadError(f"{folder} holds {len(files)} GGUF files ({names}): name one, e.g. {files[0]}")
    return files[0] if files else None


def fetch_gguf(source: str, *, revision: str | None = None, token: str | None = None) -> Path | None:
    """Return the GGUF file of a resolved name, downloaded if it lies on the hub; None for any other model.

    Raises:
        Exception: Those of huggingface_hub, if the file cannot be downloaded.
    """
    if Path(source).is_file():
        return Path(source)
    on_hub = _ON_HUB.fullmatch(source)
    if on_hub is None:
        return None
    hub = require("huggingface_hub", "lm")
    return Path(hub.hf_hub_download(on_hub["repository"], on_hub["file"], revision=revision, token=token))


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file, without the weights.

    Raises:
        LoadError: If it is not a GGUF file, or is broken or truncated.
        MissingExtraError: If the package gguf is not installed.
    """
    quantized = {int(kind): sizes for kind, sizes in require("gguf", "lm").GGML_QUANT_SIZES.items()}
    magic = _read_magic(path)
    if magic != _MAGIC:
        raise LoadError(f"{path} is not a GGUF file: it begins with {magic!r}, not with {_MAGIC!r}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Reader(data).read(quantized)
            size = len(data)
    except (struct.error, KeyError, ValueError, TypeError, OverflowError) as error:
        raise LoadError(f"the header of {path} is broken or truncated ({error}); download it again") from None
    if size < header.size:
        raise LoadError(f"{path} is truncated: it has {size:,} bytes of {header.size:,}; download it again")
    return header


def load_gguf(path: Path, name: str, *, dtype: torch.dtype | str, with_tokenizer: bool = True) -> tuple[nn.Module, Any]:
    """Load a GGUF file's model, its weights dequantised, and the tokenizer that its metadata describes.

    Args:
        path: The file.
        name: Name under which it is found again: ``config.name_or_path`` of the model.
        dtype: Type of the weights; "auto" takes the file's own, or bfloat16 where they are quantised.
        with_tokenizer: False gives None for the tokenizer.

    Raises:
        LoadError: If the file is broken, or transformers cannot read its architecture.
        Exception: Those of transformers.
    """
    transformers = require("transformers", "lm")
    header = _check(path)
    options: dict[str, Any] = {"dtype": header.dtype if dtype == "auto" else dtype}
    if hasattr(transformers, "GgufConfig"):  # elsewhere all weights are dequantised anyway
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _isolate(path) as (folder, source), compat.read_gguf_once():
        config = _read_config(path, header, folder, source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **source) if with_tokenizer else None
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, **source, **options
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise LoadError(
            f"{path} lacks {len(missing)} of the model's weights, as transformers reads it (e.g. {missing[0]}); "
            "give the model's own folder or hub name instead"
        )
    if tokenizer is not None:
        tokenizer.name_or_path = name
    model.config.name_or_path = name
    return model, tokenizer


def read_gguf_config(path: Path) -> Any:
    """Return the transformers config that a GGUF file's metadata describes.

    Raises:
        LoadError: If the file is broken, or transformers cannot read its architecture.
        Exception: Those of transformers.
    """
    header = _check(path)
    with _isolate(path) as (folder, source), compat.read_gguf_once():
        return _read_config(path, header, folder, source)


def _read_config(path: Path, header: GgufHeader, folder: str, source: dict[str, Any]) -> Any:
    transformers = require("transformers", "lm")
    try:
        return transformers.AutoConfig.from_pretrained(folder, **source)
    except ValueError as error:
        if "supported" not in str(error) and "recognize" not in str(error):
            raise
        raise LoadError(
            f"{path} is a GGUF file of the architecture {header.architecture!r}, which transformers "
            f"{transformers.__version__} cannot read; give the model's own folder or hub name instead"
        ) from error


def _check(path: Path) -> GgufHeader:
    """Read the header, and check that the file is a whole model."""
    header = read_gguf_header(path)
    if header.splits > 1:
        raise LoadError(
            f"{path} is one of {header.splits} files of one model; join them with llama.cpp's "
            "llama-gguf-split --merge, and name the result"
        )
    return header


@contextmanager
def _isolate(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield an empty folder, and the arguments with which transformers loads from it the file alone.

    In the file's own folder transformers would prefer any tokenizer.json, and apply any adapter_config.json.
    """
    with tempfile.TemporaryDirectory() as folder:
        yield folder, {"gguf_file": str(path.resolve()), "local_files_only": True}


def _has_suffix(path: Path) -> bool:
    return path.suffix.lower() == _SUFFIX


def _read_magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(_MAGIC))


class _Reader:
    """A cursor over a header, in the format of ggml's docs/gguf.md; numbers are little-endian."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = len(_MAGIC)

    def read(self, quantized: dict[int, tuple[int, int]]) -> GgufHeader:
        """Read all up to the weights.

        Args:
            quantized: Values and bytes of a block, by type of tensor.
        """
        version, tensors, entries = self.unpack("<IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, and 2 and 3 can be read")
        metadata = {}
        for _ in range(entries):
            key = self.string()
            metadata[key] = self.value(self.unpack("<I")[0])
        kinds, end = set(), 0
        for _ in range(tensors):
            name = self.string()
            shape = self.unpack(f"<{self.unpack('<I')[0]}Q")
            kind, offset = self.unpack("<IQ")
            if kind not in quantized:
                raise ValueError(f"{name} is of type {kind}, which the package gguf does not know")
            values, width = quantized[kind]
            kinds.add(kind)
            end = max(end, offset + prod(shape) // values * width)
        alignment = metadata.get("general.alignment") or 32
        start = -(-self.at // alignment) * alignment
        return GgufHeader(
            metadata["general.architecture"],
            metadata.get("general.license"),
            metadata.get("split.count") or 1,
            _choose_dtype(kinds),
            start + end if tensors else self.at,
        )

    def unpack(self, form: str) -> tuple[Any, ...]:
        """Return numbers."""
        numbers = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return numbers

    def string(self) -> str:
        """Return a string."""
        (length,) = self.unpack("<Q")
        text = self.data[self.at : self.at + length]
        if len(text) < length:
            raise ValueError("it ends within a string")
        self.at += length
        return text.decode()

    def value(self, kind: int) -> Any:
        """Return a string or a whole number; None for all else, which is skipped."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.unpack("<IQ")
            if inner in _WIDTHS:
                self.at += _WIDTHS[inner] * count
                return None
            for _ in range(count):
                self.value(inner)
            return None
        if kind in _NUMBERS:
            return self.unpack(_NUMBERS[kind])[0]
        self.at += _WIDTHS[kind]
        return None


def _choose_dtype(kinds: set[int]) -> torch.dtype:
    """Return the type of the weights: the shortest of the floats, or bfloat16 where a type is quantised."""
    if not kinds <= set(_FLOATS):
        return torch.bfloat16
    return min((_FLOATS[kind] for kind in kinds), key=lambda dtype: dtype.itemsize, default=torch.float32)
