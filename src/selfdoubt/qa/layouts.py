"""What the columns of a question file mean: see ``selfdoubt.data.questions``, which training reads with too."""

from __future__ import annotations

from selfdoubt.data.cells import optional_text, required_text, texts
from selfdoubt.data.questions import (
    AS_USUAL,
    USUAL,
    Columns,
    decide_naming,
    find,
    is_record,
    of_record,
    question_of,
    with_choices,
)

__all__ = [
    "AS_USUAL", "USUAL", "Columns", "decide_naming", "find", "is_record", "of_record", "optional_text", "question_of",
    "required_text", "texts", "with_choices",
]  # fmt: skip
