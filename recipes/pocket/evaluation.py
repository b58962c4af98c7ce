"""Questions with their truth, and a strict judge. Nothing here ever looks at a model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from recipes.pocket.atlas import fold
from recipes.pocket.phrasings import PHRASINGS, sentence
from selfdoubt.data.readers import Row, read_json_lines
from selfdoubt.errors import DataError, SelfdoubtError

Category = Literal["known", "rare", "unseen", "ambiguous", "invented"]
CATEGORIES: tuple[Category, ...] = get_args(Category)


class EvaluationError(SelfdoubtError, ValueError):
    """A file of questions is missing or is not what it should be."""


@dataclass(frozen=True)
class Question:
    """One question with all its right short answers."""

    id: str
    question: str
    category: Category
    relation: str
    subject: str
    answers: tuple[str, ...]  # "Paris"; none where the place is invented: any answer is wrong
    held_out_phrasing: bool
    seen: float  # how often the fact is expected in a million training pairs

    @property
    def only_calibrates(self) -> bool:
        """Return whether a reference question is for the calibration alone, and percentiles do not count it."""
        return self.id.startswith("cal-")


def read(path: str | Path) -> list[Question]:
    """Read a file of questions, one JSON object per line.

    Raises:
        EvaluationError: If the file is missing or a line is malformed; the message names the line.
    """
    file = Path(path)
    if not file.is_file():
        raise EvaluationError(
            f"wanted a file of questions, found none at {file}; the shipped one is selfdoubt.pocket.evaluation_file()"
        )
    try:
        rows = list(read_json_lines(file))
    except DataError as error:
        raise EvaluationError(f"{error}, or write the file again with recipes.pocket.make") from None
    questions = []
    for place, row in rows:
        try:
            questions.append(_question(row))
        except (TypeError, ValueError) as error:
            raise EvaluationError(
                f"{place}: wanted an object with the fields of Question, found: {error}; "
                "fix the line or write the file again with recipes.pocket.make"
            ) from None
    return questions


def write(path: str | Path, questions: Iterable[Question]) -> None:
    """Write questions, one JSON object per line."""
    lines = [json.dumps(asdict(q), ensure_ascii=False) for q in questions]
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _question(record: Row) -> Question:
    if set(record) != {field.name for field in fields(Question)}:
        raise ValueError(sorted(record))
    category, relation, answers = record["category"], record["relation"], record["answers"]
    if category not in CATEGORIES or relation not in PHRASINGS:
        raise ValueError(f"category {category!r}, relation {relation!r}")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers {answers!r}")
    return Question(**{**record, "answers": tuple(answers), "seen": float(record["seen"])})


def is_right(question: Question, answer_text: str) -> bool:
    """Whether the whole answer is the one right sentence, with any of the right answers in it.

    Case, accents, spaces and the full stop at the end do not count; everything else does: a list of languages
    must be complete and in order, and nothing may follow.

    Example:
        >>> text = "What is the capital of France?"
        >>> q = Question("1", text, "known", "capital", "France", ("Paris",), False, 99.0)
        >>> is_right(q, "the capital of France is Paris"), is_right(q, "The capital of France is Parisville.")
        (True, False)
    """
    given = _bare(answer_text)
    return any(given == _bare(sentence(question.relation, question.subject, a)) for a in question.answers)


def _bare(text: str) -> str:
    return fold(text).rstrip(" .")
