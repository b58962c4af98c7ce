"""Scores from several answers to one question: semantic entropy, self-consistency, P(True)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfdoubt.lazy import export_lazily

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

__getattr__, __dir__ = export_lazily(__name__, _HOMES)
