"""Sharded checkpoints read as data: nothing in their pickles runs, no matter where they come from.

FSDP2 writes torch's distributed format: an index, ``.metadata``, that is a pickle, and files of tensors. DeepSpeed
writes one pickle per process. Torch's own readers trust both; these take the classes of the formats and nothing else.
"""

from __future__ import annotations

import io
import pickle
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from selfdoubt.errors import require

INDEX = ".metadata"
#: The classes that an index holds, apart from the dtypes of torch.
_IN_AN_INDEX = frozenset({
    ("pathlib", "PosixPath"), ("pathlib", "WindowsPath"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    (_StorageInfo.__module__, _StorageInfo.__qualname__),
    *((Metadata.__module__, name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
})  # fmt: skip
#: Classes in DeepSpeed's files that only hold numbers.
_IN_DEEPSPEED = ("LossScaler", "DynamicLossScaler")


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler of an index, which imports nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _IN_AN_INDEX or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which the index of a checkpoint does not hold")


class _Reader(FileSystemReader):
    """A reader whose index has been read as data."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with (folder / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"its index is a {type(index).__name__}")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ARG002
        """Return the index."""
        return self.index


class _Planner(_EmptyStateDictLoadPlanner):
    """A plan that reads the weights alone; what is not a tensor is loaded as data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load an entry that is not a tensor."""
        data = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), data)
        data.seek(0)
        super().load_bytes(read_item, data)


def read_shards(folder: Path) -> dict[str, Any]:
    """Return the content of FSDP2's shards: ``state_dict``, and the entries that Lightning keeps in ``meta.pt``.

    Raises:
        pickle.UnpicklingError: If the folder holds anything else than data.
    """
    content: dict[str, Any] = {}
    try:
        planner: Any = _Planner
        _load_state_dict(content, storage_reader=_Reader(folder), planner=planner(keys={"state_dict"}), no_dist=True)
    except CheckpointException as error:  # not an Exception
        raise next(failure for failure, _ in error.failures.values()) from None
    extra = folder / "meta.pt"
    return {**(torch.load(extra, map_location="cpu", weights_only=True) if extra.is_file() else {}), **content}


def read_deepspeed(folder: Path) -> dict[str, Any]:
    """Return the content of DeepSpeed's shards, once each of its files has proved to be data.

    Raises:
        MissingExtraError: If DeepSpeed is not installed.
        pickle.UnpicklingError: If a file holds anything else than data.
    """
    zero = require("deepspeed.utils.zero_to_fp32", "deepspeed")
    scalers = import_module("deepspeed.runtime.fp16.loss_scaler")
    known = [getattr(scalers, name) for name in _IN_DEEPSPEED if hasattr(scalers, name)]
    with _allow(known):
        for file in sorted(folder.rglob("*.pt")):
            torch.load(file, map_location="cpu", weights_only=True)
    whole = zero.get_fp32_state_dict_from_zero_checkpoint(str(folder))
    return {"state_dict": {name.removeprefix("_forward_module."): tensor for name, tensor in whole.items()}}


def _allow(classes: list[Any]) -> AbstractContextManager[Any]:
    return torch.serialization.safe_globals(classes) if classes else nullcontext()
