"""From answers to a judged, measured and reported run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdoubt.calibration.adapter import (
    MODEL,
    NO_CONDITIONS,
    check_target,
    join_states,
    name_by_run,
    read_conditions,
    write_adapter,
)
from selfdoubt.calibration.fit import fit_calibration, store_calibration
from selfdoubt.errors import ConfigError
from selfdoubt.eval import records as files
from selfdoubt.eval import run_folder
from selfdoubt.eval.generate import AnsweredBatch
from selfdoubt.eval.judges.judge import judge_records
from selfdoubt.eval.judges.rules import get_judge_name
from selfdoubt.eval.judges.verdict import Judge
from selfdoubt.eval.records import Record
from selfdoubt.eval.run_folder import save_run
from selfdoubt.eval.settings import Run
from selfdoubt.report.write import write_report

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


def judge_and_report(asked: AnsweredBatch, judge: Judge, out: Path, run: Run, *, draws: int = 1000) -> list[str]:
    """Judge, keep, measure and report.

    Args:
        asked: All answers.
        judge: Who says what is right.
        out: The run's folder.
        run: Its settings, for people and for ``selfdoubt calibrate``.
        draws: Bootstrap draws of each interval.

    Returns:
        What to tell on a terminal.
    """
    found = judge_records(asked.records, judge)
    whole = replace(run, judge=get_judge_name(judge), costs=asked.costs)
    save_run(asked, found, whole, out)
    return report(found, whole, out, draws=draws)


def report(records: Sequence[Record], run: Run, out: Path, *, draws: int) -> list[str]:
    """Measure and report what is judged; returns what to tell on a terminal."""
    paths = write_report(records, run.to_json(), out, draws=draws)
    said = json.loads(paths["report.json"].read_text(encoding="utf-8"))["verdict"]["sentences"]
    return [*said, *(str(path) for path in paths.values())]


def calibrate_runs(
    folders: Sequence[Path],
    out: Path | None,
    load: Callable[[Run], RiskAwareLM],
    *,
    draws: int = 1000,
    **options: Any,
) -> list[str]:
    """Calibrate on one evaluated folder or several, and store the head in the adapter.

    With several folders, each is a topic of its own: "another domain" is then another set of questions.

    Args:
        folders: Evaluated with the same model.
        out: A new adapter folder; None puts the calibration into the adapter that answered.
        load: The model that a run's settings describe; only called for a new adapter of a model that had none.
        draws: Bootstrap draws of the renewed reports; 0 leaves reports, answers and ``run.json`` as they are.
        **options: As for ``fit_calibration``.

    Returns:
        What to tell on a terminal.

    Raises:
        ConfigError: If the runs are of different models or their answers were made differently, or there is no adapter
            to put the calibration into.
        DataError: If a folder is no run, or holds too few judged answers.
    """
    runs = [run_folder.read_run(folder) for folder in folders]
    about = runs[0][2]
    for folder, (_, _, other) in zip(folders, runs, strict=True):
        differs = [name for name in MODEL if getattr(other, name) != getattr(about, name)]
        if differs:
            raise ConfigError(f"{folder} was answered by another {differs[0]} than {folders[0]}; calibrate each alone")
    target = check_target(about, out, folders)
    records = [
        name_by_run(r, folder, len(runs)) for folder, (own, _, _) in zip(folders, runs, strict=True) for r in own
    ]
    made = read_conditions([run for _, _, run in runs], folders)
    head, quality = fit_calibration(records, join_states([states for _, states, _ in runs]), conditions=made, **options)
    place = store_calibration(head, target) if out is None else write_adapter(head, about, records, target, load)
    lines = [*quality.lines(), *([] if made else [NO_CONDITIONS]), f"stored in {place}"]
    held_out = iter(quality.out_of_fold)
    for folder, (own, _, run) in zip(folders, runs, strict=True):
        probabilities = [next(held_out) for _ in own]
        renewed = [
            replace(r, p_correct=p, p_correct_note=None, abstain=head.abstains(p))
            for r, p in zip(own, probabilities, strict=True)
        ]
        if draws:
            settings = run.with_guarantee(head.threshold, head.promise)
            files.save_records(folder / run_folder.ANSWERS, renewed)
            if settings != run:
                run_folder.save_settings(settings, folder)
            lines += [f"{folder}:", *report(renewed, settings, folder, draws=draws)]
    return lines
