"""The plots of a report's page: figures with an SVG, a legend and the numbers behind it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from selfdoubt.report.html import tables
from selfdoubt.report.html.svg import Line, legend, plot
from selfdoubt.report.summary import LABELS, percent


def curves(report: Mapping[str, Any]) -> str:
    """Accuracy at or above each percentile of confidence; empty where nothing is defined."""
    claim, baseline = report["verdict"]["score"], report["baseline"]
    found = report["curves"]
    if claim not in found:
        return ""
    kinds = {baseline: "other", **{n: "third" for n in found if n not in (claim, baseline)}, claim: "main"}
    lines = [
        Line(LABELS.get(n, n), [p / 100 for p in c["percentile"]], c["accuracy"], c["low"], c["high"], kinds[n])
        for n in sorted(found, key=list(kinds).index)
        for c in [found[n]]
    ]
    overall = report["accuracy"]["value"]
    everything = Line("all answers", [0, 1], [overall, overall], kind="guide")
    best = found[claim]
    ends = "; ".join(f"at {p} % it is {percent(best['accuracy'][p])}" for p in (0, 50, 65, 90, 99))
    drawing = plot(
        [everything, *lines],
        title="Accuracy against confidence percentile",
        description=f"Accuracy of the answers at or above each percentile of confidence, by {claim}: {ends}.",
        x_label="confidence percentile", y_label="right at or above it",
    )  # fmt: skip
    numbers = "".join(
        f'<tr><th scope="row">{p} %</th>'
        + "".join(f"<td>{tables.as_percent(found[n]['accuracy'][p])}</td>" for n in kinds if n in found)
        + "</tr>"
        for p in (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 91, 92, 95, 99)
    )
    head = "".join(f'<th scope="col">{escape(LABELS.get(n, n))}</th>' for n in kinds if n in found)
    table = f'<table><thead><tr><th scope="col">percentile</th>{head}</tr></thead><tbody>{numbers}</tbody></table>'
    return (
        f"<section><h2>Accuracy against confidence</h2><figure>{drawing}{legend([*reversed(lines), everything])}"
        "<figcaption>How many answers are right if only those at or above a percentile of confidence are given. "
        f"Bands: 95 %.</figcaption></figure><details><summary>Numbers</summary>{table}</details></section>"
    )


def reliability(report: Mapping[str, Any]) -> str:
    """How often answers are right against what was promised, and its errors; empty where there are no probabilities."""
    found = {name: p for name, p in report["probabilities"].items() if p["reliability"]}
    if not found:
        return ""
    kinds = {"p_correct": "main", "sequence probability": "other", "p_true": "third"}
    lines = []
    for name, p in reversed(found.items()):
        bins = p["reliability"]
        dots = [4.0] * len(bins)
        lines.append(
            Line(name, [b["confidence"] for b in bins], [b["accuracy"] for b in bins], kind=kinds[name], dots=dots)
        )
    ideal = Line("as often as promised", [0, 1], [0, 1], kind="guide")
    drawing = plot(
        [ideal, *lines],
        title="Reliability",
        description="How often answers are right, against the probability of being right that was given to them.",
        x_label="probability given", y_label="right",
    )  # fmt: skip
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(tables.cell(p[m]) for m in ("ece", "brier", "nll"))}</tr>'
        for name, p in found.items()
    )
    table = tables.scrolled(
        "Calibration errors",
        '<table><thead><tr><td></td><th scope="col">ECE</th><th scope="col">Brier</th>'
        f'<th scope="col">log loss</th></tr></thead><tbody>{rows}</tbody></table>',
    )
    own = next(iter(found.values()))
    caption = f"Each dot stands for equally many answers. ECE over {own['bins']} bins {own['binning']}."
    return (
        f"<section><h2>Reliability</h2><figure>{drawing}{legend([*reversed(lines), ideal])}"
        f"<figcaption>{caption}</figcaption></figure>{table}</section>"
    )
