"""Evaluates and calibrates a model: asks and judges questions, writes the report, stores p_correct in an adapter."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from selfdoubt.calibration.adapter import (
    NO_CONDITIONS,
    SAME_MODEL,
    check_target,
    join_states,
    name_by_run,
    read_conditions,
    write_adapter,
)
from selfdoubt.calibration.fit import FitOptions, fit_calibration, store_calibration
from selfdoubt.calibration.quality import CalibrationReport
from selfdoubt.data.order import Draft, assign_ids, check_limit, choose_subset
from selfdoubt.data.question_sets import ReadOptions, load_questions, read_column
from selfdoubt.data.questions import AS_USUAL, Columns, Question
from selfdoubt.errors import ConfigError, DataError, require
from selfdoubt.eval import records as files
from selfdoubt.eval import run_folder
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.judges.judge import judge_records
from selfdoubt.eval.judges.rules import build_judge, choose_default_judge, get_judge_name
from selfdoubt.eval.judges.verdict import Judge
from selfdoubt.eval.records import Record
from selfdoubt.eval.run import ask_questions, check_questions, choose_layers, describe_conditions
from selfdoubt.eval.settings import Run
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.load import POCKET, resolve_model
from selfdoubt.members import Wrapped
from selfdoubt.report.measure import measure_answers
from selfdoubt.report.results import Report
from selfdoubt.report.write import write_report

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM

#: A question with its accepted answers.
Asked = Question | tuple[str, str | Sequence[str]]


@dataclass(frozen=True)
class Evaluation:
    """A judged and reported run."""

    folder: Path
    run: Run  #: its settings
    records: tuple[Record, ...]
    report: Report  #: all numbers of ``report.json``
    files: Mapping[str, Path]  #: ``report.json``, ``report.html`` and the plots
    lm: RiskAwareLM | None = field(default=None, repr=False, compare=False)  #: the model that answered

    @property
    def sentences(self) -> tuple[str, ...]:
        """The findings, in words."""
        return self.report.verdict.sentences

    def lines(self) -> list[str]:
        """Return the findings and the places of the files, for a terminal."""
        return [*self.sentences, *(str(path) for path in self.files.values())]


@dataclass(frozen=True)
class CalibrationResult:
    """A calibration, its quality, and the adapter that stores it."""

    calibration: Calibration
    quality: CalibrationReport
    folder: Path  #: the adapter: ``RiskAwareLM.load(model, adapter=folder)``
    evaluations: tuple[Evaluation, ...]  #: the runs with renewed reports; none with ``draws=0``
    warnings: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """The findings: a table of the heads, and the guarantee or the reason why there is none."""
        return (*self.quality.lines(), *self.warnings)

    def lines(self) -> list[str]:
        """Return the findings, the place of the adapter and each run's findings, for a terminal."""
        renewed = [text for e in self.evaluations for text in (f"{e.folder}:", *e.lines())]
        return [*self.sentences, f"stored in {self.folder / 'selfdoubt.json'}", *renewed]


def evaluate(
    lm: RiskAwareLM,
    data: str | os.PathLike[str] | Sequence[Asked],
    out: str | os.PathLike[str],
    *,
    config: EvaluationConfig | None = None,
    judge: Judge | str = "auto",
    limit: int | None = None,
    seed: int | None = None,
    columns: Columns = AS_USUAL,
    task: str | None = None,
    split: str | None = None,
    separator: str | None = None,
    states: str = "auto",
    draws: int = 1000,
    run: Run | None = None,
) -> Evaluation | None:
    """Ask a model a set of questions, judge its answers, and report which scores separate right from wrong ones.

    A run that was cut off in the same folder goes on.

    Args:
        lm: The model.
        data: A question file, the name of a set ("pocket", "truthfulqa", ...) or of one on the hub; or questions:
            ``Question``s, or pairs of a question and its accepted answer or answers.
        out: Folder of the run.
        config: Settings of how questions are asked; None takes the defaults.
        judge: A ``Judge``, or the name of one as ``--judge`` takes it, e.g. "exact" or "column:NAME"; "auto" takes
            choice for choices, rouge where wrong answers are known, else contains.
        limit: Size of a random subset to ask; None asks all.
        seed: Seed of the subset, of the order of choices and of drawn answers; None takes that of ``config``.
        columns: Columns of question, answers, ... in a file; None in a field finds them by usual names.
        task: For TruthfulQA gen, mc1 or mc2.
        split: A split on the hub; None takes the usual one.
        separator: Separator of several answers in one cell, e.g. ";".
        states: Decoder layers whose hidden states are kept to calibrate with: auto, none, all, or e.g. "3,7".
        draws: Number of bootstrap draws of each interval, at least 2.
        run: Settings to store in ``run.json``, e.g. the model's name; None takes those that the model knows.

    Returns:
        The run; None in all processes but the first of several.

    Raises:
        ConfigError: If an option is out of range, or ``out`` holds another run or other things than a run.
        DataError: If the questions cannot be read, ids come twice, or only some have choices.
        MissingExtraError: Without the extra [qa].

    Example:
        ``selfdoubt.evaluate(lm, [("What is the capital of France?", "Paris"), ...], "runs/mine").sentences``
    """
    require("sklearn", "qa")
    if draws < 2:
        raise ConfigError(f"draws must be at least 2, got {draws}")
    folder = Path(out)
    run_folder.check_run_folder(folder)
    config = config or EvaluationConfig()
    config = config if seed is None else replace(config, seed=seed)
    reading: ReadOptions = {"seed": config.seed}
    reading |= {"columns": columns} if columns != AS_USUAL else {}
    reading |= {"task": task} if task is not None else {}
    reading |= {"split": split} if split is not None else {}
    reading |= {"separator": separator} if separator is not None else {}
    questions = load_asked(data, limit, **reading)
    check_questions(questions)
    if isinstance(judge, str):
        judge = _choose_judge(judge, questions, data, reading)
    run = run or describe_run(lm, data)
    layers = lm.layers
    lm.layers = choose_layers(lm, states)
    try:
        asked = ask_questions(lm, questions, config, folder, run)
    finally:
        lm.layers = layers
    if asked is None:
        return None
    records = judge_records(asked.records, judge)
    conditions = describe_conditions(lm, questions, config).to_json()
    run = replace(run, seed=config.seed, conditions=conditions, judge=get_judge_name(judge), costs=asked.costs)
    run_folder.save_run(asked, records, run, folder)
    return replace(write_run_report(records, run, folder, draws=draws), lm=lm)


