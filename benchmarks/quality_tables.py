"""The tables of what a risk is worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import results

#: What others ask for more passes for.
PEERS = ("p_false", "semantic_entropy", "semantic_entropy_weighted", "self_consistency")
SHOWN = (
    "sum_nll", "mean_nll", "mean_total", "sum_total", "question_mean_nll", "rank_nll", "sum_epistemic",
    "question_mean_epistemic", "sum_disagreement", "sum_scale",
)  # fmt: skip
DOMAINS = ("all", "country", "time zone", "never seen")


def table(record: Mapping[str, Any]) -> str:
    """Accuracy of each arm; scores that need no labels; peers that cost more; calibrated heads; the surest shares."""
    rows, settings = record["rows"], record["settings"]
    said = (
        f"{settings['questions']} questions in held-out phrasings, {len(settings['seeds'])} seeds, {settings['steps']} "
        f"steps of {settings['step_rows']} rows of fine-tuning each; commit {record['commit']}. Intervals are 95 % "
        "bootstrap intervals over questions."
    )
    return "\n\n".join(
        [_accuracy(settings["accuracy"]), _label_free(rows), _peers(rows), _heads(rows), _mix(rows), said]
    )


def _accuracy(accuracy: Mapping[str, Mapping[str, float]]) -> str:
    names = [n for n in next(iter(accuracy.values())) if n != "invented"]
    lines = [[arm, *(f"{own[n]:.3f}" for n in names)] for arm, own in accuracy.items()]
    return results.markdown(["right answers", *names], lines)


def _label_free(rows: list[dict[str, Any]]) -> str:
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in rows):
        own = select_rows(rows, arm=arm, part="questions")
        best = max((r for r in own if r["domain"] == "all" and r["metric"] == "prr"), key=lambda r: r["value"])["score"]
        for score in dict.fromkeys((*SHOWN, best)):
            found = [pick_row(own, score=score, domain=d, metric="prr") for d in DOMAINS]
            auroc = pick_row(own, score=score, domain="all", metric="auroc")
            if auroc is not None:
                lines.append([f"{arm}: `{score}`", format_value(auroc), *(format_value(r, gain=True) for r in found)])
    head = ["arm: score, no labels", "AUROC", *(f"PRR, {d}" for d in DOMAINS)]
    return results.markdown(head, lines) + (
        "\n\nIn brackets: the interval of AUROC; the difference in PRR to the same model's sequence probability "
        "(`sum_nll`), paired, with its interval."
    )


def _peers(rows: list[dict[str, Any]]) -> str:
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in rows if r.get("part") == "sampled"):
        own = select_rows(rows, arm=arm, part="sampled", domain="all")
        cost = pick_row(rows, arm=arm, domain="cost")
        for score in ("sum_nll", "mean_nll", *PEERS):
            row = pick_row(own, score=score, metric="prr")
            if row is not None and cost is not None:
                extra = "p_true" if score == "p_false" else "samples"
                times = 1 + (cost[f"times {extra}"] if score in PEERS else 0)
                auroc = pick_row(own, score=score, metric="auroc")
                lines.append([f"{arm}: `{score}`", format_value(auroc), format_value(row, gain=True), f"{times:.2f}x"])
    return results.markdown(["peers, on part of the questions", "AUROC", "PRR", "cost"], lines)


def _heads(rows: list[dict[str, Any]]) -> str:
    lines = []
    for domain in ("in domain", "other relations"):
        for arm in dict.fromkeys(r["arm"] for r in rows if r["domain"] == domain):
            own = select_rows(rows, arm=arm, domain=domain)
            for score in dict.fromkeys(r["score"] for r in own):
                prr = pick_row(own, score=score, metric="prr")
                auroc = pick_row(own, score=score, metric="auroc")
                lines.append([f"{domain}, {arm}: {score}", format_value(auroc), format_value(prr, gain=True)])
        lines += [
            [f"{domain}, {row['arm']}: members' scores, to the head without", "", format_value(row, gain=True)]
            for row in select_rows(rows, domain=f"{domain}, members", score="members", metric="prr")
        ]
        for peer in PEERS:
            found = select_rows(rows, domain=f"{domain}, against {peer}", score="p_correct: question", metric="prr")
            lines += [
                [f"{domain}, {r['arm']}: p_correct (question), to `{peer}`", "", format_value(r, gain=True)]
                for r in found
            ]
    return results.markdown(["calibrated head", "AUROC", "PRR (difference)"], lines)


def _mix(rows: list[dict[str, Any]]) -> str:
    lines = []
    for domain in ("mix, in domain", "mix, other relations"):
        for arm in dict.fromkeys(r["arm"] for r in rows if r["domain"] == domain):
            own = select_rows(rows, arm=arm, domain=domain)
            for score in dict.fromkeys(r["score"] for r in own):
                cells = [
                    pick_row(own, score=score, metric=m)
                    for m in (*(f"accuracy_at_{c}" for c in (1, 8, 9, 35)), "accuracy")
                ]
                lines.append([f"{domain}, {arm}: {score}", *(format_value(c) for c in cells)])
    return results.markdown(["right among the surest", "1 %", "8 %", "9 %", "35 %", "all"], lines)


def select_rows(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in rows if all(r.get(name) == value for name, value in wanted.items())]


def pick_row(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    return next(iter(select_rows(rows, **wanted)), None)


def format_value(row: Mapping[str, Any] | None, *, gain: bool = False) -> str:
    if row is None:
        return "-"
    if gain:
        if "gain" not in row:
            return f"{row['value']:.3f}"
        low, high = row["gain_interval"]
        return f"{row['value']:.3f} ({row['gain']:+.3f}, {low:+.3f} to {high:+.3f})"
    return f"{row['value']:.3f} ({row['interval'][0]:.3f}-{row['interval'][1]:.3f})"
