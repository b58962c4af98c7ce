"""What follows the asking: judge every answer, write them down, measure, report."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from safetensors.torch import save as serialize

from selfdoubt.data.questions import AS_USUAL
from selfdoubt.errors import DataError
from selfdoubt.qa import answers
from selfdoubt.qa import records as files
from selfdoubt.qa.answers import UNKNOWN
from selfdoubt.qa.judge import name_of, needs_answers
from selfdoubt.qa.llm_judge import LLMJudge
from selfdoubt.qa.records import Question, Record
from selfdoubt.qa.report import write_report
from selfdoubt.qa.verdict import Judge, Verdict
from selfdoubt.storage import write

if TYPE_CHECKING:
    from torch import Tensor

    from selfdoubt.qa.ask import Asked

ANSWERS, STATES, RUN = "answers.jsonl", "states.safetensors", "run.json"


def finish(asked: Asked, judge: Judge, out: Path, run: Mapping[str, Any], *, draws: int = 1000) -> list[str]:
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
    found = judged(asked.records, judge)
    whole = {**run, "judge": name_of(judge), "costs": asked.costs}
    keep(asked, found, whole, out)
    return report(found, whole, out, draws=draws)


def report(records: Sequence[Record], run: Mapping[str, Any], out: Path, *, draws: int) -> list[str]:
    """Measure and report what is judged; returns what to tell on a terminal."""
    paths = write_report(records, run, out, draws=draws)
    said = json.loads(paths["report.json"].read_text(encoding="utf-8"))["verdict"]["sentences"]
    return [*said, *(str(path) for path in paths.values())]


def judged(
    records: Sequence[Record], judge: Judge, *, unknown: Collection[str] = (), only_open: bool = False
) -> list[Record]:
    """Return records with a verdict on each answer, and on each sample.

    What was chosen among given choices and judged by its log-probabilities keeps its verdict.

    Args:
        records: All of them.
        judge: Who says what is right.
        unknown: Ids of questions of which no right answer is known: a judge that needs one leaves them unjudged.
        only_open: Keep the verdicts that there are.
    """
    bare = set(unknown) if needs_answers(judge) else set()
    asked = [r for r in records if not _keeps(r, only_open) and r.question.id not in bare]
    wanted = {(r.question.id, text): r.question for r in asked for text in _texts(r)}
    pairs = [(question, text) for (_, text), question in wanted.items()]
    verdicts = dict(zip(wanted, _verdicts(judge, pairs), strict=True))
    found = []
    for record in records:
        if _keeps(record, only_open):
            found.append(record)
            continue
        if record.question.id in bare:
            found.append(replace(record, correct=None, grade=None, note=record.note or UNKNOWN))
            continue
        own = verdicts[record.question.id, record.answer]
        samples = tuple(replace(s, correct=verdicts[record.question.id, s.text].correct) for s in record.samples)
        note = own.note if record.note is None else record.note
        found.append(replace(record, correct=own.correct, grade=own.grade, note=note, samples=samples))
    return found


def _keeps(record: Record, only_open: bool) -> bool:
    return record.correct is not None and (only_open or bool(record.question.choices))


def keep(asked: Asked, records: Sequence[Record], run: Mapping[str, Any], out: Path) -> None:
    """Write ``answers.jsonl``, the hidden states and what the run was."""
    files.save(out / ANSWERS, records)
    if asked.states:
        write(out / STATES, serialize({name: tensor.contiguous() for name, tensor in asked.states.items()}))
    write(out / RUN, (json.dumps(dict(run), indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def read_run(folder: Path) -> tuple[list[Record], dict[str, Tensor], dict[str, Any]]:
    """Records, hidden states and settings of an evaluated folder.

    Raises:
        DataError: If it is none, or a file is broken.
    """
    found, run = read_answers(folder)
    states = load_file(folder / STATES) if (folder / STATES).is_file() else {}
    if any(len(tensor) != len(found) for tensor in states.values()):
        raise DataError(f"{folder / STATES} does not belong to {ANSWERS} beside it; evaluate again")
    return found, states, run


def read_answers(path: Path) -> tuple[list[Record], dict[str, Any]]:
    """Read records and settings of an evaluated folder, or the records of a file of answers.

    Raises:
        DataError: If it is none, or a file is broken.
    """
    file = file_of(path)
    if not file.is_file():
        raise DataError(f"{path} holds no answers; give a folder that `selfdoubt evaluate` wrote, or a file of answers")
    if not path.is_dir():
        return answers.read(path, columns=AS_USUAL).records, {}
    about = file.parent / RUN
    try:
        run = json.loads(about.read_text(encoding="utf-8")) if about.is_file() else {}
    except ValueError as error:
        raise DataError(f"{about} is broken ({error}); evaluate again") from None
    if not isinstance(run, dict):
        raise DataError(f"{about} is broken (it is no object); evaluate again")
    return files.read(file), run


def file_of(path: Path) -> Path:
    """The file of answers in a folder, or the file itself."""
    return path / ANSWERS if path.is_dir() else path


def _texts(record: Record) -> list[str | None]:
    return [record.answer, *(s.text for s in record.samples)]


def _verdicts(judge: Judge, pairs: Sequence[tuple[Question, str | None]]) -> list[Verdict]:
    if isinstance(judge, LLMJudge):
        return judge.verdicts(pairs)
    return [judge(question, text) for question, text in pairs]
