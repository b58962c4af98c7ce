"""The ``risk`` objects next to the fields that OpenAI defines. All risks grow with doubt; entropies are in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from selfdoubt.lm.answer import ANSWER_SCORES, Answer, Token, answer_scores
from selfdoubt.risk import percentile

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


def format_token_risk(lm: RiskAwareLM, token: Token) -> dict[str, Any]:
    """Return the risk of one token; its percentile is None without reference tokens (``reference["token_nll"]``)."""
    reference = lm.reference.get(f"token_{lm.token_risk}")
    return {
        "text": token.text,
        "risk": token.risk,
        "total": token.total,
        "epistemic": token.epistemic,
        "aleatoric": token.aleatoric,
        "percentile": None if reference is None else percentile(token.risk, reference),
    }


def format_question_risk(lm: RiskAwareLM, question: Sequence[Token]) -> dict[str, Any] | None:
    """Return the risk of the question's own words, known before the answer begins; None without such words."""
    name = f"question_mean_{lm.token_risk}"
    if name not in ANSWER_SCORES:
        name = "question_mean_nll"
    value = answer_scores([], question).get(name)
    if value is None:
        return None
    reference = lm.reference.get(name)
    return {
        "risk": value,
        "risk_name": name,
        "percentile": None if reference is None else percentile(value, reference),
    }


def format_answer_risk(lm: RiskAwareLM, answer: Answer) -> dict[str, Any]:
    """Return the risk of a whole answer."""
    return {
        "risk": answer.risk,
        "risk_name": answer.risk_name,
        "percentile": answer.percentile,
        "p_correct": answer.p_correct,
        "p_correct_note": answer.p_correct_note,
        "abstain": answer.abstain,
        "withheld": False,
        "question": format_question_risk(lm, answer.question),
    }
