"""The tables of a report's page, as HTML text. Everything that a model or a person wrote is escaped here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from selfdoubt.report.summary import LABELS, percent

Entry = Mapping[str, Any]
#: How many rows of scores are seen before a click.
FEW = 12
#: Key, what stands above the column, whether it is a share in percent, and whether less is better.
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


def scores(report: Mapping[str, Any]) -> str:
    """All scores, the highest PRR first, sortable by every column."""
    found, verdict = report["scores"], report["verdict"]
    order = sorted(found, key=lambda name: -_or(found[name]["metrics"]["prr"]["value"], -9e9))
    keep = {*order[:FEW], report["baseline"], verdict["score"], *(n for n in order if n in LABELS)}
    head = "".join(_head(title, less=less, sorted_by=key == "prr") for key, title, _, less in COLUMNS)
    rows = "".join(_score(name, found[name], report, hidden=name not in keep) for name in order)
    rest = sum(name not in keep for name in order)
    button = f'<p><button class="plain" data-shows="scores">Show all {len(order)} scores</button></p>' if rest else ""
    return (
        scrolled(
            "Scores",
            f'<table id="scores" class="short"><caption hidden>Scores</caption><thead><tr>'
            f"{_head('Score', less=True)}{head}</tr></thead><tbody>{rows}</tbody></table>",
        )
        + button
        + _left_out(report)
    )


def _head(title: str, *, less: bool, sorted_by: bool = False) -> str:
    """A title that sorts, ``less``: the least first."""
    first, now = "ascending" if less else "descending", ' aria-sort="descending"' if sorted_by else ""
    return f'<th scope="col" data-first="{first}"{now}><button>{title}</button></th>'


def scrolled(name: str, table: str) -> str:
    """A table that scrolls inside of the page, with a keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0">{table}</div>'


def _score(name: str, own: Mapping[str, Any], report: Mapping[str, Any], *, hidden: bool) -> str:
    kinds = [
        kind
        for kind, is_it in (
            ("rest", hidden),
            ("base", name == report["baseline"]),
            ("claim", name == report["verdict"]["score"]),
        )
        if is_it
    ]
    cells = []
    for key, _, share, _ in COLUMNS:
        group, _, part = key.rpartition(" ")
        if key == "judged":
            cells.append(_number(own["judged"], f"{own['judged']}"))
        elif group == "cost":
            value = own["cost"][part]
            cells.append(
                _number(value, "unknown" if value is None else f"{value:.3g}" if part == "passes" else _short(value))
            )
        elif group == "against":
            entry = own["against"].get(part)
            cells.append(
                _number(None, "baseline" if name == report["baseline"] else "-")
                if entry is None
                else cell(entry, signed=True)
            )
        else:
            cells.append(cell(own["metrics"][key], share=share))
    below = [name] if name in LABELS and name not in LABELS[name] else []
    below += [f"{own['judged']} of {report['counts']['judged']} answers"] if own["note"] else []
    small = "".join(f"<small>{broken(text)}</small>" for text in below)
    title = f' title="{escape(own["note"])}"' if own["note"] else ""
    return (
        f'<tr class="{" ".join(kinds)}" data-score="{escape(name)}"><th scope="row" data-v="{escape(name)}"{title}>'
        f"{broken(LABELS.get(name, name))}{small}</th>{''.join(cells)}</tr>"
    )


def broken(name: str) -> str:
    """A name that may be broken after its underscores, if it has no spaces."""
    return escape(name) if " " in name else escape(name).replace("_", "_<wbr>")


def _left_out(report: Mapping[str, Any]) -> str:
    found = report["left_out"]
    if not found:
        return ""
    items = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in found.items())
    return f'<details><summary>Left out: {len(found)}</summary><ul class="plain">{items}</ul></details>'


def cell(entry: Entry, *, share: bool = False, signed: bool = False) -> str:
    """A table cell of a number with its interval; a dash, which says why, where there is none."""
    value, low, high = entry["value"], entry["low"], entry["high"]
    if value is None:
        return f'<td title="{escape(entry["why"])}">-</td>'
    if share:
        text, ends = as_percent(value), f"{100 * low:.0f} to {100 * high:.0f}"
    else:
        sign = "+" if signed else ""
        text, ends = f"{value:{sign}.3f}", f"{low:{sign}.3f} to {high:{sign}.3f}"
    return f'<td data-v="{value:.6g}">{text}<small>{ends}</small></td>'


def as_percent(share: float | None) -> str:
    """A share in percent, fit for HTML."""
    return escape(percent(share)).replace(" ", "&nbsp;")


