"""Renders the tables of a report's page as HTML. All text of models and people is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from selfdoubt.formatting import format_percent
from selfdoubt.metrics import Estimate
from selfdoubt.report.results import NoAbstention, NoSamples, Report, ScoreResults, UntilConfident
from selfdoubt.report.summary import LABELS, describe_promise

_DECISIONS = {
    "omniscience_index": "Omniscience index (right less wrong)",
    "hallucination_rate": "hallucination rate (wrong of the not right)",
    "abstention_precision": "precision of abstaining",
    "abstention_recall": "recall of abstaining",
    "abstention_f1": "F1 of abstaining",
}
#: Rows of scores that are visible before a click.
SHOWN_SCORES = 12
#: Key, title of the column, True for a share in percent, True if less is better.
COLUMNS = (
    ("prr", "PRR", False, False),
    ("against prr", "PRR against<br>sequence prob.", False, False),
    ("auroc", "AUROC", False, False),
    ("against auroc", "AUROC against<br>sequence prob.", False, False),
    ("cost ratio", "Cost, in times<br>the answer's", False, True),
    ("accuracy_at_1", "Right among<br>the surest 1 %", True, False),
    ("accuracy_at_8", "surest 8 %", True, False),
    ("accuracy_at_9", "surest 9 %", True, False),
    ("accuracy_at_35", "surest 35 %", True, False),
    ("coverage_at_100", "Answered at<br>100 % right", True, False),
    ("coverage_at_95", "95 % right", True, False),
    ("coverage_at_90", "90 % right", True, False),
    ("coverage_at_80", "80 % right", True, False),
    ("coverage_at_70", "70 % right", True, False),
    ("prr_50", "PRR@0.5", False, False),
    ("auprc", "AUPRC", False, False),
    ("aurc", "AURC", False, True),
    ("auarc", "AUARC", False, False),
    ("cost passes", "Passes", False, True),
    ("cost seconds", "Seconds", False, True),
    ("judged", "Judged", False, False),
)


def render_scores(report: Report) -> str:
    """Return a table of all scores, the highest PRR first, sortable by every column."""
    scores = report.scores
    order = sorted(scores, key=lambda name: -_or(scores[name].metrics["prr"].value, -9e9))
    keep = {*order[:SHOWN_SCORES], report.baseline, report.verdict.score, *(n for n in order if n in LABELS)}
    head = "".join(_head(title, less=less, sorted_by=key == "prr") for key, title, _, less in COLUMNS)
    rows = "".join(_render_score(name, scores[name], report, hidden=name not in keep) for name in order)
    rest = sum(name not in keep for name in order)
    button = f'<p><button class="plain" data-shows="scores">Show all {len(order)} scores</button></p>' if rest else ""
    return (
        wrap_scrolling(
            "Scores",
            f'<table id="scores" class="short"><caption hidden>Scores</caption><thead><tr>'
            f"{_head('Score', less=True)}{head}</tr></thead><tbody>{rows}</tbody></table>",
        )
        + button
        + _list_left_out(report)
    )


def _head(title: str, *, less: bool, sorted_by: bool = False) -> str:
    """Return a title that sorts, ``less``: the least first."""
    first, now = "ascending" if less else "descending", ' aria-sort="descending"' if sorted_by else ""
    return f'<th scope="col" data-first="{first}"{now}><button>{title}</button></th>'


def wrap_scrolling(name: str, table: str) -> str:
    """Return a table that scrolls inside of the page, with a keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">{table}</div>'


def _render_score(name: str, score: ScoreResults, report: Report, *, hidden: bool) -> str:
    kinds = [
        kind
        for kind, is_it in (
            ("rest", hidden),
            ("base", name == report.baseline),
            ("claim", name == report.verdict.score),
        )
        if is_it
    ]
    cells = []
    for key, _, share, _ in COLUMNS:
        group, _, part = key.rpartition(" ")
        if key == "judged":
            cells.append(_render_number(score.judged, f"{score.judged}"))
        elif group == "cost":
            cells.append(_render_cost(getattr(score.cost, part), digits_only=part == "passes"))
        elif group == "against":
            difference = score.against.get(part)
            cells.append(
                _render_number(None, "baseline" if name == report.baseline else "-")
                if difference is None
                else render_cell(difference, signed=True)
            )
        else:
            cells.append(render_cell(score.metrics[key], share=share))
    below = [name] if name in LABELS and name not in LABELS[name] else []
    below += [f"{score.judged} of {report.counts.judged} answers"] if score.note else []
    small = "".join(f"<small>{break_at_underscores(text)}</small>" for text in below)
    title = f' title="{escape(score.note)}"' if score.note else ""
    return (
        f'<tr class="{" ".join(kinds)}" data-score="{escape(name)}"><th scope="row" data-v="{escape(name)}"{title}>'
        f"{break_at_underscores(LABELS.get(name, name))}{small}</th>{''.join(cells)}</tr>"
    )


