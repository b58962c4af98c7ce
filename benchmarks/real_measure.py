"""Measures what kept answers of real models say about each score, and draws the tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.real_answers import SETS, AnswerFile, list_files
from benchmarks.score_rows import METRICS, round_estimate
from selfdoubt import storage
from selfdoubt.calibration.fit import fit_calibration
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval.records import Record, add_scores
from selfdoubt.lm.scores import DEFAULT_RISK, compute_rank_scores, reference_quantiles
from selfdoubt.metrics import Estimate, compare_scores, estimate_share, paired_difference
from selfdoubt.metrics.bootstrap import estimate_mean

#: The scores that any library has: the default has to beat them.
BASELINES = ("sum_nll", "mean_nll", "mean_total")
#: Scores that need no labels and no second answer.
SHOWN = (
    *BASELINES, "max_nll", "sum_total", "question_mean_nll", "both_mean_total", "mean_margin", "mean_self_certainty",
    "rauq", "mean_layer_disagreement", "mean_density", "question_mean_density", "choice_nll",
    "choice_entropy", "sum_epistemic", "mean_epistemic", "mean_divergence", "question_mean_epistemic",
)  # fmt: skip
#: Scores of ten more answers, or of a question about the answer.
PEERS = (
    "semantic_entropy", "semantic_entropy_weighted", "self_consistency", "cocoa_sum_nll", "cocoa_mean_nll",
    "cocoa_mean_total", "p_false",
)  # fmt: skip
#: Sets on which p_correct is learnt: free answers.
LEARNT = ("webquestions", "nq", "squad2", "truthfulqa")


def measure(runs: Path, adapters: Mapping[str, str], draws: int) -> Path:
    """Measure all answers of a folder, and write the results and the tables.

    Args:
        runs: Folder of answers.
        adapters: By model, a folder in which there is a ``prepared`` adapter: its reference quantiles rank the answers.
        draws: Resamples of each interval.
    """
    files = {(f.model, f.set, f.arm): f for f in list_files(runs)}
    records = {key: file.read() for key, file in files.items()}
    rows: list[results.Row] = []
    for (model, name, arm), answered in records.items():
        about: results.Row = {"model": model, "set": name, "arm": arm}
        if not arm.endswith("-rescored"):
            plain = records.get((model, name, "plain"), []) if arm != "plain" else []
            rows += measure_accuracy(about, answered, plain, draws)
        if arm == "peers":
            rows += measure_scores(about, answered, draws)
        seconds = files[model, name, arm].read_seconds()
        rows += [about | {"metric": f"seconds, {kind}", "value": round(s, 4)} for kind, s in seconds.items()]
    for model, name in dict.fromkeys((model, name) for model, name, arm in records if arm == "plain"):
        whole = choose_fullest([records.get((model, name, f"{arm}-rescored"), []) for arm in ("prepared", "plain")],
                                  records[model, name, "plain"])  # fmt: skip
        about = {"model": model, "set": name}
        rows += measure_scores(about | {"arm": "plain"}, [drop_ranks(r) for r in whole], draws)
        if name in LEARNT:
            rows += measure_scores(about | {"arm": "own questions"}, rank_by_other_half(whole), draws)
            if model in adapters:
                manifest = storage.read_manifest(Path(adapters[model]) / "prepared")
                ranked = [rank(r, manifest["reference"]) for r in whole]
                rows += measure_scores(about | {"arm": "prepared"}, ranked, draws)
    for model in dict.fromkeys(model for model, _, _ in records):
        parts = [
            files[model, name, "plain" if arm is None else arm]
            for name in LEARNT
            if (model, name, "plain") in files
            for arm in [_choose_arm(records, model, name)]
        ]
        rows += measure_heads({"model": model, "arm": "plain"}, parts, draws)
    rows += average(rows)
    return results.write("real", rows, draws=draws, default=DEFAULT_RISK)


def choose_fullest(rescored: Sequence[Sequence[Record]], plain: Sequence[Record]) -> Sequence[Record]:
    """Return the first answers with new scores that lack none of the plain ones, else the plain ones."""
    return next((records for records in rescored if len(records) == len(plain)), plain)


def _choose_arm(records: Mapping[tuple[str, str, str], Sequence[Record]], model: str, name: str) -> str | None:
    """Return the arm that scored all of the plain answers again, whose hidden states are whole; None without one."""
    plain = len(records[model, name, "plain"])
    arms = ("prepared-rescored", "plain-rescored")
    return next((arm for arm in arms if len(records.get((model, name, arm), ())) == plain), None)


def drop_ranks(record: Record) -> Record:
    """Return a record without the rank scores that another version computed."""
    return replace(record, scores={n: v for n, v in record.scores.items() if not n.startswith("rank_")})


def rank(record: Record, reference: Mapping[str, Sequence[float]]) -> Record:
    """Return a record with its rank scores among reference answers."""
    return add_scores(drop_ranks(record), compute_rank_scores(record.scores, reference))


def rank_by_other_half(records: Sequence[Record]) -> list[Record]:
    """Return records ranked among the answers to the other half of the questions, as if prepared on questions alike."""
    halves = [list(records[side::2]) for side in (0, 1)]
    references = [reference_quantiles([drop_ranks(r) for r in half]) for half in halves]
    return [rank(record, references[1 - i % 2]) for i, record in enumerate(records)]


def measure_accuracy(
    about: results.Row, answered: Sequence[Record], plain: Sequence[Record], draws: int
) -> list[results.Row]:
    """Return the share of right answers, and its paired difference to the plain model's on the same questions."""
    judged = [r for r in answered if r.correct is not None]
    row = about | {"metric": "accuracy", **_entries(estimate_share([bool(r.correct) for r in judged]))}
    row["answers"] = len(judged)
    if about["set"] == "mc2":
        grades = [float(r.grade) for r in judged if r.grade is not None]
        row |= {"metric": "mc2", **_entries(estimate_mean(grades, draws=draws))}
    known = {r.question.id: r for r in plain}
    pairs = [(r, known[r.question.id]) for r in judged if r.question.id in known]
    if len(pairs) > 1:
        gains = [float(bool(a.correct)) - float(bool(b.correct)) for a, b in pairs]
        gain = estimate_mean(gains, draws=draws)
        row |= {"gain": gain.value, "gain_interval": [gain.low, gain.high], "against": "plain"}
        row["same text"] = round(float(np.mean([a.answer == b.answer for a, b in pairs])), 4)
    return [row]


