"""``selfdoubt evaluate``: every setting of ``EvaluationConfig`` and of ``Columns`` is a flag."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.cli import flags
from selfdoubt.cli.from_dataclass import build_config, with_flags
from selfdoubt.data.questions import Columns
from selfdoubt.errors import ConfigError, require
from selfdoubt.eval.config import EvaluationConfig

if TYPE_CHECKING:
    import typer

    from selfdoubt.data.question_sets import ReadOptions
    from selfdoubt.data.questions import Question
else:
    typer = require("typer", "lm")


@with_flags(Columns, before="answer_separator")
@with_flags(EvaluationConfig, before="shots")
def evaluate(
    data: flags.Data,
    out: Annotated[Path, typer.Option(help="The folder to write; an interrupted run in it resumes.")],
    model: flags.ModelFlag = None,
    adapter: flags.Adapter = None,
    wrapper: flags.WrapperText = "auto",
    dtype: flags.Dtype = "auto",
    quantize: flags.Quantize = None,
    risk: flags.RiskName = None,
    trust_remote_code: flags.RemoteCode = False,
    answer_from: flags.AnswerFromFlag = None,
    step: flags.StepFlag = "auto",
    prepack: flags.Prepack = None,
    task: flags.TaskFlag = None,
    answer_separator: flags.AnswerSeparator = None,
    split: flags.Split = None,
    limit: Annotated[int | None, typer.Option(help="Ask a random subset of this size.", show_default=False)] = None,
    shots: Annotated[int, typer.Option(help="Solved examples before each question.", metavar="N")] = 0,
    shots_from: Annotated[
        Path | None, typer.Option(help="A file of questions to take them from; else other questions of the data.")
    ] = None,
    states: Annotated[
        str, typer.Option(help="Decoder layers whose hidden states are kept to calibrate with: auto, none, all, 3,7.")
    ] = "auto",
    judge: flags.JudgeFlag = None,
    judge_url: flags.JudgeUrl = None,
    judge_model: flags.JudgeModel = None,
    draws: Annotated[int, typer.Option(help="Bootstrap draws of the confidence intervals.")] = 1000,
    **settings: Any,
) -> int:
    """Ask a set of questions, judge the answers, and report which score separates right from wrong ones."""
    require("sklearn", "qa")
    if draws < 2:  # before all questions are asked
        raise ConfigError(f"--draws must be at least 2, got {draws}")
    from selfdoubt import workflow
    from selfdoubt.data import question_sets
    from selfdoubt.eval.run_folder import check_run_folder
    from selfdoubt.eval.settings import Run
    from selfdoubt.members import Wrapped

    config = build_config(EvaluationConfig, settings)
    reading: ReadOptions = {
        "task": task, "seed": config.seed, "columns": build_config(Columns, settings), "separator": answer_separator,
        "split": split,
    }  # fmt: skip
    flags.check_whole_texts(config.how.instruction)
    questions = question_sets.load_questions(data, limit=limit, **reading)
    check_run_folder(out)
    picked = flags.pick_judge(
        judge, questions, judge_url, judge_model, out, lambda name: question_sets.read_column(data, name, **reading)
    )
    config = replace(config, shots=tuple(_choose_shots(shots, shots_from, questions, data, reading)))
    lm = flags.load_lm(
        model, adapter, wrapper, dtype, quantize, risk, trust_remote_code, answer_from, step, prepack=prepack
    )  # fmt: skip
    run = Run(
        model=model or ("pocket" if adapter is None else None),
        adapter=None if adapter is None else str(adapter),
        wrapper=wrapper if adapter is not None or isinstance(lm.model, Wrapped) else "none",
        dtype=dtype,
        quantize=quantize,
        risk=lm.risk,
        answer_from=answer_from,
        data=data,
        task=task,
    )
    evaluation = workflow.evaluate(
        lm, questions, out, config=config, judge=picked, states=states, draws=draws, run=run
    )  # fmt: skip
    for text in () if evaluation is None else evaluation.lines():
        print(text)
    return 0


def _choose_shots(
    n: int, file: Path | None, questions: list[Question], data: str, reading: ReadOptions
) -> list[Question]:
    from selfdoubt.data import question_sets
    from selfdoubt.eval.few_shot import choose_examples

    if n == 0:
        if file is not None:
            raise ConfigError("--shots-from says where shots come from, and not how many: add e.g. --shots 5")
        return []
    return choose_examples(
        question_sets.load_questions(file or data, **reading), n, asked=questions, seed=reading["seed"]
    )
