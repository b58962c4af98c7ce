"""Readers of question sets and instruction data: files and sets on the hub -> typed records.

Training and evaluation read through them alike: JSON, JSONL, CSV, TSV, Parquet, TruthfulQA's and the hub's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

if TYPE_CHECKING:
    from selfdoubt.data.chats import read_chats
    from selfdoubt.data.question_sets import load_questions, read_column
    from selfdoubt.data.questions import Columns, Question
    from selfdoubt.data.readers import read_file
    from selfdoubt.data.unlabelled import load_unlabelled

__all__ = ["Columns", "Question", "load_questions", "load_unlabelled", "read_chats", "read_column", "read_file"]

_HOMES = {
    "Question": "questions",
    "Columns": "questions",
    "load_questions": "question_sets",
    "load_unlabelled": "unlabelled",
    "read_column": "question_sets",
    "read_chats": "chats",
    "read_file": "readers",
}

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
