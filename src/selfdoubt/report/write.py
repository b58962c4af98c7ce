"""Writes and reads a report: ``report.json`` for programs, ``report.html`` for people, PNGs for papers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from selfdoubt.errors import DataError
from selfdoubt.eval.records import Record
from selfdoubt.report import png
from selfdoubt.report.html import render_page
from selfdoubt.report.results import Report
from selfdoubt.storage import write_file


def write_report(records: Sequence[Record], report: Report, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Write a report; each file is there as a whole or not at all.

    Args:
        records: All answers of a run; the page shows some of them.
        report: Their numbers, from ``measure_answers``.
        folder: Folder to write, made if missing; a report in it is replaced.

    Returns:
        Paths of the files by name: ``report.json``, ``report.html``, and those of ``accuracy-percentile.png``,
        ``risk-coverage.png`` and ``reliability.png`` whose numbers are defined.

    Raises:
        MissingExtraError: Without matplotlib.
    """
    text = json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False, indent=1)
    files = {
        "report.json": f"{text}\n".encode("utf-8", "backslashreplace"),
        "report.html": render_page(records, report).encode("utf-8", "replace"),  # a lone surrogate is not UTF-8
        **png.draw_pictures(report),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_file(Path(folder) / name, data)
    for name in png.NAMES:
        if name not in files:  # of an earlier report
            (Path(folder) / name).unlink(missing_ok=True)
    return {name: Path(folder) / name for name in files}


def read_report(folder: str | os.PathLike[str]) -> Report:
    """Read the report in a folder.

    Raises:
        DataError: If there is no report, or it is broken.
    """
    path = Path(folder) / "report.json"
    try:
        return Report.parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); give a folder with a report") from None
    except ValueError as error:
        raise DataError(f"{path} is not a report ({error}); report again") from None
