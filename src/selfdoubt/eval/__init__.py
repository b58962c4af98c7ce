"""Evaluation: ask a model a set of questions, and store, judge and score its answers.

``judges`` decide whether an answer is right, ``scores`` compare several answers to one question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

if TYPE_CHECKING:
    from selfdoubt.eval.config import EvaluationConfig
    from selfdoubt.eval.few_shot import choose_examples
    from selfdoubt.eval.prompts import Prompting
    from selfdoubt.eval.records import Record, Sample, read_records, save_records
    from selfdoubt.eval.run import ask_questions
    from selfdoubt.eval.run_folder import read_run
    from selfdoubt.eval.settings import Cost, Run

__all__ = [
    "Cost",
    "EvaluationConfig",
    "Prompting",
    "Record",
    "Run",
    "Sample",
    "ask_questions",
    "choose_examples",
    "read_records",
    "read_run",
    "save_records",
]

_HOMES = {
    "EvaluationConfig": "config",
    "Prompting": "prompts",
    "Record": "records",
    "Sample": "records",
    "Run": "settings",
    "Cost": "settings",
    "ask_questions": "run",
    "read_records": "records",
    "save_records": "records",
    "read_run": "run_folder",
    "choose_examples": "few_shot",
}

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
