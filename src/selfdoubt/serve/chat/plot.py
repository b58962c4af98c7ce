"""Risk along an answer, as inline SVG. The picture stretches with the page; its words are HTML and stay readable."""

from __future__ import annotations

import math
from collections.abc import Sequence

from selfdoubt.lm.answer import Token
from selfdoubt.lm.risk_levels import COLOURS, find_risk_level

#: Tops of the y axis, in nats; above them, multiples of ten.
AXIS_TOPS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
#: Beyond this number of bars gaps between them would not be seen.
CROWDED_TOKENS = 120


def render_risk_plot(tokens: Sequence[Token], place: str = "") -> str:
    """Draw bars of the tokens' risks in their colours, a line of total doubt and a dashed one of the epistemic part.

    There is no epistemic part where all is zero: one member cannot disagree with itself.

    Args:
        tokens: Tokens of one answer; without any the picture is empty.
        place: Name of the place of these tokens, so that the page can point at one.
    """
    n = len(tokens)
    top = _top(max((max(t.risk, t.total) for t in tokens), default=0.0))
    shapes = "".join(
        f'<path class="bar b{rank}" d="{d}"/>' for rank in range(len(COLOURS)) if (d := _bars(tokens, rank, top))
    )
    shapes += f'<path class="line total" d="{_steps([t.total for t in tokens], top)}"/>' if n else ""
    epistemic = [t.epistemic for t in tokens]
    key = ""
    if any(epistemic):
        shapes += f'<path class="line epistemic" d="{_steps(epistemic, top)}"/>'
        key = '<span><i class="key epistemic"></i>epistemic</span>'
    ticks = "".join(f'<span style="bottom:{share:.0%}">{share * top:g}</span>' for share in (0.0, 0.5, 1.0))
    return (
        f'<figure class="plot{" crowded" if n > CROWDED_TOKENS else ""}" data-of="{place}" data-n="{n}">'
        f'<div class="area"><div class="ticks" aria-hidden="true">{ticks}</div>'
        f'<div class="canvas"><svg viewBox="0 0 {max(n, 1)} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{_describe(tokens)}">'
        f"{shapes}</svg></div></div>"
        f'<figcaption><span class="axis">nats, token 1 to {max(n, 1)}</span>'
        '<span><i class="key bar"></i>risk of the token</span><span><i class="key total"></i>total</span>'
        f"{key}</figcaption></figure>"
    )


def _top(highest: float) -> float:
    return next((t for t in AXIS_TOPS if highest <= t), 10.0 * math.ceil(highest / 10))


def _height(value: float, top: float) -> float:
    return min(max(value, 0.0), top) / top * 100


def _bars(tokens: Sequence[Token], rank: int, top: float) -> str:
    gap = 0.0 if len(tokens) > CROWDED_TOKENS else 0.08
    return "".join(
        f"M{i + gap:g} 100v-{max(_height(t.risk, top), 2.0):.1f}h{1 - 2 * gap:g}V100z"
        for i, t in enumerate(tokens)
        if find_risk_level(t.risk) == rank
    )


def _steps(values: Sequence[float], top: float) -> str:
    return f"M0 {100 - _height(values[0], top):.1f}" + "h1".join(
        [""] + [f"V{100 - _height(v, top):.1f}" for v in values[1:]] + [""]
    )


def _describe(tokens: Sequence[Token]) -> str:
    if not tokens:
        return "Risk along the answer: no token yet"
    worst = max(range(len(tokens)), key=lambda i: tokens[i].risk)
    epistemic = max(t.epistemic for t in tokens)
    text = (
        f"Risk along the answer: {len(tokens)} tokens, the highest {tokens[worst].risk:.2f} nats at token {worst + 1}, "
        f"total doubt up to {max(t.total for t in tokens):.2f}"
    )
    return f"{text}, epistemic up to {epistemic:.2f}" if epistemic else text