def measure_scores(about: results.Row, answered: Sequence[Record], draws: int) -> list[results.Row]:
    """Return AUROC and PRR of each score, and the default's paired difference to each baseline."""
    judged = [r for r in answered if r.correct is not None]
    right = np.array([bool(r.correct) for r in judged])
    if not 0 < right.sum() < len(right) or about["set"] == "mc2":
        return []
    ranks = sorted({name for r in judged for name in r.scores if name.startswith("rank_")})
    names = [n for n in (*SHOWN, *ranks, *PEERS) if all(n in r.scores for r in judged)]
    scores = {name: np.array([r.scores[name] for r in judged]) for name in names}
    scores = {name: values for name, values in scores.items() if np.ptp(values) > 0}
    rows: list[results.Row] = []
    for (name, metric), entry in compare_scores(scores, right, METRICS, draws=draws).items():
        rows.append(about | {"score": name, "metric": metric, "answers": len(judged), **_entries(entry.estimate)})
    for name in [n for n in scores if n.startswith("rank_")]:
        for baseline in BASELINES:
            gain = paired_difference("prr", scores[name], scores[baseline], right, draws=draws)
            rows.append(
                about | {"score": name, "metric": f"prr less {baseline}'s", "answers": len(judged),
                         **_entries(gain)}
            )  # fmt: skip
    return rows


def measure_heads(about: results.Row, parts: Sequence[AnswerFile], draws: int) -> list[results.Row]:
    """Return the worth of p_correct in the domain (out of fold) and on a set that it was not learnt on."""
    joined: list[Record] = []
    states: dict[str, list[np.ndarray]] = {}
    for file in parts:
        judged = [r for r in file.read() if r.correct is not None and "sum_nll" in r.scores]
        known = file.read_states([r.question.id for r in judged])
        for key, value in known.items():
            states.setdefault(key, []).append(value)
        joined += [replace(r, question=replace(r.question, topic=file.set)) for r in judged]
    whole = {key: np.concatenate(values) for key, values in states.items() if sum(map(len, values)) == len(joined)}
    topics = np.array([r.question.topic for r in joined])
    rows: list[results.Row] = []
    for name in dict.fromkeys(topics.tolist()):
        at = np.flatnonzero(topics == name)
        rows += _measure_candidates(
            about | {"set": name, "domain": "in domain"}, [joined[i] for i in at], {k: v[at] for k, v in whole.items()},
            draws,
        )  # fmt: skip
    if len(set(topics.tolist())) > 1:
        rows += _measure_candidates(about | {"domain": "other sets"}, joined, whole, draws)
    return rows


def _measure_candidates(
    about: results.Row, records: Sequence[Record], states: Mapping[str, np.ndarray], draws: int
) -> list[results.Row]:
    outside = about["domain"] == "other sets"
    rows: list[results.Row] = []
    try:
        _, report = fit_calibration(records, states)
    except (DataError, ConfigError) as error:
        print(f"{about}: {error}")
        return []
    p = np.array(report.out_of_topic if outside else report.out_of_fold, float)
    right = np.array([bool(r.correct) for r in records])
    topics = np.array([r.question.topic for r in records])
    for name in dict.fromkeys(topics.tolist()) if outside else [about["set"]]:
        use = (topics == name) & ~np.isnan(p)
        if not 0 < right[use].sum() < use.sum():
            continue
        scores = {"p_correct": 1 - p[use]}
        scores |= {s: np.array([r.scores[s] for r, u in zip(records, use, strict=True) if u]) for s in BASELINES}
        for (score, metric), entry in compare_scores(
            scores, right[use], METRICS, baseline="p_correct", draws=draws
        ).items():
            if score == "p_correct":
                row = about | {"set": name, "score": score, "head": report.chosen, "metric": metric}
                rows.append(row | {"answers": int(use.sum()), **_entries(entry.estimate)})
    return rows


