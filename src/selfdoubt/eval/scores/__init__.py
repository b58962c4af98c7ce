"""Scores from several answers to one question: semantic entropy, self-consistency, P(True)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfdoubt.eval.scores.agreement import (
        agreement_scores,
        build_equivalence,
        cluster_answers,
        self_consistency,
        semantic_entropy,
    )
    from selfdoubt.eval.scores.entailment import SameMeaning
    from selfdoubt.eval.scores.p_true import estimate_p_true

__all__ = [
    "SameMeaning",
    "agreement_scores",
    "build_equivalence",
    "cluster_answers",
    "estimate_p_true",
    "self_consistency",
    "semantic_entropy",
]

_HOMES = {
    "agreement_scores": "agreement",
    "build_equivalence": "agreement",
    "cluster_answers": "agreement",
    "semantic_entropy": "agreement",
    "self_consistency": "agreement",
    "estimate_p_true": "p_true",
    "SameMeaning": "entailment",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that the command line can list its flags without importing torch.
    if name in _HOMES:
        return getattr(import_module(f"selfdoubt.eval.scores.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'selfdoubt.eval.scores' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
