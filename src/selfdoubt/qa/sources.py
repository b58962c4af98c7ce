"""Rows of a question file or of a data set on the hub, each with its place in words. What they mean: ``layouts``."""

from __future__ import annotations

from pathlib import Path

from selfdoubt.data.rows import SUFFIXES, Placed, Row, read_file, read_hub
from selfdoubt.errors import DataError

Rows = list[Placed]

__all__ = ["SUFFIXES", "Row", "Rows", "from_file", "from_hub"]
_SPLITS = ("validation", "test", "train")


def from_file(path: Path) -> Rows:
    """Read the rows of a JSONL, JSON, CSV, TSV or Parquet file.

    Raises:
        DataError: If it cannot be read, is broken, or holds no rows; the message names the place.
    """
    found = list(read_file(path))
    if not found:
        raise DataError(f"{path} holds no questions; give a file with at least one")
    return found


def from_hub(name: str, config: str | None, split: str | None, revision: str | None) -> Rows:
    """Read the rows of a data set on the hub; a split of None takes validation, test or train, the first that there is.

    Raises:
        DataError: If it cannot be loaded.
        MissingExtraError: If the package ``datasets`` is not installed.
    """
    return list(read_hub(name, config, split, revision, splits=_SPLITS, extra="qa"))
