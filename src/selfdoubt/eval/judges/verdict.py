"""The types of a judge and of its verdict on one answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from selfdoubt.errors import DataError
from selfdoubt.eval.records import Question


class Verdict(NamedTuple):
    """The judgement of one answer."""

    correct: bool | None  #: None: unjudged, and ``note`` says why
    grade: float | None = None  #: the judge's number where it has one; the better the greater
    note: str | None = None


#: A rule that judges one answer to one question; an answer of None is unjudged.
Judge = Callable[[Question, str | None], Verdict]

NO_ANSWER = Verdict(None, None, "there is no answer to judge")

_YES = frozenset({"yes", "true", "right", "correct", "1", "y", "t"})
_NO = frozenset({"no", "false", "wrong", "incorrect", "0", "n", "f"})


def parse_verdict(place: str, cell: Any) -> Verdict:
    """Read a judgement: yes, true, right, correct, 1 and their opposites in any case; or a grade from 0 to 1.

    Args:
        place: File and row, for the message.
        cell: Content of the cell; None and white space are unjudged.

    Returns:
        The verdict; a grade is right from 0.5 on.

    Raises:
        DataError: If the cell is something else.
    """
    if cell is None or not str(cell).strip():
        return Verdict(None)
    word = str(cell).strip().lower()
    if word in _YES or word in _NO:
        return Verdict(word in _YES, float(word in _YES))
    try:
        grade = float(word)
    except ValueError:
        grade = math.nan
    if not 0 <= grade <= 1:
        raise DataError(f"{place}: wanted yes or no, or a number from 0 to 1, found {cell!r}")
    return Verdict(grade >= 0.5, grade)
