"""Reports on risk scores, measured on judged answers: JSON, PNG and an HTML page.

``measure`` and ``best_of_n`` compute the numbers of ``results.Report``, ``summary`` puts them into sentences,
``compare`` compares two runs, ``write`` writes and reads the files, and ``html`` renders the page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

if TYPE_CHECKING:
    from selfdoubt.report.compare import RunComparison, compare_runs
    from selfdoubt.report.html import render_page
    from selfdoubt.report.measure import measure_answers
    from selfdoubt.report.png import draw_pictures
    from selfdoubt.report.results import Report
    from selfdoubt.report.write import read_report, write_report

__all__ = [
    "Report",
    "RunComparison",
    "compare_runs",
    "draw_pictures",
    "measure_answers",
    "read_report",
    "render_page",
    "write_report",
]

_HOMES = {
    "Report": "results",
    "RunComparison": "compare",
    "compare_runs": "compare",
    "draw_pictures": "png",
    "measure_answers": "measure",
    "read_report": "write",
    "render_page": "html",
    "write_report": "write",
}

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
