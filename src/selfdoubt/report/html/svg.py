"""Line plots as SVG text, small enough to stand inside of a page and to follow its colours and its width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 350
LEFT, RIGHT, TOP, BOTTOM = 78, 14, 12, 52


@dataclass(frozen=True)
class Series:
    """One series; ``x`` and ``y`` are shares in [0, 1], ``low`` and ``high`` bound a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    kind: str = "main"  #: a class of the page's style: main, other or guide
    dots: Sequence[float] = ()  #: radius of a dot at each point; none: no dots


def draw_plot(lines: Sequence[Series], *, title: str, description: str, x_label: str, y_label: str) -> str:
    """Return an ``<svg>`` of lines over the unit square, both axes in percent.

    Args:
        lines: Series in the order of drawing, the last on top.
        title: Title for screen readers.
        description: Description for screen readers.
        x_label: Label of the horizontal axis.
        y_label: Label of the vertical axis.
    """
    elements = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>",
        *(_draw_grid(step / 5) for step in range(6)),
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text class="label" transform="translate(16 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>',
        *(_draw_band(s) for s in lines if s.low),
        *(_draw_line(s) for s in lines),
        "</svg>",
    ]
    return "".join(elements)


def draw_legend(lines: Sequence[Series]) -> str:
    """Return a list that names the lines, with a sample of each."""
    sample = '<svg class="sample" viewBox="0 0 28 10" aria-hidden="true"><path class="line {}" d="M1 5H27"/></svg>'
    return "".join(
        ['<ul class="legend">', *(f"<li>{sample.format(n.kind)}{escape(n.name)}</li>" for n in lines), "</ul>"]
    )


def _x(share: float) -> str:
    return f"{LEFT + share * (WIDTH - LEFT - RIGHT):.1f}"


def _y(share: float) -> str:
    return f"{HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM):.1f}"


def _draw_grid(share: float) -> str:
    """Return a horizontal rule and the numbers of both axes at this share."""
    return (
        f'<path class="grid" d="M{_x(0)} {_y(share)}H{_x(1)}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{_y(share)}" dy=".35em" text-anchor="end">{share:.0%}</text>'
        f'<text class="tick" x="{_x(share)}" y="{HEIGHT - BOTTOM + 20}" '
        f'text-anchor="{"end" if share == 1 else "middle"}">{share:.0%}</text>'
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_x(x)} {_y(y)}" for x, y in points)


def _draw_band(series: Series) -> str:
    there = list(zip(series.x, series.high, strict=True))
    back = list(zip(series.x, series.low, strict=True))[::-1]
    return f'<path class="band {series.kind}" d="{_path(there + back)}Z"/>'


def _draw_line(series: Series) -> str:
    if not series.x:
        return ""
    points = list(zip(series.x, series.y, strict=True))
    dots = "".join(
        f'<circle class="dot {series.kind}" cx="{_x(x)}" cy="{_y(y)}" r="{r:.1f}"/>'
        for (x, y), r in zip(points, series.dots, strict=False)
    )
    return f'<path class="line {series.kind}" d="{_path(points)}"/>{dots}'
