"""Compares two evaluated folders on the questions of both: accuracy of the answers, AUROC and PRR of the scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selfdoubt.errors import DataError
from selfdoubt.eval.records import Record, read_records
from selfdoubt.eval.settings import Run
from selfdoubt.formatting import format_percent
from selfdoubt.metrics import Estimate, SystemComparison, compare_systems, estimate_mean
from selfdoubt.report.measure import BASELINE, get_risk
from selfdoubt.report.metric_entries import Bootstrap
from selfdoubt.report.summary import format_estimate, label_score

COMPARED_METRICS = ("auroc", "prr")
ROWS = 8  #: scores on a terminal


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    folder: str
    run: Run
    asked: int
    only: int  #: questions that the other run was not asked


@dataclass(frozen=True)
class Overlap:
    """Questions by which of the two runs answered them right."""

    both: int
    only_a: int
    only_b: int
    neither: int


@dataclass(frozen=True)
class ScoreComparison:
    """One score in both runs, over the judged questions that have it in both."""

    judged: int
    metrics: Mapping[str, SystemComparison]  #: AUROC and PRR


@dataclass(frozen=True)
class RunComparison:
    """Two runs on the questions that both were asked and judged on. Differences are B minus A."""

    a: Side
    b: Side
    draws: int
    seed: int
    shared: int  #: questions in both
    judged: int  #: questions judged in both
    accuracy: SystemComparison
    right: Overlap
    scores: Mapping[str, ScoreComparison]
    left_out: Mapping[str, str]  #: reasons by score

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as ``selfdoubt compare --json`` prints it."""
        sides = {"a": self.a, "b": self.b}
        return {
            **{key: {"folder": side.folder, "run": side.run.to_json()} for key, side in sides.items()},
            "draws": self.draws,
            "seed": self.seed,
            "asked": {key: side.asked for key, side in sides.items()},
            "shared": self.shared,
            "only": {key: side.only for key, side in sides.items()},
            "judged": self.judged,
            "accuracy": _to_plain(self.accuracy),
            "right": asdict(self.right),
            "scores": {
                name: {"judged": s.judged, **{m: _to_plain(c) for m, c in s.metrics.items()}}
                for name, s in self.scores.items()
            },
            "left_out": dict(self.left_out),
        }

    def lines(self) -> list[str]:
        """Return the comparison for a terminal: p_correct, the sequence probability, the best of the others."""
        lines = [
            f"A: {self.a.folder}",
            f"B: {self.b.folder}",
            f"{self.shared} questions in both, {self.judged} of them judged in both; "
            f"{self.a.only} only in A, {self.b.only} only in B: these are not compared",
        ]
        accuracy, right = self.accuracy, self.right
        if accuracy.difference.value is None:
            return [*lines, f"accuracy: {accuracy.difference.note}"]
        lines += [
            f"right: A {format_percent(accuracy.a)}, B {format_percent(accuracy.b)}, "
            f"B - A {format_estimate(accuracy.difference, signed=True)}",
            f"right in both {right.both}, only in A {right.only_a}, only in B {right.only_b}, "
            f"in neither {right.neither}",
        ]
        order = sorted(self.scores.items(), key=lambda s: _rank(*s))
        rows = [
            [label_score(name), metric.upper(), *_format_metric(compared)]
            for name, score in order[:ROWS]
            for metric, compared in score.metrics.items()
        ]
        if not rows:
            return [*lines, "no score is in both"]
        table = [["score", "", "A", "B", "B - A [95 % interval]"], *rows]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)).rstrip() for row in table]
        rest = len(order) - ROWS
        return [*lines, *text, *([f"and {rest} more scores"] if rest > 0 else [])]