def break_at_underscores(name: str) -> str:
    """Return a name that may be broken after its underscores, if it has no spaces."""
    return escape(name) if " " in name else escape(name).replace("_", "_<wbr>")


def _list_left_out(report: Report) -> str:
    if not report.left_out:
        return ""
    items = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in report.left_out.items())
    return f'<details><summary>Left out: {len(report.left_out)}</summary><ul class="plain">{items}</ul></details>'


def render_cell(estimate: Estimate, *, share: bool = False, signed: bool = False) -> str:
    """Return a table cell of a number with its interval; a dash, which says why, where there is none."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None or low is None or high is None:
        return f'<td title="{escape(estimate.note or "")}">-</td>'
    if share:
        text, ends = format_percent_html(value), f"{100 * low:.0f} to {100 * high:.0f}"
    else:
        sign = "+" if signed else ""
        text, ends = f"{value:{sign}.3f}", f"{low:{sign}.3f} to {high:{sign}.3f}"
    return f'<td data-v="{value:.6g}">{text}<small>{ends}</small></td>'


def format_percent_html(share: float | None) -> str:
    """Return a share in percent, fit for HTML."""
    return escape(format_percent(share)).replace(" ", "&nbsp;")


def _render_number(value: float | None, text: str) -> str:
    plain = "" if value is None else f"{value:.6g}"
    return f'<td data-v="{plain}">{text}</td>'


def _render_cost(value: float | None, *, digits_only: bool) -> str:
    text = "unknown" if value is None else f"{value:.3g}" if digits_only else _short(value)
    return _render_number(value, text)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def render_topics(report: Report) -> str:
    """Return a table with one row per topic; empty where no question has one."""
    if not report.topics:
        return ""
    shown = [name for name in report.curves if name in report.topics[0].prr]
    decided = any(t.answered is not None for t in report.topics)
    titles = ["Topic", "Judged", "Right", *(f"PRR<br>{escape(LABELS.get(n, n))}" for n in shown)]
    titles += [f"Answered at 90 %<br>right, {escape(LABELS.get(n, n))}" for n in shown]
    titles += ["Answered at<br>the threshold", "Right<br>of these"] if decided else []
    head = "".join(_head(title, less=i == 0) for i, title in enumerate(titles))
    rows = []
    for topic in report.topics:
        cells = [_render_number(topic.judged, str(topic.judged)), render_cell(topic.accuracy, share=True)]
        cells += [render_cell(topic.prr[name]) for name in shown]
        cells += [render_cell(topic.coverage_at_90[name], share=True) for name in shown]
        if decided:
            answered = topic.answered or 0
            cells += [_render_share(answered, topic.judged), _render_share(topic.answered_right, answered)]
        name = escape(topic.topic)
        rows.append(f'<tr><th scope="row" data-v="{name}" dir="auto">{name}</th>{"".join(cells)}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<h2>Topics</h2>{wrap_scrolling('Topics', table)}"


def _render_share(part: int, whole: int) -> str:
    """Return a table cell of a share without an interval; a dash where there is nothing to share."""
    return _render_share_alone(part / whole) if whole else _render_number(None, "-")


def render_samples(report: Report) -> str:
    """Return the section on several answers per question; empty if none were drawn."""
    samples = report.samples
    if isinstance(samples, NoSamples):
        why = f"<section><h2>Several answers</h2><p>{escape(samples.why)}.</p></section>"
        return why if samples.drawn else ""
    accuracies = {
        "the one answer that was not drawn": samples.one_answer,
        "the least risky of them": samples.least_risky,
        "what most of them say": samples.majority,
        "any of them": samples.random,
        "the most risky of them": samples.most_risky,
    }
    left = f", {samples.unjudged} more have an unjudged one" if samples.unjudged else ""
    drawn = f"For {samples.questions} questions up to {samples.samples} answers were drawn{left}."
    return (
        f"<section><h2>Several answers</h2><p>{drawn}</p>{_render_small_table('Right', accuracies)}"
        f"<p>{_describe_until_confident(samples.until_confident)}</p></section>"
    )


def _describe_until_confident(until: UntilConfident) -> str:
    cost = "" if until.cost.ratio is None else f", {until.cost.ratio:.1f} times the seconds of one answer"
    accuracy = until.accuracy
    right = (
        "none is that sure, so its accuracy is undefined."
        if accuracy.value is None or accuracy.low is None or accuracy.high is None
        else f"{format_percent_html(accuracy.value)} of those are right "
        f"({100 * accuracy.low:.0f} to {100 * accuracy.high:.0f} %)."
    )
    return (
        f"Drawing until an answer is in the 99 % confidence percentile of {escape(until.reference)} gets there for "
        f"{format_percent_html(until.reached.value)} of the questions, in {until.mean_tries.value:.1f} tries each"
        f"{cost}; {right}"
    )


def render_abstention(report: Report) -> str:
    """Return the section on the threshold, its guarantee and the worth of abstaining; empty without a p_correct."""
    abstention = report.abstention
    if isinstance(abstention, NoAbstention):
        worth = render_utilities(report)
        return f"<section><h2>Abstention</h2>{worth}</section>" if worth else ""
    shares = {
        "answered": abstention.coverage,
        "right of the answered": abstention.accuracy,
        "right of the abstained": abstention.accuracy_abstained,
    }
    at = "" if abstention.threshold is None else f" at p_correct of {abstention.threshold:.3f}"
    promise = describe_promise(abstention)
    promised = "" if promise is None else f" It promises {escape(promise).replace(' %', '&nbsp;%')}."
    text = f"The threshold{at} answers {abstention.answered} of {abstention.decided} questions.{promised}"
    tables = _render_small_table("Share", shares)
    if abstention.metrics is not None:
        tables += _render_small_table("Value", {_DECISIONS[k]: e for k, e in abstention.metrics.items()}, share=False)
    return f"<section><h2>Abstention</h2><p>{text}</p>{tables}{render_utilities(report)}</section>"


def render_utilities(report: Report) -> str:
    """Return a table of the worth per question by price of a wrong answer; empty without a p_correct."""
    if not report.utilities:
        return ""
    decided = any(entry.threshold is not None for entry in report.utilities)
    titles = ["Price of<br>a wrong answer", "Answer<br>all", *(["At the<br>threshold"] if decided else [])]
    titles += ["p_correct above<br>price / (1 + price)", "answered", "Best threshold<br>on these answers", "answered"]
    rows = []
    for entry in report.utilities:
        cells = [render_cell(entry.answer_all, signed=True)]
        if decided:
            cells += [
                _render_number(None, "-") if entry.threshold is None else render_cell(entry.threshold, signed=True)
            ]
        cells += [render_cell(entry.rule, signed=True), _render_share_alone(entry.rule_coverage)]
        cells += [render_cell(entry.best, signed=True), _render_share_alone(entry.best_coverage)]
        rows.append(f'<tr><th scope="row">{entry.price:g}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (
        "<p>Worth per question: a right answer counts 1, none 0, a wrong one minus its price.</p>"
        f"{wrap_scrolling('Utility', table)}"
    )


def _render_share_alone(share: float) -> str:
    return _render_number(share, format_percent_html(share))


def _render_small_table(title: str, shares: Mapping[str, Estimate], *, share: bool = True) -> str:
    rows = "".join(f'<tr><th scope="row">{text}</th>{render_cell(e, share=share)}</tr>' for text, e in shares.items())
    head = f'<tr><td></td><th scope="col">{title}</th></tr>'
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def render_settings(pairs: Sequence[tuple[str, Any]]) -> str:
    """Return a list of settings."""
    rows = "".join(f'<tr><th scope="row">{escape(k)}</th><td dir="auto">{escape(str(v))}</td></tr>' for k, v in pairs)
    return f'<table class="settings"><tbody>{rows}</tbody></table>'
