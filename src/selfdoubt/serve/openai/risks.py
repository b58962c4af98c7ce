"""Formats the ``risk`` objects next to OpenAI's fields. All risks grow with doubt; entropies are in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.scores import Score
from selfdoubt.risk import percentile

if TYPE_CHECKING:
    from selfdoubt.lm.front import LMFront


def format_token_risk(front: LMFront, token: Token) -> dict[str, Any]:
    """Return the risk of one token; its percentile is None without reference tokens (``reference["token_nll"]``)."""
    reference = front.reference.get(f"token_{front.token_risk}")
    return {
        "text": token.text,
        "risk": token.risk,
        "total": token.total,
        "epistemic": token.epistemic,
        "aleatoric": token.aleatoric,
        "divergence": token.divergence,
        "margin": token.margin,
        "self_certainty": token.self_certainty,
        "layer_disagreement": token.layer_disagreement,
        "density": token.density,
        "percentile": None if reference is None else percentile(token.risk, reference),
    }


def format_question_risk(front: LMFront, question: Sequence[Token]) -> dict[str, Any] | None:
    """Return the risk of the question's own words, known before the answer begins; None without such words."""
    score = Score("question", "mean", front.token_risk)
    value, name = score.compute([], question), str(score)
    if value is None:
        return None
    reference = front.reference.get(name)
    return {
        "risk": value,
        "risk_name": name,
        "percentile": None if reference is None else percentile(value, reference),
    }


def format_answer_risk(front: LMFront, answer: Answer) -> dict[str, Any]:
    """Return the risk of a whole answer."""
    return {
        "risk": answer.risk,
        "risk_name": answer.risk_name,
        "percentile": answer.percentile,
        "p_correct": answer.p_correct,
        "p_correct_note": answer.p_correct_note,
        "abstain": answer.abstain,
        "withheld": False,
        "question": format_question_risk(front, answer.question),
        "p_answerable": answer.p_answerable,
    }
