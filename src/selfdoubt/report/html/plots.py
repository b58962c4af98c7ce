"""The plots of a report's page: figures with an SVG, a legend and the numbers behind it."""

from __future__ import annotations

from html import escape

from selfdoubt.formatting import format_percent
from selfdoubt.report.html.svg import Series, draw_legend, draw_plot
from selfdoubt.report.html.tables import format_percent_html, render_cell, wrap_scrolling
from selfdoubt.report.results import Report
from selfdoubt.report.summary import LABELS


def draw_curves(report: Report) -> str:
    """Return accuracy at or above each confidence percentile; empty where nothing is defined."""
    claim, baseline, curves = report.verdict.score, report.baseline, report.curves
    if claim is None or claim not in curves:
        return ""
    kinds = {baseline: "other", **{n: "third" for n in curves if n not in (claim, baseline)}, claim: "main"}
    lines = [
        Series(LABELS.get(n, n), [p / 100 for p in c.confidence_percentile], c.accuracy, c.low, c.high, kinds[n])
        for n in sorted(curves, key=list(kinds).index)
        for c in [curves[n]]
    ]
    overall = report.accuracy.value or 0.0
    everything = Series("all answers", [0, 1], [overall, overall], kind="guide")
    accuracy = curves[claim].accuracy
    ends = "; ".join(f"at {p} % it is {format_percent(accuracy[p])}" for p in (0, 50, 65, 90, 99))
    drawing = draw_plot(
        [everything, *lines],
        title="Accuracy against confidence percentile",
        description=f"Accuracy of the answers at or above each confidence percentile, by {claim}: {ends}.",
        x_label="confidence percentile", y_label="right at or above it",
    )  # fmt: skip
    numbers = "".join(
        f'<tr><th scope="row">{p} %</th>'
        + "".join(f"<td>{format_percent_html(curves[n].accuracy[p])}</td>" for n in kinds if n in curves)
        + "</tr>"
        for p in (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 91, 92, 95, 99)
    )
    head = "".join(f'<th scope="col">{escape(LABELS.get(n, n))}</th>' for n in kinds if n in curves)
    first = '<th scope="col">confidence percentile</th>'
    table = f"<table><thead><tr>{first}{head}</tr></thead><tbody>{numbers}</tbody></table>"
    return (
        f"<section><h2>Accuracy against confidence</h2><figure>{drawing}{draw_legend([*reversed(lines), everything])}"
        "<figcaption>How many answers are right if only those at or above a confidence percentile count. "
        f"Bands: 95 %.</figcaption></figure><details><summary>Numbers</summary>{table}</details></section>"
    )


def draw_reliability(report: Report) -> str:
    """Return how often answers are right against the probability given; empty where there are no probabilities."""
    given = {name: p for name, p in report.probabilities.items() if p.reliability}
    if not given:
        return ""
    kinds = {"p_correct": "main", "sequence probability": "other", "p_true": "third"}
    lines = []
    for name, p in reversed(given.items()):
        bins = p.reliability
        dots = [4.0] * len(bins)
        lines.append(
            Series(name, [b.confidence for b in bins], [b.accuracy for b in bins], kind=kinds[name], dots=dots)
        )
    ideal = Series("as often as promised", [0, 1], [0, 1], kind="guide")
    drawing = draw_plot(
        [ideal, *lines],
        title="Reliability",
        description="How often answers are right, against the probability of being right that was given to them.",
        x_label="probability given", y_label="right",
    )  # fmt: skip
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(map(render_cell, (p.ece, p.brier, p.nll)))}</tr>'
        for name, p in given.items()
    )
    table = wrap_scrolling(
        "Calibration errors",
        '<table><thead><tr><td></td><th scope="col">ECE</th><th scope="col">Brier</th>'
        f'<th scope="col">log loss</th></tr></thead><tbody>{rows}</tbody></table>',
    )
    first = next(iter(given.values()))
    caption = f"Each dot stands for equally many answers. ECE over {first.bins} bins {first.binning}."
    return (
        f"<section><h2>Reliability</h2><figure>{drawing}{draw_legend([*reversed(lines), ideal])}"
        f"<figcaption>{caption}</figcaption></figure>{table}</section>"
    )
