"""Records of answers, and files of them: one JSON object per line, which other tools read too."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from selfdoubt.data.questions import Question as Question
from selfdoubt.data.readers import read_json_lines
from selfdoubt.errors import DataError
from selfdoubt.storage import write_file


@dataclass(frozen=True)
class Sample:
    """One of several answers drawn for the same question."""

    text: str
    risk: float
    percentile: float | None = None
    correct: bool | None = None  #: None: unjudged


@dataclass(frozen=True)
class Record:
    """A question with one system's answer, its scores and its judgement."""

    question: Question
    answer: str | None  #: None: there is none, and ``note`` says why
    scores: Mapping[str, float] = field(default_factory=dict)  #: each grows with doubt
    tokens: tuple[tuple[str, float], ...] = ()  #: the answer's pieces of text, each with its risk
    question_tokens: tuple[tuple[str, float], ...] = ()  #: the user's tokens of the question, likewise
    samples: tuple[Sample, ...] = ()
    finish: str | None = None  #: "stop", "length" or "given"
    percentile: float | None = None
    p_correct: float | None = None
    abstain: bool | None = None
    correct: bool | None = None  #: None: unjudged, and ``note`` says why
    grade: float | None = None  #: the judge's number where it has one: F1, ROUGE difference, MC2's share
    note: str | None = None  #: why there is no answer or no judgement
    p_correct_note: str | None = None  #: why a calibrated model has no p_correct here
    p_answerable: float | None = None  #: by the question alone

    def to_json(self) -> dict[str, Any]:
        """Return plain data, flat.

        Unknown and empty entries are left out, except ``answer``, ``correct`` and ``answers``: an empty list of answers
        means that only declining is right.
        """
        question = self.question
        entries: dict[str, Any] = {"id": question.id, "question": question.text}
        entries |= {} if question.choices else {"answers": []}
        entries |= {
            f.name: _plain(getattr(question, f.name))
            for f in fields(question)[2:]
            if _is_known(getattr(question, f.name))
        }
        for f in fields(self)[1:]:
            value = getattr(self, f.name)
            if f.name in ("answer", "correct") or _is_known(value):
                entries[f.name] = [_sample(s) for s in value] if f.name == "samples" else _plain(value)
        return entries

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        """Return the record that ``to_json`` described.

        Raises:
            DataError: If an entry is missing, unknown to be of its kind, or not a finite number.
        """
        try:
            asked = {f.name: _frozen(row[f.name]) for f in fields(Question)[2:] if row.get(f.name) is not None}
            rest = {f.name: _frozen(row[f.name]) for f in fields(cls)[1:] if row.get(f.name) is not None}
            rest["correct"] = None if row.get("correct") is None else _truth(row["correct"])
            for name in ("answers", "wrong_answers", "choices", "right", "tokens", "question_tokens", "samples"):
                if not isinstance({**asked, **rest}.get(name, ()), tuple):
                    raise TypeError(f"{name} must be a list")
            question = Question(str(row["id"]), str(row["question"]), **asked)
            rest["samples"] = tuple(Sample(**s) for s in rest.get("samples", ()))
            rest["scores"] = {str(k): float(v) for k, v in rest.get("scores", {}).items()}
            record = cls(question, **{"answer": None, **rest})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"a record of answers is broken ({type(error).__name__}: {error})") from None
        bad = [name for name, value in record.scores.items() if not math.isfinite(value)]
        if bad:
            raise DataError(f"the score {bad[0]} of question {question.id} is {record.scores[bad[0]]}, not a number")
        return record


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read all records of a file.

    Raises:
        DataError: If it cannot be read, a line is broken, or an id comes twice.
    """
    records: dict[str, Record] = {}
    for place, row in read_json_lines(Path(path)):
        try:
            record = Record.from_json(row)
        except DataError as error:
            raise DataError(f"{place}: {error}; write the file again with `selfdoubt evaluate`") from None
        if record.question.id in records:
            raise DataError(f"{place}: the id {record.question.id!r} comes twice; give every question its own")
        records[record.question.id] = record
    return list(records.values())


def save_records(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Write a file of records, whole or not at all; half of a character is written as JSON escapes it."""
    write_file(Path(path), "".join(format_record(r) for r in records).encode("utf-8", "backslashreplace"))


def format_record(record: Record) -> str:
    """Return a record as one line of JSON."""
    return json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False) + "\n"


def add_scores(record: Record, scores: Mapping[str, float]) -> Record:
    """Return a copy of the record with further scores."""
    return replace(record, scores={**record.scores, **scores})


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"correct must be true, false or null, found {value!r}")
    return value


def _is_known(value: Any) -> bool:
    return value is not None and value not in ((), {})


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else dict(value) if _is_map(value) else value


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def _sample(sample: Sample) -> dict[str, Any]:
    return {f.name: v for f in fields(sample) if (v := getattr(sample, f.name)) is not None}
