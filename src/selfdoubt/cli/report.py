"""``selfdoubt report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from selfdoubt.cli import flags
from selfdoubt.errors import require

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


def report(
    answers: Annotated[
        Path, typer.Argument(help="A folder that `selfdoubt evaluate` wrote, or a file of scored answers.")
    ],
    out: Annotated[Path | None, typer.Option(help="The folder to write. [default: that of the answers]")] = None,
    judge: flags.Judge = None,
    judge_url: flags.JudgeUrl = None,
    judge_model: flags.JudgeModel = None,
    draws: Annotated[int, typer.Option(help="Bootstrap draws of the confidence intervals.")] = 1000,
) -> int:
    """Report on answers that exist, by another judge if you like; nothing is asked again."""
    require("scipy", "qa")
    from selfdoubt.qa import datasets, finish

    folder = answers if answers.is_dir() else answers.parent
    out = folder if out is None else out
    records, run = finish.read_answers(answers)
    if judge is not None or any(r.correct is None and r.note is None for r in records):
        questions = [r.question for r in records]
        picked = flags.pick_judge(
            judge, questions, judge_url, judge_model, out, lambda name: datasets.column(finish.file_of(answers), name)
        )
        records = finish.judged(records, picked)
    for line in finish.report(records, run, out, draws=draws):
        print(line)
    return 0
