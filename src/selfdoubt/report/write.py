"""Writes what was measured: ``report.json`` for programs, ``report.html`` for people, PNGs for papers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfdoubt.eval.records import Record
from selfdoubt.report import png
from selfdoubt.report.html.page import page
from selfdoubt.report.measure import measure
from selfdoubt.storage import write


def write_report(
    records: Sequence[Record],
    run: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, Path]:
    """Measure answers and write the report; each file is there as a whole or not at all.

    Args:
        records: All answers of a run.
        run: As for ``measure``.
        folder: Made if missing; a report in it is replaced.
        draws: Bootstrap draws behind each interval.
        seed: Of these draws.

    Returns:
        Where the files are: ``report.json``, ``report.html``, and those of ``accuracy-percentile.png``,
        ``risk-coverage.png`` and ``reliability.png`` for which there is something to draw.

    Raises:
        DataError: If there are no records.
        MissingExtraError: Without matplotlib.
    """
    report = measure(records, run, draws=draws, seed=seed)
    text = json.dumps(report, ensure_ascii=False, allow_nan=False, indent=1)
    files = {
        "report.json": f"{text}\n".encode("utf-8", "backslashreplace"),
        "report.html": page(records, report).encode("utf-8", "replace"),  # a lone surrogate is not UTF-8
        **png.pictures(report),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write(Path(folder) / name, data)
    for name in png.NAMES:
        if name not in files:  # of an earlier report
            (Path(folder) / name).unlink(missing_ok=True)
    return {name: Path(folder) / name for name in files}