def compare_runs(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, draws: int = 1000, seed: int = 0
) -> RunComparison:
    """Compare two runs on the questions that both were asked and judged on.

    Args:
        a: A folder with ``answers.jsonl`` and ``report.json``.
        b: Another.
        draws: Bootstrap draws of the questions; both runs are measured on the same ones.
        seed: Seed of these draws.

    Raises:
        DataError: If a file is missing or broken, no question is shared, or one id names two different questions.
    """
    folders = {"a": Path(a), "b": Path(b)}
    runs = {key: _read_run(folder) for key, folder in folders.items()}
    answers = {
        key: {r.question.id: r for r in read_records(folder / "answers.jsonl")} for key, folder in folders.items()
    }
    shared = [id for id in answers["a"] if id in answers["b"]]
    _check(folders, answers, shared)
    pairs = [(answers["a"][id], answers["b"][id]) for id in shared]
    judged = [(x, y) for x, y in pairs if x.correct is not None and y.correct is not None]
    bootstrap = Bootstrap(draws=draws, seed=seed)
    scores, left_out = _compare_scores(judged, bootstrap)
    return RunComparison(
        a=Side(str(a), runs["a"], len(answers["a"]), len(answers["a"]) - len(shared)),
        b=Side(str(b), runs["b"], len(answers["b"]), len(answers["b"]) - len(shared)),
        draws=draws,
        seed=seed,
        shared=len(shared),
        judged=len(judged),
        accuracy=_compare_accuracy(judged, bootstrap),
        right=Overlap(
            both=sum(x.correct is True and y.correct is True for x, y in judged),
            only_a=sum(x.correct is True and y.correct is False for x, y in judged),
            only_b=sum(x.correct is False and y.correct is True for x, y in judged),
            neither=sum(x.correct is False and y.correct is False for x, y in judged),
        ),
        scores=scores,
        left_out=left_out,
    )


def _to_plain(compared: SystemComparison) -> dict[str, Any]:
    return {"a": compared.a, "b": compared.b, "difference": compared.difference.to_json()}


def _rank(name: str, score: ScoreComparison) -> tuple[bool, bool, float]:
    prr = score.metrics["prr"].b
    return name != "p_correct", name != BASELINE, math.inf if prr is None else -prr


def _format_metric(compared: SystemComparison) -> list[str]:
    if compared.difference.value is None:
        return ["undefined", "", compared.difference.note or ""]
    return [f"{compared.a:.3f}", f"{compared.b:.3f}", format_estimate(compared.difference, signed=True)]


def _read_run(folder: Path) -> Run:
    """Read the settings in ``report.json``."""
    path = folder / "report.json"
    try:
        return Run.parse(json.loads(path.read_text(encoding="utf-8"))["run"])
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); give a folder that `selfdoubt evaluate` wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a report ({type(error).__name__}: {error}); evaluate again") from None


def _check(folders: Mapping[str, Path], answers: Mapping[str, Mapping[str, Record]], shared: Sequence[str]) -> None:
    if not shared:
        some = {key: next(iter(records), "none") for key, records in answers.items()}
        raise DataError(
            f"{folders['a']} and {folders['b']} share no question (ids such as {some['a']!r} and {some['b']!r}); "
            "compare two runs on the same data"
        )
    for id in shared:
        texts = [(r.question.text, r.question.context) for r in (answers["a"][id], answers["b"][id])]
        if texts[0] != texts[1]:
            raise DataError(
                f"the id {id!r} is {texts[0][0][:80]!r} in {folders['a']} and {texts[1][0][:80]!r} in {folders['b']}; "
                "compare two runs on the same data"
            )


def _compare_accuracy(judged: Sequence[tuple[Record, Record]], bootstrap: Bootstrap) -> SystemComparison:
    if not judged:
        return SystemComparison(None, None, Estimate.missing("no shared question is judged in both runs"))
    right = [(bool(x.correct), bool(y.correct)) for x, y in judged]
    difference = estimate_mean([float(y) - float(x) for x, y in right], **bootstrap)
    return SystemComparison(sum(x for x, _ in right) / len(right), sum(y for _, y in right) / len(right), difference)


def _compare_scores(
    judged: Sequence[tuple[Record, Record]], bootstrap: Bootstrap
) -> tuple[dict[str, ScoreComparison], dict[str, str]]:
    names = {name: None for pair in judged for r in pair for name in ("p_correct", *r.scores)}
    scores: dict[str, ScoreComparison] = {}
    left_out: dict[str, str] = {}
    for name in names:
        both = [(x, y) for x, y in judged if None not in (get_risk(x, name), get_risk(y, name))]
        sides = [[(get_risk(r, name) or 0.0, bool(r.correct)) for r in side] for side in zip(*both, strict=True)]
        if both:
            metrics = {metric: compare_systems(metric, *sides, **bootstrap) for metric in COMPARED_METRICS}
            scores[name] = ScoreComparison(len(both), metrics)
        elif any(get_risk(r, name) is not None for pair in judged for r in pair):
            left_out[name] = "no question has it in both runs"
    return scores, left_out
