"""Judges, which decide whether an answer is right: rules, multiple choice, other models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.eval.judges.judge import judge_records
    from selfdoubt.eval.judges.llm import LLMJudge
    from selfdoubt.eval.judges.rules import build_judge
    from selfdoubt.eval.judges.verdict import Judge, Verdict

__all__ = ["Judge", "LLMJudge", "Verdict", "build_judge", "judge_records"]

_HOMES = {"Judge": "verdict", "Verdict": "verdict", "build_judge": "rules", "judge_records": "judge", "LLMJudge": "llm"}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can list its flags without importing torch.
    if name in _HOMES:
        return getattr(import_module(f"selfdoubt.eval.judges.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'selfdoubt.eval.judges' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
