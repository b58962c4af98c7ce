"""A report's plots as PNGs for a paper: accuracy over percentiles, risk over coverage, reliability."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from selfdoubt.errors import require
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


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """The plots by file name; one of which nothing is defined is left out.

    Raises:
        MissingExtraError: Without matplotlib.
    """
    found = {}
    if report["verdict"]["score"] in report["curves"]:
        found[NAMES[0]] = _curves(report, by_coverage=False)
        found[NAMES[1]] = _curves(report, by_coverage=True)
    if any(p["reliability"] for p in report["probabilities"].values()):
        found[NAMES[2]] = _reliability(report)
    return found


def _axes() -> tuple[Any, Any]:
    """A figure of its own, which no state of matplotlib's reaches."""
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


def _png(figure: Any, axes: Any) -> bytes:
    """With a legend above the plot, where no line can be; the first line last there."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], loc="outside upper left", ncols=2, frameon=False, fontsize=11, handlelength=2.6
    )
    file = BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})  # the same bytes from the same numbers
    return file.getvalue()


def _curves(report: Mapping[str, Any], *, by_coverage: bool) -> bytes:
    figure, axes = _axes()
    claim, baseline = report["verdict"]["score"], report["baseline"]
    overall = report["accuracy"]["value"]
    axes.axhline(1 - overall if by_coverage else overall, label="all answers", **LOOKS["guide"])
    for name in sorted(report["curves"], key=lambda n: (n == claim, n != baseline)):
        own = report["curves"][name]
        kind = "main" if name == claim else "other" if name == baseline else "third"
        x = [(100 - p if by_coverage else p) / 100 for p in own["percentile"]]
        y, low, high = own["accuracy"], own["low"], own["high"]
        if by_coverage:
            y, low, high = ([1 - v for v in values] for values in (y, high, low))
        axes.plot(x, y, label=LABELS.get(name, name), linewidth=2, **LOOKS[kind])
        axes.fill_between(x, low, high, color=LOOKS[kind]["color"], alpha=0.16, linewidth=0)
    axes.set_xlabel("coverage: share of questions answered" if by_coverage else "confidence percentile")
    axes.set_ylabel("wrong answers among them" if by_coverage else "right at or above it")
    axes.set_ylim(0, None if by_coverage else 1.005)
    return _png(figure, axes)


def _reliability(report: Mapping[str, Any]) -> bytes:
    figure, axes = _axes()
    kinds = {"p_correct": "main", "sequence probability": "other", "p_true": "third"}
    axes.plot([0, 1], [0, 1], label="as often as promised", **LOOKS["guide"])
    found = {n: p["reliability"] for n, p in report["probabilities"].items() if p["reliability"]}
    for name, bins in reversed(found.items()):
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        axes.plot(x, y, label=name, linewidth=1.6, marker="o", markersize=5, clip_on=False, **LOOKS[kinds[name]])
    axes.set_xlabel("probability of being right, as given")
    axes.set_ylabel("right")
    axes.set_ylim(0, 1.005)
    return _png(figure, axes)
