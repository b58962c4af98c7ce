"""The tables of what voters are worth, next to one LoRA of equal cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import results
from benchmarks.quality_tables import format_value, pick_row, select_rows

Rows = list[dict[str, Any]]
#: The head that reads surprisal and entropy of answer and question alone.
WITHOUT = "question"
#: Least gain in PRR that counts.
WORTH = 0.01
SHOWN = (
    "sum_nll", "mean_nll", "mean_total", "both_mean_total", "question_mean_nll", "sum_epistemic", "mean_epistemic",
    "question_mean_epistemic", "base_nll", "base_gain",
)  # fmt: skip


def table(record: Mapping[str, Any]) -> str:
    """Return accuracy of each arm, scores without labels, heads with and without members, and arms against LoRA."""
    every, settings = record["rows"], record["settings"]
    arms = "; ".join(f"`{name}`: {settings['arms'][name]}" for name in _names(every, "arm") if name in settings["arms"])
    asked = ", ".join(f"{n} of {name}" for name, n in settings["questions"].items())
    drawn = (
        " Samples hold more of the questions that the plain model had answered right before than of the others; "
        "accuracies are weighted back to the whole set, ranking metrics are of the sample."
        if settings["balanced"]
        else ""
    )
    note = (
        f"{arms}. {settings['steps']} steps of {settings['step_rows']} row passes, learning rate {settings['lr']}; "
        f"{asked}.{drawn} Intervals are 95 % bootstrap intervals over questions; commit {record['commit']}, "
        f"{record['device']}."
    )
    parts = [note]
    for judge in _names(every, "judge"):
        rows = select_rows(every, judge=judge)
        parts += [f"**Judged by `{judge}`**", _accuracy(rows), _label_free(rows), _heads(rows), _against_lora(rows)]
        parts += [_verdict(rows)]
    return "\n\n".join(part for part in parts if part)


def _accuracy(rows: Rows) -> str:
    cells = []
    for row in select_rows(rows, kind="accuracy"):
        gaps = [
            f"{100 * row[f'to {a}']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})" if f"to {a}" in row else "-"
            for a in ("plain", "lora")
            for low, high in [row.get(f"to {a}, interval", (0, 0))]
        ]
        low, high = row["interval"]
        value = f"{100 * row['value']:.1f} ({100 * low:.1f}-{100 * high:.1f})"
        cells.append([f"{row['trained on']}, {row['arm']}: {row['tested on']}", value, *gaps])
    return results.markdown(["trained on, arm: right answers, %", "", "to plain", "to one LoRA"], cells)


def _label_free(rows: Rows) -> str:
    cells = []
    free = select_rows(rows, kind="label-free")
    for trained, arm in dict.fromkeys((r["trained on"], r["arm"]) for r in free):
        some = select_rows(free, **{"trained on": trained, "arm": arm})
        sets = _names(some, "tested on")
        for score in SHOWN:
            picked = [
                pick_row(some, **{"tested on": s, "score": score, "metric": m}) for s in sets for m in ("auroc", "prr")
            ]
            if any(picked):
                values = [format_value(r, gain=i % 2 == 1) for i, r in enumerate(picked)]
                cells.append([f"{trained}, {arm}: `{score}`", *values])
    head = [f"{s}: {m}" for s in _names(free, "tested on") for m in ("AUROC", "PRR (to `sum_nll`)")]
    return results.markdown(["trained on, arm: score, no labels", *head], cells) if cells else ""


def _heads(rows: Rows) -> str:
    cells = []
    of_heads = select_rows(rows, kind="head")
    for trained, arm, learnt, tested in dict.fromkeys(
        (r["trained on"], r["arm"], r["fitted on"], r["tested on"]) for r in of_heads
    ):
        about = {"trained on": trained, "arm": arm, "fitted on": learnt, "tested on": tested}
        some = select_rows(of_heads, **about)
        for score in _names(some, "score"):
            auroc, prr = (pick_row(some, score=score, metric=m) for m in ("auroc", "prr"))
            cells.append([
                f"{trained}, {arm}, {learnt} -> {tested}: {score}", format_value(auroc), format_value(prr, gain=True)
            ])  # fmt: skip
    head = ["trained on, arm, head fitted on -> tested on: it reads", "AUROC", f"PRR (to the head `{WITHOUT}`)"]
    return results.markdown(head, cells) if cells else ""


def _against_lora(rows: Rows) -> str:
    cells = [
        [f"{r['trained on']}, {r['arm']}, {r['fitted on']} -> {r['tested on']}: {r['score']}", r["against"],
         format_value(r, gain=True)]
        for r in select_rows(rows, kind="against lora", metric="prr")
        if r["score"] in (WITHOUT, "members", "base") and r["fitted on"] != r["tested on"]
    ]  # fmt: skip
    head = ["trained on, arm, head fitted on -> tested on: it reads", "against", "PRR (difference)"]
    return results.markdown(head, cells) if cells else ""


def _verdict(rows: Rows) -> str:
    """Return one line for each arm and head: its mean gain over the tests outside the head's domain."""
    cells = []
    outside = [r for r in select_rows(rows, kind="head", metric="prr") if r["fitted on"] != r["tested on"]]
    for trained, arm, score in dict.fromkeys((r["trained on"], r["arm"], r["score"]) for r in outside):
        some = select_rows(outside, **{"trained on": trained, "arm": arm, "score": score})
        some = [r for r in some if "gain" in r]
        if some:
            mean, low, high = pool_gains(some)
            passed = [f"{r['fitted on']} -> {r['tested on']}" for r in some if passes(r)]
            cells.append([
                f"{trained}, {arm}: {score}", f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", ", ".join(passed) or "none"
            ])  # fmt: skip
    head = ["outside the domain: further scores of the head", "mean gain in PRR", f"above {WORTH}, interval above 0"]
    return results.markdown(head, cells) if cells else ""


def _names(rows: Rows, key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows if key in row))


def pool_gains(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float, float]:
    """Return the mean gain over independent tests and its 95 % interval, from each test's own interval (normal)."""
    gains = [row["gain"] for row in rows]
    errors = [(row["gain_interval"][1] - row["gain_interval"][0]) / (2 * 1.96) for row in rows]
    mean = math.fsum(gains) / len(gains)
    half = 1.96 * math.sqrt(math.fsum(e * e for e in errors)) / len(gains)
    return mean, mean - half, mean + half


def passes(row: Mapping[str, Any]) -> bool:
    """Return whether a gain is worth having: above ``WORTH``, with its interval above zero."""
    return bool(row["gain"] > WORTH and row["gain_interval"][0] > 0)
