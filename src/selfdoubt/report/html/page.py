"""Renders a report as one HTML file that needs no network and no library. Only its own script runs in it.

Text of models and people is escaped where it is put in; the script reads it from JSON in which no tag can begin, and
adds it as text only. A content security policy allows this script and this style by their hashes and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from selfdoubt.eval.records import Record
from selfdoubt.lm.risk_levels import BOUNDS, COLOURS, find_risk_level
from selfdoubt.report.html.plots import draw_curves, draw_reliability
from selfdoubt.report.html.tables import (
    format_percent_html,
    render_abstention,
    render_samples,
    render_scores,
    render_settings,
    render_topics,
)
from selfdoubt.report.measure import get_risk
from selfdoubt.report.results import NoAbstention, Report
from selfdoubt.report.summary import LABELS
from selfdoubt.risk import percentile

#: Answers in each of the two lists of surprises.
SURPRISES = 10
LONGEST_PASSAGE = 1200


def render_page(records: Sequence[Record], report: Report) -> str:
    """Return the whole page.

    Args:
        records: All answers, in the order of their file.
        report: The report of these answers.
    """
    style = _read_file("page.css") + ":root{" + "".join(f"--t{i}:{c};" for i, c in enumerate(COLOURS)) + "}"
    script = _read_file("page.js")
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    ranks = _rank(records, report.verdict.score)
    data = {"bounds": BOUNDS, "answers": [_to_row(r, rank) for r, rank in zip(records, ranks, strict=True)]}
    name = _name_run(report)
    body = [
        f"<h1>{escape(name)}</h1>",
        _render_verdict(report),
        _render_plots(report),
        f"<h2>Scores</h2><p>{_explain_scores(report)}</p>{render_scores(report)}",
        f'<div class="pair">{render_abstention(report)}{render_samples(report)}</div>',
        render_topics(report),
        _render_surprises(records, ranks),
        _render_list(records),
        _describe_method(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(name)}</title><style>{style}</style></head>\n<body><main>{''.join(body)}</main>\n"
        f'<script type="application/json" id="data">{embed_json(data)}</script>\n'
        f"<script>{script}</script>\n</body></html>\n"
    )


def embed_json(data: Any) -> str:
    """Return JSON that may stand inside of a script element: ASCII without a character that could begin a tag.

    Example:
        >>> embed_json("</script>")
        '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read_file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _name_run(report: Report) -> str:
    run = report.run
    model = " + ".join(name for name in (run.model, run.adapter) if name)
    return f"selfdoubt: {model or 'a model'} on {run.data or 'a set of questions'}"


def _render_verdict(report: Report) -> str:
    counts, accuracy = report.counts, report.accuracy
    numbers = [(f"{counts.asked}", "asked")]
    if accuracy.value is not None and accuracy.low is not None and accuracy.high is not None:
        ends = f"right, {100 * accuracy.low:.0f} to {100 * accuracy.high:.0f} %"
        numbers.append((format_percent_html(accuracy.value), f"{ends}, of the judged" if counts.unjudged else ends))
    numbers.append((f"{counts.unjudged}", "unjudged"))
    if not isinstance(report.abstention, NoAbstention):
        numbers.append((f"{counts.abstained}", "abstained"))
    tiles = "".join(f"<li><b>{value}</b>{escape(text)}</li>" for value, text in numbers)
    text = "".join(f"<p>{escape(s)}</p>" for s in report.verdict.sentences).replace(" %", "&nbsp;%")
    reasons = "".join(f"<li>{n}: {escape(why)}</li>" for why, n in counts.unjudged_because.items())
    why = f'<details><summary>Why unjudged</summary><ul class="plain">{reasons}</ul></details>' if reasons else ""
    return f'<section class="verdict" aria-label="Result">{text}</section><ul class="numbers">{tiles}</ul>{why}'


def _render_plots(report: Report) -> str:
    figures = [figure for figure in (draw_curves(report), draw_reliability(report)) if figure]
    return f'<div class="pair">{"".join(figures)}</div>' if figures else ""


def _explain_scores(report: Report) -> str:
    base = LABELS.get(report.baseline, report.baseline)
    return (
        f"PRR is 1 for the best possible order of the answers and 0 for a random one; AUROC 1 and 0.5. Under each "
        f"number its 95 % interval. A difference to {escape(base)} counts where its interval leaves out zero. "
        "A click on a title sorts."
    )


def _rank(records: Sequence[Record], score: str | None) -> list[float | None]:
    """Return the share of these answers with a lower risk; ties count half."""
    risks = [None if score is None else get_risk(r, score) for r in records]
    known = sorted(v for v in risks if v is not None)
    return [None if v is None else percentile(v, known) for v in risks]


def _to_row(record: Record, rank: float | None) -> dict[str, Any]:
    """Return an answer for the page's list, without entries that are None."""
    q = record.question
    right = None if record.correct is None else int(record.correct)
    accepted = q.answers or tuple(q.choices[i] for i in q.right if i < len(q.choices))
    row = {
        "i": q.id, "q": q.text, "a": record.answer, "v": right, "o": q.topic, "w": record.abstain, "n": record.note,
        "h": _round(rank), "p": _round(record.percentile), "k": _round(record.p_correct),
        "s": list(accepted) or None, "c": q.context and _cut(q.context),
        "t": [[text, _round(risk)] for text, risk in _tokens(record)] or None,
        "m": [[s.text, _round(s.risk), None if s.correct is None else int(s.correct)] for s in record.samples] or None,
    }  # fmt: skip
    return {key: value for key, value in row.items() if value is not None or key in ("a", "v")}


