"""Shards of a run, one file per batch of questions: so a run can be interrupted, and shared among processes.

::

    OUT/parts/plan.json           the questions and settings; a resumed run must have the same
    OUT/parts/00007.jsonl         the records of batch 7; written last
    OUT/parts/00007.safetensors   their hidden states, where they are kept
    OUT/parts/00007.json          their costs
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as serialize

from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval import records
from selfdoubt.eval.generate import AnsweredBatch
from selfdoubt.eval.run_folder import SHARDS_FOLDER
from selfdoubt.eval.settings import Cost
from selfdoubt.storage import write_file

SHARDS_SETTINGS = "plan.json"


class Shards:
    """The finished batches of a run.

    Args:
        out: The run's folder.
        about: Everything that the answers depend on, as plain data.

    Raises:
        ConfigError: If the folder holds shards of another run.
    """

    def __init__(self, out: Path, about: Mapping[str, Any]) -> None:
        self.folder = out / SHARDS_FOLDER
        differs = keep_settings(self.folder / SHARDS_SETTINGS, about)
        if differs:
            raise ConfigError(
                f"{out} holds answers of another run ({differs}); give another --out, or remove the folder"
            )

    def has(self, batch: int) -> bool:
        """Return whether a batch is finished."""
        return self._path(batch, "jsonl").is_file()

    def put(self, batch: int, asked: AnsweredBatch) -> None:
        """Write a finished batch."""
        if asked.states:
            write_file(
                self._path(batch, "safetensors"), serialize({k: v.contiguous() for k, v in asked.states.items()})
            )
        write_file(
            self._path(batch, "json"), json.dumps({name: asdict(cost) for name, cost in asked.costs.items()}).encode()
        )
        records.save_records(self._path(batch, "jsonl"), asked.records)

    def get(self, batch: int) -> AnsweredBatch:
        """Read a finished batch.

        Raises:
            DataError: If a file of it is broken.
        """
        states = self._path(batch, "safetensors")
        return AnsweredBatch(
            records.read_records(self._path(batch, "jsonl")),
            load_file(states) if states.is_file() else {},
            {name: Cost(**cost) for name, cost in _read(self._path(batch, "json")).items()},
        )

    def _path(self, batch: int, kind: str) -> Path:
        return self.folder / f"{batch:05d}.{kind}"


def keep_settings(file: Path, about: Mapping[str, Any]) -> str:
    """Write the settings of work that may be cut off, or compare them with those that are there.

    Returns:
        The first difference, in words; empty if there is none.

    Raises:
        DataError: If the file is broken.
    """
    text = json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False)
    if file.is_file():
        return _difference(_read(file), json.loads(text))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, text.encode("utf-8", "backslashreplace"))
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove {path.parent} and ask again") from None


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            was, now = (str(side.get(name, "nothing"))[:60] for side in (old, new))
            return f"{name} was {was}, and is {now}"
    return ""
