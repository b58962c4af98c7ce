"""Where benchmark results go: one JSON file a benchmark and device, and the tables of README.md made from them."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable
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


def current_commit() -> str:
    """Return the short name of the commit that is measured."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE, check=False
    )
    return done.stdout.strip()


def locate(name: str) -> Path:
    """Return the file of a benchmark's results on this device."""
    short = "gpu-" + re.sub(r"\W+", "-", device_name()).lower() if torch.cuda.is_available() else "cpu"
    return FOLDER / f"{name}-{short}.json"


def write(name: str, rows: list[Row], *, path: Path | None = None, **settings: Any) -> Path:
    """Write results beside what they were measured with, and renew the tables; with a path of one's own no tables."""
    target = path or locate(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "device": device_name(),
        "commit": current_commit(),
        "versions": {p: version(p) for p in PACKAGES},
        "settings": settings,
        "rows": rows,
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    if path is None:
        tables()
    return target


def tables() -> None:
    """Put each table between its marks in README.md."""
    from benchmarks import decode, quality, real_measure, serve, serve_memory, train, voters_table

    readme = HERE / "README.md"
    text = readme.read_text()
    makers: dict[str, Callable[[dict[str, Any]], str]] = {
        "decode": decode.table, "quality": quality.table, "train": train.table, "serve": serve.table,
        "memory": serve_memory.table, "real": real_measure.table, "voters": voters_table.table,
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
