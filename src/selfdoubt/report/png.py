"""Draws a report's plots as PNGs for a paper: accuracy over confidence percentiles, risk over coverage, reliability."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from selfdoubt.errors import require
from selfdoubt.report.results import ConfidenceCurve, Report
from selfdoubt.report.summary import LABELS

DPI = 200
#: After Okabe & Ito (2008); each line also has its own dashes, for prints without colour.
LOOKS: dict[str, dict[str, Any]] = {
    "main": {"color": "#0072b2", "linestyle": "-"},
    "other": {"color": "#d55e00", "linestyle": (0, (5, 2))},
    "third": {"color": "#8a6fae", "linestyle": (0, (2, 1.5))},
    "guide": {"color": "#777777", "linestyle": (0, (1, 2)), "linewidth": 1.0},
}
NAMES = ("accuracy-percentile.png", "risk-coverage.png", "reliability.png")


def draw_pictures(report: Report) -> dict[str, bytes]:
    """Return the plots as PNG bytes by file name; plots without defined numbers are left out.

    Raises:
        MissingExtraError: Without matplotlib.
    """
    pictures = {}
    if report.verdict.score in report.curves:
        pictures[NAMES[0]] = _draw_curves(report, by_coverage=False)
        pictures[NAMES[1]] = _draw_curves(report, by_coverage=True)
    if any(p.reliability for p in report.probabilities.values()):
        pictures[NAMES[2]] = _draw_reliability(report)
    return pictures


def _build_axes() -> tuple[Any, Any]:
    """Return a figure that no state of matplotlib's reaches, and its axes."""
    require("matplotlib", "qa")
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(5.2, 3.7), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=11)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axis.label.set_fontsize(12)
    axes.set_xlim(0, 1)
    return figure, axes


def _save(figure: Any, axes: Any) -> bytes:
    """Return the PNG, with a legend above the plot, where no line can be; the first line last there."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside upper left", ncols=2, frameon=False, fontsize=11, handlelength=2.6
    )
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})  # the same bytes from the same numbers
    return file.getvalue()


def _draw_curves(report: Report, *, by_coverage: bool) -> bytes:
    figure, axes = _build_axes()
    claim, baseline = report.verdict.score, report.baseline
    overall = report.accuracy.value or 0.0
    axes.axhline(1 - overall if by_coverage else overall, label="all answers", **LOOKS["guide"])
    for name in sorted(report.curves, key=lambda n: (n == claim, n != baseline)):
        curve = report.curves[name]
        kind = "main" if name == claim else "other" if name == baseline else "third"
        x = [(100 - p if by_coverage else p) / 100 for p in curve.confidence_percentile]
        y, low, high = _get_wrong(curve) if by_coverage else (curve.accuracy, curve.low, curve.high)
        axes.plot(x, y, label=LABELS.get(name, name), linewidth=2, **LOOKS[kind])
        axes.fill_between(x, low, high, color=LOOKS[kind]["color"], alpha=0.16, linewidth=0)
    axes.set_xlabel("coverage: share of questions answered" if by_coverage else "confidence percentile")
    axes.set_ylabel("wrong answers among them" if by_coverage else "right at or above it")
    axes.set_ylim(0, None if by_coverage else 1.005)
    return _save(figure, axes)


def _get_wrong(curve: ConfidenceCurve) -> tuple[list[float], list[float], list[float]]:
    """Return the share of wrong answers, and its band."""
    wrong, low, high = ([1 - v for v in values] for values in (curve.accuracy, curve.high, curve.low))
    return wrong, low, high


def _draw_reliability(report: Report) -> bytes:
    figure, axes = _build_axes()
    kinds = {"p_correct": "main", "sequence probability": "other", "p_true": "third"}
    axes.plot([0, 1], [0, 1], label="as often as promised", **LOOKS["guide"])
    tables = {n: p.reliability for n, p in report.probabilities.items() if p.reliability}
    for name, bins in reversed(tables.items()):
        x, y = [b.confidence for b in bins], [b.accuracy for b in bins]
        axes.plot(x, y, label=name, linewidth=1.6, marker="o", markersize=5, clip_on=False, **LOOKS[kinds[name]])
    axes.set_xlabel("probability of being right, as given")
    axes.set_ylabel("right")
    axes.set_ylim(0, 1.005)
    return _save(figure, axes)
