"""Where benchmark results go: one JSON file a benchmark and device, and the tables of README.md made from them."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
FOLDER = HERE / "results"
PACKAGES = ("selfdoubt", "torch", "transformers", "peft")
Row = dict[str, Any]


def device_name() -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return f"{found[1].strip() if found else platform.processor()}, {torch.get_num_threads()} threads"


def write(name: str, rows: list[Row], *, path: Path | None = None, **settings: Any) -> Path:
    """Write results beside what they were measured with, and renew the tables; with a path of one's own no tables."""
    target = path or find_path(name)
    _write(target, rows, settings)
    if path is None:
        tables()
    return target


def find_path(name: str) -> Path:
    """Return the file of a benchmark's results on this device."""
    return FOLDER / f"{name_device(device_name(), name)}.json"


def name_device(device: str, name: str) -> str:
    """Return the name of a benchmark's files on a device."""
    is_cpu = device.endswith("threads")
    return f"{name}-cpu" if is_cpu else f"{name}-gpu-" + re.sub(r"\W+", "-", device).lower()


def read_commit() -> str:
    """Return the short name of the commit that is measured; empty outside a repository."""
    try:
        shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    except FileNotFoundError:
        return ""
    return shown.stdout.strip()


def _write(path: Path, rows: list[Row], settings: dict[str, Any]) -> None:
    record = {
        "device": device_name(),
        "commit": read_commit(),
        "versions": {p: version(p) for p in PACKAGES},
        "settings": settings,
        "rows": rows,
    }
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


class RowFile:
    """Rows of a benchmark, written one by one: a run that was cut off goes on where it stopped.

    Args:
        name: Name of the benchmark.
        keys: Names of the fields that say what a row measures.
        folder: Folder of the results; None is that of the repository.
        again: Measure again what this commit has measured already.
        settings: Settings that all rows share; rows of other settings are measured again.
    """

    def __init__(
        self, name: str, keys: Sequence[str], folder: Path | None = None, *, again: bool = False, **settings: Any
    ) -> None:
        self.path = find_path(name) if folder is None else folder / find_path(name).name
        self._keys, self._settings = tuple(keys), settings
        self._commit = read_commit()
        before = json.loads(self.path.read_text()) if self.path.is_file() else {"rows": []}
        same = before.get("settings") == json.loads(json.dumps(settings)) and before.get("device") == device_name()
        self.rows: list[Row] = before["rows"] if same else []
        self._measured = set() if again else {self._name(r) for r in self.rows if r.get("commit") == self._commit}

    def find(self, **about: Any) -> Row | None:
        """Return the row of this name that this commit has measured; None where there is none."""
        name = self._name(about)
        return next((r for r in self.rows if self._name(r) == name), None) if name in self._measured else None

    def _name(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[key] for key in self._keys)

    def has(self, **about: Any) -> bool:
        """Return whether this commit has measured this row."""
        return self.find(**about) is not None

    def add(self, row: Row) -> None:
        """Write a row, in the place of an earlier one of the same name."""
        self.rows = [r for r in self.rows if self._name(r) != self._name(row)] + [{**row, "commit": self._commit}]
        self._measured.add(self._name(row))
        _write(self.path, self.rows, self._settings)


def tables() -> None:
    """Put each table between its marks in README.md."""
    from benchmarks import (
        attention,
        batch,
        decode,
        encoder,
        prefill,
        quality,
        real_measure,
        serve,
        serve_memory,
        train,
        vision,
        voters_table,
    )

    readme = HERE / "README.md"
    text = readme.read_text()
    makers: dict[str, Callable[[dict[str, Any]], str]] = {
        "attention": attention.table,
        "decode": decode.table, "members": decode.table_members, "batch": batch.table, "prefill": prefill.table,
        "quality": quality.table, "train": train.table, "serve": serve.table, "memory": serve_memory.table,
        "real": real_measure.table, "voters": voters_table.table, "vision": vision.table,
        "encoder": encoder.table,
    }  # fmt: skip
    for name, table in makers.items():
        parts = [table(json.loads(p.read_text())) for p in sorted(FOLDER.glob(f"{name}-*.json"))]
        if parts:
            marks = f"<!-- {name} -->", f"<!-- /{name} -->"
            head, _, rest = text.partition(marks[0])
            _, found, tail = rest.partition(marks[1])
            assert found, f"README.md lacks the marks {marks}"
            text = head + marks[0] + "\n\n" + "\n\n".join(parts) + "\n\n" + marks[1] + tail
    readme.write_text(text)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
