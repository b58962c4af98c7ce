"""What a judge is, and what it says of one answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from selfdoubt.qa.records import Question


class Verdict(NamedTuple):
    """What a judge says of one answer."""

    correct: bool | None  #: None: unjudged, and ``note`` says why
    grade: float | None = None  #: the judge's number where it has one; the better the greater
    note: str | None = None


#: A rule that judges one answer to one question; an answer of None is unjudged.
Judge = Callable[[Question, str | None], Verdict]

NO_ANSWER = Verdict(None, None, "there is no answer to judge")
