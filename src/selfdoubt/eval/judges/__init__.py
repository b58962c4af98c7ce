"""Judges, which decide whether an answer is right: rules, multiple choice, other models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

if TYPE_CHECKING:
    from selfdoubt.eval.judges.judge import judge_records
    from selfdoubt.eval.judges.llm import LLMJudge
    from selfdoubt.eval.judges.rules import build_judge
    from selfdoubt.eval.judges.verdict import Judge, Verdict

__all__ = ["Judge", "LLMJudge", "Verdict", "build_judge", "judge_records"]

_HOMES = {"Judge": "verdict", "Verdict": "verdict", "build_judge": "rules", "judge_records": "judge", "LLMJudge": "llm"}

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
