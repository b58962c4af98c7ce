"""``selfdoubt evaluate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from selfdoubt.cli import flags
from selfdoubt.errors import ConfigError, PromptError, require

if TYPE_CHECKING:
    import typer

    from selfdoubt.eval.records import Question
    from selfdoubt.lm.model import RiskAwareLM
else:
    typer = require("typer", "lm")


def evaluate(
    data: flags.Data,
    out: Annotated[Path, typer.Option(help="The folder to write; a run that was cut off in it goes on.")],
    model: flags.Model = None,
    adapter: flags.Adapter = None,
    wrapper: flags.WrapperText = "auto",
    dtype: flags.Dtype = "auto",
    quantize: flags.Quantize = None,
    risk: flags.RiskName = None,
    trust_remote_code: flags.RemoteCode = False,
    task: flags.Task = None,
    question_column: flags.QuestionColumn = None,
    answer_column: flags.AnswerColumn = None,
    answer_separator: flags.AnswerSeparator = None,
    topic_column: flags.TopicColumn = None,
    context_column: flags.ContextColumn = None,
    choice_column: flags.ChoiceColumn = None,
    answers_name: flags.AnswersName = None,
    split: flags.Split = None,
    limit: Annotated[int | None, typer.Option(help="Ask a random subset of this size.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the subset, the order of choices, shots and samples.")] = 0,
    style: Annotated[
        str,
        typer.Option(help="chat: the model's template; qa: plain 'Q: ... A:'; auto: chat where there is a template."),
    ] = "auto",
    instruction: Annotated[
        str | None, typer.Option(help="What to tell the model before each question.", show_default=False)
    ] = None,
    show_choices: Annotated[
        bool, typer.Option("--show-choices", help="Multiple choice: show the choices, and answer by letter.")
    ] = False,
    shots: Annotated[int, typer.Option(help="Solved examples before each question.", metavar="N")] = 0,
    shots_from: Annotated[
        Path | None, typer.Option(help="A file of questions to take them from; else other questions of the data.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Questions side by side.")] = 32,
    candidates: Annotated[
        int,
        typer.Option(
            "--candidates",
            "--samples",
            help="Further answers to draw for each question: for self-consistency and semantic entropy, and to pick "
            "the least risky of.",
            metavar="N",
        ),
    ] = 0,
    temperature: Annotated[float, typer.Option(help="Of the further answers.")] = 1.0,
    clusters: Annotated[
        str, typer.Option(help="When two of them mean the same: exact, f1:SHARE, or nli:MODEL.")
    ] = "exact",
    p_true: Annotated[bool, typer.Option("--p-true", help="Also ask the model whether its answer is true.")] = False,
    states: Annotated[
        str, typer.Option(help="Decoder layers whose hidden states are kept to calibrate with: auto, none, all, 3,7.")
    ] = "auto",
    judge: flags.Judge = None,
    judge_url: flags.JudgeUrl = None,
    judge_model: flags.JudgeModel = None,
    draws: Annotated[int, typer.Option(help="Bootstrap draws of the confidence intervals.")] = 1000,
) -> int:
    """Ask a set of questions, judge the answers, and report which score tells the wrong ones."""
    require("sklearn", "qa")
    if draws < 2:  # said before all questions are asked
        raise ConfigError(f"--draws must be at least 2, got {draws}")
    from selfdoubt.data import question_sets
    from selfdoubt.data.questions import Columns
    from selfdoubt.eval.generate import EvaluationConfig
    from selfdoubt.eval.prompts import Prompting

    columns = Columns(
        question=question_column,
        answers=answer_column,
        topic=topic_column,
        context=context_column,
        choices=choice_column,
        named_by=answers_name,
    )
    reading: dict[str, Any] = {
        "task": task, "seed": seed, "columns": columns, "separator": answer_separator, "split": split
    }  # fmt: skip
    flags.whole_texts(instruction)
    questions = question_sets.load_questions(data, limit=limit, **reading)
    flags.new_run(out)
    picked = flags.pick_judge(
        judge, questions, judge_url, judge_model, out, lambda name: question_sets.read_column(data, name, **reading)
    )
    examples = _shots(shots, shots_from, questions, data, reading)
    lm = flags.load_lm(model, adapter, wrapper, dtype, quantize, risk, trust_remote_code)
    if style == "auto":
        style = "qa" if lm.tokenizer.chat_template is None else "chat"
    lm.layers = _layers(lm, states)
    plan = EvaluationConfig(
        how=Prompting(style, instruction, _takes_system(lm, style), show_choices),
        shots=tuple(examples),
        max_tokens=max_tokens,
        batch_size=batch_size,
        samples=candidates,
        temperature=temperature,
        clusters=clusters,
        p_true=p_true,
        seed=seed,
    )
    from selfdoubt.eval.settings import Run
    from selfdoubt.members import Wrapped

    run = Run(
        model=model or ("pocket" if adapter is None else None),
        adapter=None if adapter is None else str(adapter),
        wrapper=wrapper if adapter is not None or isinstance(lm.model, Wrapped) else "none",
        dtype=dtype,
        quantize=quantize,
        risk=lm.risk,
        data=data,
        task=task,
    )
    from selfdoubt.eval.run import ask_questions as ask_all
    from selfdoubt.workflow import judge_and_report

    asked = ask_all(lm, questions, plan, out, run.to_json())
    if asked is not None:
        run = replace(run, seed=seed, conditions=plan.conditions(lm, questions).to_json())
        for line in judge_and_report(asked, picked, out, run, draws=draws):
            print(line)
    return 0


def _shots(n: int, file: Path | None, questions: list[Question], data: str, reading: dict[str, Any]) -> list[Question]:
    from selfdoubt.data import question_sets
    from selfdoubt.eval.few_shot import choose_examples

    if n == 0:
        if file is not None:
            raise ConfigError("--shots-from says where shots come from, and not how many: add e.g. --shots 5")
        return []
    return choose_examples(
        question_sets.load_questions(file or data, **reading), n, asked=questions, seed=reading["seed"]
    )


def _takes_system(lm: RiskAwareLM, style: str) -> bool:
    """Whether the chat template has a place for the system's words; else they go before the first question's."""
    from selfdoubt.lm.text.prompt import encode

    if style != "chat" or lm.tokenizer.chat_template is None:
        return False
    try:
        said = encode(lm.tokenizer, [{"role": "system", "content": "~"}, {"role": "user", "content": "?"}]).ids
    except PromptError:
        return False
    return said != encode(lm.tokenizer, "?").ids


def _layers(lm: RiskAwareLM, text: str) -> tuple[int, ...]:
    """Decoder layers by name, together with the one that a calibration reads."""
    from selfdoubt.eval.run import choose_quarter_layers
    from selfdoubt.lm.hidden_states import decoder_layers
    from selfdoubt.members import innermost

    if text == "auto":
        wanted = choose_quarter_layers(lm)
    elif text == "none":
        wanted = ()
    elif text == "all":
        wanted = tuple(range(len(decoder_layers(innermost(lm.model)))))
    else:
        try:
            wanted = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise ConfigError(f"--states must be auto, none, all or numbers like 3,7, got {text!r}") from None
    return tuple(sorted({*lm.layers, *wanted}))