def calibrate(
    runs: Evaluation | str | os.PathLike[str] | Sequence[Evaluation | str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None = None,
    lm: RiskAwareLM | Callable[[Run], RiskAwareLM] | None = None,
    draws: int = 1000,
    **options: Unpack[FitOptions],
) -> CalibrationResult:
    """Fit the probability that an answer is right on judged answers, and store it in the adapter.

    With several runs, each is a set of questions of its own: it is left out in turn, and the head is chosen by what
    transfers to the set that was left out.

    Args:
        runs: Folders of runs, or ``Evaluation``s that ``evaluate`` returned; all with the same model.
        out: A new adapter folder; None puts the calibration into the adapter that answered.
        lm: The model that answered, or a function that loads it from a run's settings; only needed for a new adapter
            of a model that had none. None takes that of an ``Evaluation``, or loads it by the run's settings.
        draws: Number of bootstrap draws of the renewed reports; 0 leaves reports, answers and ``run.json`` unchanged.
        **options: Options of ``selfdoubt.calibration.fit.fit_calibration``: ``target_accuracy``, ``confidence``,
            ``candidates``, ``folds``, ``seed``, ...

    Raises:
        ConfigError: If the runs are of different models or their answers were made differently, or there is no adapter
            to put the calibration into.
        DataError: If a folder does not hold a run, or holds too few judged answers.
        MissingExtraError: Without the extra [qa].

    Example:
        ``selfdoubt.calibrate("runs/mine", target_accuracy=0.9).quality.best.inside.auroc``
    """
    require("sklearn", "qa")
    given = [runs] if isinstance(runs, (Evaluation, str, os.PathLike)) else list(runs)
    if not given:
        raise ConfigError("calibrating needs at least one run; give a folder that `selfdoubt evaluate` wrote")
    folders = [run.folder if isinstance(run, Evaluation) else Path(run) for run in given]
    read = [run_folder.read_run(folder) for folder in folders]
    settings = [run for _, _, run in read]
    about = settings[0]
    for folder, other in zip(folders, settings, strict=True):
        differs = [name for name in SAME_MODEL if getattr(other, name) != getattr(about, name)]
        if differs:
            raise ConfigError(f"{folder} was answered by another {differs[0]} than {folders[0]}; calibrate each alone")
    target = check_target(about, None if out is None else Path(out), folders)
    records = [
        name_by_run(record, folder, len(read))
        for folder, (answers, _, _) in zip(folders, read, strict=True)
        for record in answers
    ]
    conditions = read_conditions(settings, folders)
    states = join_states([states for _, states, _ in read])
    sets = None if len(read) == 1 else [record.question.topic or "" for record in records]
    calibration, quality = fit_calibration(records, states, conditions=conditions, sets=sets, **options)
    if out is None:
        store_calibration(calibration, target)
    else:
        known = lm or next((run.lm for run in given if isinstance(run, Evaluation) and run.lm is not None), None)
        write_adapter(calibration, about, records, target, _loader(known))
    evaluations = []
    held_out = iter(quality.out_of_fold)
    asked = iter(quality.answerable.out_of_fold if quality.answerable else [None] * len(records))
    for folder, (answers, _, run) in zip(folders, read, strict=True):
        renewed = [
            replace(record, p_correct=p, p_correct_note=None, abstain=calibration.abstains(p), p_answerable=next(asked))
            for record in answers
            for p in [next(held_out)]
        ]
        if draws:
            evaluations.append(_renew(folder, run, renewed, calibration, draws))
    warnings = () if conditions else (NO_CONDITIONS,)
    return CalibrationResult(calibration, quality, target, tuple(evaluations), warnings)


def write_run_report(records: Sequence[Record], run: Run, folder: Path, *, draws: int) -> Evaluation:
    """Measure judged answers, and write the report into the folder."""
    report = measure_answers(records, run, draws=draws)
    return Evaluation(folder, run, tuple(records), report, write_report(records, report, folder))


def describe_run(lm: RiskAwareLM, data: Any) -> Run:
    """Return the settings of a run as far as the model knows them."""
    source = os.fspath(data) if isinstance(data, (str, os.PathLike)) else None
    pocket = lm.name is not None and lm.name == str(resolve_model(POCKET))
    wrapper = "none" if not isinstance(lm.model, Wrapped) else "auto" if pocket else None
    answer_from = "base" if pocket and isinstance(lm.model, Wrapped) and lm.model.spec.has_base else None
    return Run(
        model=POCKET if pocket else lm.name, wrapper=wrapper, dtype="auto", risk=lm.risk, data=source,
        answer_from=answer_from,
    )  # fmt: skip


def load_asked(
    data: str | os.PathLike[str] | Sequence[Asked], limit: int | None = None, **reading: Unpack[ReadOptions]
) -> list[Question]:
    """Return the questions of a file, of a set, or of a list; as for ``evaluate``.

    Raises:
        ConfigError: If questions are listed and an option says how to read a file.
    """
    if isinstance(data, (str, os.PathLike)):
        return load_questions(data, limit=limit, **reading)
    seed = reading.pop("seed", 0)
    if reading:
        raise ConfigError(f"{', '.join(reading)} say how to read a file, and the questions are a list; leave them out")
    check_limit(limit)
    drafts: list[Draft] = [(_parse_asked(i, asked), {}) for i, asked in enumerate(data)]
    return [question for question, _ in choose_subset(assign_ids("the list of questions", drafts), limit, seed)]


def _parse_asked(place: int, asked: Asked) -> Question:
    if isinstance(asked, Question):
        return asked
    text, answers = asked
    accepted = (answers,) if isinstance(answers, str) else tuple(answers)
    if not text.strip() or not all(answer.strip() for answer in accepted):
        raise DataError(f"question {place} of the list, or an answer to it, is empty; fix or remove it")
    return Question("", text, answers=accepted)


def _choose_judge(spec: str, questions: Sequence[Question], data: Any, reading: ReadOptions) -> Judge:
    kind, _, name = spec.partition(":")
    if kind == "column" and name and not isinstance(data, (str, os.PathLike)):
        raise ConfigError(f"{spec} needs a file with that column, and the questions are a list; give a file")
    column = read_column(data, name, **reading) if kind == "column" and name else None
    return build_judge(choose_default_judge(questions) if spec == "auto" else spec, column=column)


def _renew(folder: Path, run: Run, renewed: Sequence[Record], calibration: Calibration, draws: int) -> Evaluation:
    """Write a run's answers, settings and report again, with probabilities of heads that had not seen the answer."""
    settings = run.with_guarantee(calibration.threshold, calibration.promise)
    files.save_records(folder / run_folder.ANSWERS, renewed)
    if settings != run:
        run_folder.save_settings(settings, folder)
    return write_run_report(renewed, settings, folder, draws=draws)


def _loader(lm: RiskAwareLM | Callable[[Run], RiskAwareLM] | None) -> Callable[[Run], RiskAwareLM]:
    from selfdoubt.lm.model import RiskAwareLM

    if isinstance(lm, RiskAwareLM):
        return lambda _: lm
    return _load_by_settings if lm is None else lm


def _load_by_settings(run: Run) -> RiskAwareLM:
    from selfdoubt.lm.model import RiskAwareLM

    if run.wrapper not in ("auto", "none"):
        raise ConfigError("the run does not say how to load its model with its wrapper; give the model, lm=...")
    wrapper: Any = "auto" if run.wrapper == "auto" else None
    dtype, quantize = run.dtype or "auto", run.quantize
    return RiskAwareLM.load(
        run.model, adapter=run.adapter, wrapper=wrapper, dtype=dtype, quantize=quantize,  # type: ignore[arg-type]
        answer_from=run.answer_from,  # type: ignore[arg-type]
    )  # fmt: skip
