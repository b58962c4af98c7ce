"""Readers of question sets and instruction data: files and sets on the hub -> typed records.

Training and evaluation read through them alike: JSON, JSONL, CSV, TSV, Parquet, TruthfulQA's and the hub's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.data.chats import read_chats
    from selfdoubt.data.question_sets import load_questions, read_column
    from selfdoubt.data.questions import Columns, Question
    from selfdoubt.data.readers import read_file

__all__ = ["Columns", "Question", "load_questions", "read_chats", "read_column", "read_file"]

_HOMES = {
    "Question": "questions",
    "Columns": "questions",
    "load_questions": "question_sets",
    "read_column": "question_sets",
    "read_chats": "chats",
    "read_file": "readers",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can list its flags without importing torch.
    if name in _HOMES:
        return getattr(import_module(f"selfdoubt.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'selfdoubt.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