def average(rows: Sequence[results.Row]) -> list[results.Row]:
    """Return means over models and sets of the gains in PRR, whose cells are independent of each other.

    The interval is normal: the standard error of a cell is a quarter of its interval's width, over 0.98.
    """
    averaged: list[results.Row] = []
    gains = [r for r in rows if str(r["metric"]).startswith("prr less") and r["arm"] != "peers"]
    for arm, score, metric in dict.fromkeys((r["arm"], r["score"], r["metric"]) for r in gains):
        cells = [r for r in gains if (r["arm"], r["score"], r["metric"]) == (arm, score, metric)]
        values = [r["value"] for r in cells]
        errors = [(r["interval"][1] - r["interval"][0]) / 3.92 for r in cells]
        error = math.sqrt(sum(e * e for e in errors)) / len(cells)
        mean = float(np.mean(values))
        averaged.append({
            "model": "all", "set": "all", "arm": arm, "score": score, "metric": metric, "cells": len(cells),
            "value": round(mean, 4), "interval": [round(mean - 1.96 * error, 4), round(mean + 1.96 * error, 4)],
        })  # fmt: skip
    return averaged


def _entries(estimate: Estimate) -> dict[str, Any]:
    """Return the entries ``value`` and ``interval`` of a row."""
    value, interval = round_estimate(estimate)
    return {"value": value, "interval": interval}


def table(record: Mapping[str, Any]) -> str:
    """Return the tables of a file of results."""
    rows = record["rows"]
    note = f"Intervals are 95 % bootstrap intervals over questions; commit {record['commit']}, {record['device']}."
    return "\n\n".join([_accuracy_table(rows), _score_table(rows), _head_table(rows), _gain_table(rows), note])


def _cells(rows: Sequence[results.Row]) -> list[tuple[str, str]]:
    order = list(SETS)
    pairs = dict.fromkeys((r["model"], r["set"]) for r in rows if r["model"] != "all" and "set" in r)
    return sorted(pairs, key=lambda pair: (pair[0], order.index(pair[1])))


def _accuracy_table(rows: Sequence[results.Row]) -> str:
    lines = []
    for model, name in _cells(rows):
        for row in rows:
            if (row["model"], row.get("set")) == (model, name) and row["metric"] in ("accuracy", "mc2"):
                low, high = (f"{100 * v:.1f}" for v in row["interval"])
                gain = "" if "gain" not in row else f"{100 * row['gain']:+.1f} ({_points(row['gain_interval'])})"
                lines.append([
                    f"{model}, {name}", row["arm"], str(row["answers"]), f"{100 * row['value']:.1f} ({low} to {high})",
                    gain,
                ])  # fmt: skip
    return results.markdown(["model, set", "arm", "answers", "right, %", "to plain, points"], lines)


def _points(interval: Sequence[float]) -> str:
    return " to ".join(f"{100 * v:+.1f}" for v in interval)


def _score_table(rows: Sequence[results.Row]) -> str:
    lines = []
    own = [r for r in rows if "score" in r and "head" not in r and r["metric"] in METRICS]
    own = [r for r in own if r["arm"] == "plain" or r["score"].startswith("rank_") or r["score"] in PEERS]
    for key in dict.fromkeys((r["model"], r["set"], r["arm"], r["score"]) for r in own):
        cells = {r["metric"]: r for r in own if (r["model"], r["set"], r["arm"], r["score"]) == key}
        model, name, arm, score = key
        by = "" if arm == "plain" else f", {arm}"
        lines.append([f"{model}, {name}", f"`{score}`{by}", *(_value(cells[m]) for m in METRICS)])
    return results.markdown(["model, set", "score, no labels", "AUROC", "PRR"], lines)


def _head_table(rows: Sequence[results.Row]) -> str:
    own = [r for r in rows if "head" in r]
    lines = []
    for key in dict.fromkeys((r["model"], r["set"], r["arm"], r["domain"], r["head"]) for r in own):
        cells = {
            r["metric"]: r for r in own if (r["model"], r["set"], r["arm"], r["domain"], r["head"]) == key
        }  # fmt: skip
        model, name, arm, domain, head = key
        lines.append([f"{model}, {name}", arm, domain, head, *(_value(cells[m]) for m in METRICS)])
    return results.markdown(["model, set", "arm", "learnt on", "head", "AUROC", "PRR"], lines)


def _gain_table(rows: Sequence[results.Row]) -> str:
    lines = [
        [f"`{r['score']}`, {r['arm']}", r["metric"], str(r["cells"]), _value(r)] for r in rows if r["model"] == "all"
    ]
    return results.markdown(["mean over models and sets", "", "cells", "PRR"], lines)


def _value(row: results.Row) -> str:
    low, high = row["interval"]
    return f"{row['value']:.3f} ({low:.3f} to {high:.3f})"
