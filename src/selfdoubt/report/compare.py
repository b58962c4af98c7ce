"""Two evaluated folders side by side: whose answers are right more often, and whose scores know it better."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfdoubt.errors import DataError
from selfdoubt.eval.records import Record, read_records
from selfdoubt.report.measure import BASELINE, risk_of
from selfdoubt.report.metric_entries import Draws, Entry, mean, nothing, paired
from selfdoubt.report.summary import label, percent, signed

METRICS = ("auroc", "prr")
FEW = 8  #: scores on a terminal


def compare(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, draws: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Compare two runs on the questions that both were asked and judged on. Differences are B minus A.

    Args:
        a: A folder with ``answers.jsonl`` and ``report.json``.
        b: Another.
        draws: Bootstrap draws of the questions; both runs are measured on the same ones.
        seed: Of these draws.

    Returns:
        ``a``, ``b``: the folders, each with its ``run``; ``asked`` {a, b}, ``shared`` (questions in both), ``only``
        {a, b}, ``judged`` (of the shared, in both); ``accuracy`` {a, b, difference}; ``right`` {both, only_a, only_b,
        neither}; ``scores`` by name: {metric: {a, b, difference}} for AUROC and PRR over the judged that have it in
        both, and ``judged``; ``left_out`` {score: why}. Differences are entries as in ``measure``.

    Raises:
        DataError: If a file is missing or broken, no question is shared, or one id names two different questions.
    """
    runs = {"a": Path(a), "b": Path(b)}
    about = {key: _run(folder) for key, folder in runs.items()}
    answers = {key: {r.question.id: r for r in read_records(folder / "answers.jsonl")} for key, folder in runs.items()}
    shared = [id for id in answers["a"] if id in answers["b"]]
    _check(runs, answers, shared)
    pairs = [(answers["a"][id], answers["b"][id]) for id in shared]
    judged = [(x, y) for x, y in pairs if x.correct is not None and y.correct is not None]
    draw = Draws(draws, seed)
    scores, left_out = _scores(judged, draw)
    return {
        "a": {"folder": str(a), "run": about["a"]},
        "b": {"folder": str(b), "run": about["b"]},
        "draws": draws,
        "seed": seed,
        "asked": {key: len(found) for key, found in answers.items()},
        "shared": len(shared),
        "only": {key: len(found) - len(shared) for key, found in answers.items()},
        "judged": len(judged),
        "accuracy": _accuracy(judged, draw),
        "right": {
            "both": sum(x.correct is True and y.correct is True for x, y in judged),
            "only_a": sum(x.correct is True and y.correct is False for x, y in judged),
            "only_b": sum(x.correct is False and y.correct is True for x, y in judged),
            "neither": sum(x.correct is False and y.correct is False for x, y in judged),
        },
        "scores": scores,
        "left_out": left_out,
    }


def as_text(found: Mapping[str, Any]) -> list[str]:
    """What ``compare`` found, as lines for a terminal: p_correct, the sequence probability, the best of the others."""
    only, accuracy, right = found["only"], found["accuracy"], found["right"]
    lines = [
        f"A: {found['a']['folder']}",
        f"B: {found['b']['folder']}",
        f"{found['shared']} questions in both, {found['judged']} of them judged in both; "
        f"{only['a']} only in A, {only['b']} only in B: these are not compared",
    ]
    if accuracy["difference"]["value"] is None:
        return [*lines, f"accuracy: {accuracy['difference']['why']}"]
    lines += [
        f"right: A {percent(accuracy['a'])}, B {percent(accuracy['b'])}, B - A {signed(accuracy['difference'])}",
        f"right in both {right['both']}, only in A {right['only_a']}, only in B {right['only_b']}, "
        f"in neither {right['neither']}",
    ]
    rows = []
    order = sorted(found["scores"].items(), key=lambda s: _place(*s))
    for name, own in order[:FEW]:
        for metric in METRICS:
            entry = own[metric]
            if entry["difference"]["value"] is None:
                rows.append([label(name), metric.upper(), "undefined", "", entry["difference"]["why"]])
            else:
                numbers = [f"{entry[key]:.3f}" for key in ("a", "b")]
                rows.append([label(name), metric.upper(), *numbers, signed(entry["difference"])])
    if not rows:
        return [*lines, "no score is in both"]
    table = [["score", "", "A", "B", "B - A [95 % interval]"], *rows]
    widths = [max(len(row[i]) for row in table) for i in range(4)]
    text = ["  ".join(part.ljust(w) for part, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in table]
    rest = len(order) - FEW
    return [*lines, *text, *([f"and {rest} more scores"] if rest > 0 else [])]


def _place(name: str, own: Mapping[str, Any]) -> tuple[bool, bool, float]:
    prr = own["prr"]["b"]
    return name != "p_correct", name != BASELINE, math.inf if prr is None else -prr


def _run(folder: Path) -> Any:
    """The settings in ``report.json``."""
    path = folder / "report.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["run"]
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give a folder that `selfdoubt evaluate` wrote"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no report ({type(error).__name__}: {error}); evaluate again") from None


def _check(runs: Mapping[str, Path], answers: Mapping[str, Mapping[str, Record]], shared: Sequence[str]) -> None:
    if not shared:
        some = {key: next(iter(found), "none") for key, found in answers.items()}
        raise DataError(
            f"{runs['a']} and {runs['b']} share no question (ids such as {some['a']!r} and {some['b']!r}); "
            "compare two runs on the same data"
        )
    for id in shared:
        texts = [(r.question.text, r.question.context) for r in (answers["a"][id], answers["b"][id])]
        if texts[0] != texts[1]:
            raise DataError(
                f"the id {id!r} is {texts[0][0][:80]!r} in {runs['a']} and {texts[1][0][:80]!r} in {runs['b']}; "
                "compare two runs on the same data"
            )


def _accuracy(judged: Sequence[tuple[Record, Record]], draw: Draws) -> dict[str, Any]:
    if not judged:
        why = nothing("no shared question is judged in both runs")
        return {"a": None, "b": None, "difference": why}
    right = [(bool(x.correct), bool(y.correct)) for x, y in judged]
    difference: Entry = mean([float(y) - float(x) for x, y in right], draw)
    return {
        "a": sum(x for x, _ in right) / len(right),
        "b": sum(y for _, y in right) / len(right),
        "difference": difference,
    }


def _scores(judged: Sequence[tuple[Record, Record]], draw: Draws) -> tuple[dict[str, Any], dict[str, str]]:
    names = {name: None for pair in judged for r in pair for name in ("p_correct", *r.scores)}
    scores: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in names:
        both = [(x, y) for x, y in judged if None not in (risk_of(x, name), risk_of(y, name))]
        sides = [[(risk_of(r, name) or 0.0, bool(r.correct)) for r in side] for side in zip(*both, strict=True)]
        if not both:
            if any(risk_of(r, name) is not None for pair in judged for r in pair):
                left_out[name] = "no question has it in both runs"
            continue
        scores[name] = {"judged": len(both)}
        for metric in METRICS:
            values, difference = paired(metric, sides[0], sides[1], draw)
            scores[name][metric] = {"a": values[0], "b": values[1], "difference": difference}
    return scores, left_out