def _tokens(record: Record) -> Sequence[tuple[str, float]]:
    """Return the answer's tokens if their texts add up to the answer, else none."""
    whole = "".join(text for text, _ in record.tokens).strip()
    return record.tokens if record.answer is not None and whole == record.answer.strip() else ()


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_PASSAGE else text[:LONGEST_PASSAGE] + " …"


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _render_surprises(records: Sequence[Record], ranks: Sequence[float | None]) -> str:
    known = [(rank, r) for r, rank in zip(records, ranks, strict=True) if rank is not None]
    right = sorted((p for p in known if p[1].correct is True), key=lambda p: -p[0])[:SURPRISES]
    wrong = sorted((p for p in known if p[1].correct is False), key=lambda p: p[0])[:SURPRISES]
    if not known:
        return ""
    swatches = "".join(
        f'<li><span class="t t{i}">{text}</span></li>'
        for i, text in enumerate(["sure", *(f"over {bound:g}" for bound in BOUNDS)])
    )
    return (
        "<h2>Where risk was mistaken</h2><p>Each token in the colour of its risk, in nats.</p>"
        f'<ul class="legend">{swatches}</ul>'
        f'<div class="pair"><section><h3>The riskiest right answers</h3>{_render_answers(right)}</section>'
        f"<section><h3>The safest wrong answers</h3>{_render_answers(wrong)}</section></div>"
    )


def _render_answers(ranked: Sequence[tuple[float, Record]]) -> str:
    if not ranked:
        return "<p>There are none.</p>"
    return f'<ul class="answers">{"".join(_render_answer(r, rank) for rank, r in ranked)}</ul>'


def _render_answer(record: Record, rank: float) -> str:
    tokens = _tokens(record)
    text = (
        "".join(
            f'<span class="t t{find_risk_level(risk)}" title="{risk:.3f} nats">{escape(t)}</span>' for t, risk in tokens
        )
        if tokens
        else "<em>no answer</em>" if record.answer is None else escape(record.answer)
    )  # fmt: skip
    verdict = '<span class="right">✓ right</span>' if record.correct else '<span class="wrong">✗ wrong</span>'
    facts = [verdict, f"<span>riskier than {format_percent_html(round(rank, 3))} of these answers</span>"]
    facts += (
        [f"<span>p_correct {format_percent_html(round(record.p_correct, 2))}</span>"]
        if record.p_correct is not None
        else []
    )
    facts += (
        [f"<span>accepted: {escape(' · '.join(record.question.answers[:4]))}</span>"] if record.question.answers else []
    )
    return (
        f'<li><p class="ask" dir="auto">{escape(record.question.text)}</p><p class="say" dir="auto">{text}</p>'
        f'<p class="facts">{"".join(facts)}</p></li>'
    )


def _render_list(records: Sequence[Record]) -> str:
    topics = sorted({r.question.topic for r in records if r.question.topic is not None})
    choice = [("all", "all"), ("right", "right"), ("wrong", "wrong"), ("unjudged", "unjudged")]
    if any(r.abstain is not None for r in records):
        choice += [("abstained", "abstained"), ("answered", "answered, not abstained")]
    options = "".join(f'<option value="{value}">{text}</option>' for value, text in choice)
    topic = "".join(f'<option value="={escape(t)}">{escape(t)}</option>' for t in topics)
    pick = f'<label>Topic<select name="topic"><option value="">all</option>{topic}</select></label>' if topics else ""
    return (
        "<h2>All answers</h2><noscript><p>The list needs JavaScript; answers.jsonl holds the same.</p></noscript>"
        '<form id="filters" class="filters" hidden><label>Search<input name="words" type="search" autocomplete="off">'
        f'</label><label>Judged<select name="judgement">{options}</select></label>{pick}'
        '<label>Order<select name="order"><option value="file">as asked</option><option value="riskiest">riskiest first'
        '</option><option value="surest">surest first</option></select></label></form>'
        '<p id="count" class="faint" role="status"></p><ul id="answers" class="answers"></ul>'
        '<p><button id="more" class="plain" type="button" hidden>Show more</button></p>'
    )


def _describe_method(report: Report) -> str:
    hidden = ("costs", "promise", "conditions")
    settings = [(k, v) for k, v in report.run.to_json().items() if k not in hidden and v is not None]
    costs = [
        (f"cost of {name}", f"{c.seconds:.1f} s in all; passes per question: {c.passes:.3g}")
        for name, c in (report.run.costs or {}).items()
    ]
    return (
        "<h2>How it was measured</h2><p>Scores grow with doubt; p_correct ranks by 1 - p_correct. Equal scores share "
        "their mean accuracy, so the order of the file does not matter. Wrong is the positive class of AUROC and "
        "AUPRC. Unjudged answers are not counted. Intervals: bootstrap over questions, "
        f"{report.draws} draws, seed {report.seed}, the same draws for every score; accuracies: Wilson.</p>"
        f"{render_settings([*settings, *costs])}"
    )