def _number(value: float | None, text: str) -> str:
    plain = "" if value is None else f"{value:.6g}"
    return f'<td data-v="{plain}">{text}</td>'


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def topics(report: Mapping[str, Any]) -> str:
    """One row a topic; empty where no question has one."""
    found = report["topics"]
    if not found:
        return ""
    shown = [name for name in report["curves"] if name in found[0]["prr"]]
    answered = any(t["answered"] is not None for t in found)
    titles = ["Topic", "Judged", "Right", *(f"PRR<br>{escape(LABELS.get(n, n))}" for n in shown)]
    titles += [f"Answered at 90 %<br>right, {escape(LABELS.get(n, n))}" for n in shown]
    titles += ["Answered at<br>the threshold", "Right<br>of these"] if answered else []
    head = "".join(_head(title, less=i == 0) for i, title in enumerate(titles))
    rows = []
    for topic in found:
        cells = [_number(topic["judged"], str(topic["judged"])), cell(topic["accuracy"], share=True)]
        cells += [cell(topic["prr"][name]) for name in shown]
        cells += [cell(topic["coverage_at_90"][name], share=True) for name in shown]
        if answered:
            given, right = topic["answered"] or 0, topic["answered_right"]
            cells += [_number(given / topic["judged"], as_percent(given / topic["judged"]))]
            cells += [_number(right / given, as_percent(right / given)) if given else _number(None, "-")]
        name = escape(topic["topic"])
        rows.append(f'<tr><th scope="row" data-v="{name}" dir="auto">{name}</th>{"".join(cells)}</tr>')
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<h2>Topics</h2>{scrolled('Topics', table)}"


def samples(report: Mapping[str, Any]) -> str:
    """What further answers are worth; empty where none were drawn."""
    found = report["samples"]
    if "why" in found:
        why = f"<section><h2>Several answers</h2><p>{escape(found['why'])}.</p></section>"
        return why if found["drawn"] else ""
    names = {
        "one_answer": "the one answer that was not drawn",
        "least_risky": "the least risky of them",
        "majority": "what most of them say",
        "random": "any of them",
        "most_risky": "the most risky of them",
    }
    rows = "".join(f'<tr><th scope="row">{text}</th>{cell(found[key], share=True)}</tr>' for key, text in names.items())
    sure = found["until_sure"]
    ratio = sure["cost"]["ratio"]
    cost = "" if ratio is None else f", {ratio:.1f} times the seconds of one answer"
    until = (
        f"Drawing until an answer is in the 99 % confidence percentile of {escape(sure['reference'])} gets there for "
        f"{as_percent(sure['reached']['value'])} of the questions, in {sure['tries']['value']:.1f} tries each{cost}; "
    )
    right = sure["accuracy"]
    until += (
        "none is that sure, so its accuracy is undefined."
        if right["value"] is None
        else f"{as_percent(right['value'])} of those are right "
        f"({100 * right['low']:.0f} to {100 * right['high']:.0f} %)."
    )
    left = f", {found['unjudged']} more have an unjudged one" if found["unjudged"] else ""
    drawn = f"For {found['questions']} questions up to {found['samples']} answers were drawn{left}."
    return f"<section><h2>Several answers</h2><p>{drawn}</p>{_small_table('Right', rows)}<p>{until}</p></section>"


def abstention(report: Mapping[str, Any]) -> str:
    """What the threshold does; empty where there is none."""
    found = report["abstention"]
    if "why" in found:
        return ""
    names = {"coverage": "answered", "accuracy": "right of the answered", "accuracy_withheld": "right of the withheld"}
    rows = "".join(f'<tr><th scope="row">{text}</th>{cell(found[key], share=True)}</tr>' for key, text in names.items())
    at = "" if found["threshold"] is None else f" at p_correct of {found['threshold']:.3f}"
    promise = ""
    if found["promise"] and "target_accuracy" in found["promise"]:
        own = found["promise"]
        sure = f", with confidence {as_percent(own['confidence'])}" if "confidence" in own else ""
        promise = (
            f" It promised {as_percent(own['target_accuracy'])} right{sure}, on questions like those it was set with."
        )
    said = f"The threshold{at} answers {found['answered']} of {found['decided']} questions.{promise}"
    return f"<section><h2>Abstention</h2><p>{said}</p>{_small_table('Share', rows)}</section>"


def _small_table(title: str, rows: str) -> str:
    head = f'<tr><td></td><th scope="col">{title}</th></tr>'
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def settings(pairs: Sequence[tuple[str, Any]]) -> str:
    """A list of settings."""
    rows = "".join(f'<tr><th scope="row">{escape(k)}</th><td dir="auto">{escape(str(v))}</td></tr>' for k, v in pairs)
    return f'<table class="settings"><tbody>{rows}</tbody></table>'
