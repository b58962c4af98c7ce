"""``selfdoubt report``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.cli import flags
from selfdoubt.errors import ConfigError, DataError, require

if TYPE_CHECKING:
    import typer
else:
    typer = require("typer", "lm")


def report(
    answers: Annotated[
        Path,
        typer.Argument(
            help="A folder that `selfdoubt evaluate` wrote, or a file of any system's answers: JSONL, JSON, CSV, TSV "
            "or Parquet."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder to write. [default: that of the answers]")] = None,
    judge: flags.JudgeFlag = None,
    judge_url: flags.JudgeUrl = None,
    judge_model: flags.JudgeModel = None,
    question_column: Annotated[
        str | None, typer.Option(help="Column of the question, where its name does not say it.")
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option(help="Column of the system's answers, where its name does not say it.")
    ] = None,
    gold_column: Annotated[
        str | None, typer.Option(help="Column of the accepted answers, where its name does not say it.")
    ] = None,
    answers_name: Annotated[
        str | None,
        typer.Option(
            help="Form in which an answer names a choice, where it could mean two: text, index (from 0), label or "
            "letter.",
            show_default=False,
        ),
    ] = None,
    draws: Annotated[int, typer.Option(help="Bootstrap draws of the confidence intervals.")] = 1000,
) -> int:
    """Report on existing answers, by another judge if you like; nothing is asked again."""
    require("scipy", "qa")
    from selfdoubt import workflow
    from selfdoubt.data import question_sets
    from selfdoubt.data.questions import Columns
    from selfdoubt.eval import external as files
    from selfdoubt.eval import run_folder
    from selfdoubt.eval.judges.judge import judge_records
    from selfdoubt.eval.judges.rules import get_judge_name, needs_answers
    from selfdoubt.eval.settings import Run

    given = Columns(question=question_column, answers=gold_column, named_by=answers_name)
    folder = answers if answers.is_dir() else answers.parent
    out = folder if out is None else out
    read: files.ExternalAnswers | None = None
    run = Run.parse({})
    if answers.is_file():
        read = files.read_external_answers(answers, columns=given, answer=answer_column)
        records = read.records
    elif answer_column is not None or given != Columns():
        raise ConfigError(f"columns are named for a file of answers, and {answers} is not one; leave them out")
    else:
        records, run = run_folder.read_run_answers(answers)
    unjudged = [r for r in records if r.correct is None and r.note is None]
    if judge is not None or unjudged:
        unknown = read.unknown if read is not None else frozenset()
        open_ones = records if judge is not None else unjudged
        questions = [r.question for r in open_ones if r.question.id not in unknown] or [r.question for r in records]

        def column(name: str) -> dict[str, Any]:
            return (
                question_sets.read_column(run_folder.find_answers_file(answers), name)
                if read is None
                else read.column(name)
            )

        picked = flags.pick_judge(judge, questions, judge_url, judge_model, out, column)
        nothing_known = judge is not None or len(unjudged) == len(records)
        if needs_answers(picked) and nothing_known and all(r.question.id in unknown for r in open_ones):
            raise DataError(
                f"{answers} does not say which answers are right: it has no verdicts (correct) and no accepted "
                "answers; name their column with --gold-column, or that of verdicts with --judge column:NAME"
            )
        run = replace(run, judge=get_judge_name(picked))
        records = judge_records(records, picked, unknown=unknown, only_open=judge is None)
    for text in workflow.write_run_report(records, run, out, draws=draws).lines():
        print(text)
    return 0
