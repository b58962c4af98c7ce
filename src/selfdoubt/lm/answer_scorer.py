"""Turns tokens into an ``Answer``: scores, risk, percentile among reference answers, and p_correct."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from selfdoubt.lm.answer import Answer, Finish, Token
from selfdoubt.lm.calibration import Calibration, ConfidenceEstimate
from selfdoubt.lm.conditions import Origin
from selfdoubt.lm.hidden_states import AnswerStates
from selfdoubt.lm.scores import DEFAULT_RISK, Attention, compute_answer_scores, compute_rank_scores, pick_risk
from selfdoubt.risk import percentile


@dataclass(frozen=True)
class AnswerScorer:
    """A scorer of answers, which needs no model: risk, reference quantiles and calibration are plain data."""

    risk: str = DEFAULT_RISK  #: name of the answer score that is the risk
    reference: Mapping[str, Sequence[float]] = field(default_factory=dict)  #: ascending quantiles by score
    calibration: Calibration | None = None
    misfit: str | None = None  #: why no answer of this model has a p_correct; None if the calibration fits the model
    members_read: Literal["prompt", "answer"] = "prompt"  #: the first tokens that members read

    def score(
        self,
        tokens: Sequence[Token],
        question: Sequence[Token],
        finish: Finish,
        text: str,
        states: AnswerStates | None = None,
        ending: Sequence[Token] = (),
        *,
        origin: Origin,
        attention: Attention | None = None,
    ) -> Answer:
        """Return the answer that these tokens make.

        Args:
            tokens: Tokens of the answer.
            question: The user's tokens of the question.
            finish: Reason of the answer's end.
            text: Text of the answer.
            states: Hidden states of the answer.
            ending: Tokens that ended the answer; an answer without tokens is scored by them.
            origin: The way in which the tokens were chosen.
            attention: Attention where each token was predicted (without tokens, each of ``ending``).
        """
        scores = compute_answer_scores(tokens or ending, question, attention, members_read=self.members_read)
        if origin.made != "choice":  # ranks among free answers say nothing about a choice
            scores |= compute_rank_scores(scores, self.reference)
        value, name = pick_risk(scores, self.risk)
        reference = self.reference.get(name)
        estimate = ConfidenceEstimate()
        if self.calibration is not None:
            gaps = [token.gap for token in tokens]
            estimate = self.calibration.estimate(scores, states, origin, finish, gaps, self.misfit)
        return Answer(
            text,
            tuple(tokens),
            tuple(question),
            scores,
            value,
            name,
            percentile=None if reference is None else percentile(value, reference),
            finish=finish,
            p_correct=estimate.p_correct,
            abstain=estimate.abstain,
            states=states,
            p_correct_note=estimate.note,
            p_answerable=self.estimate_answerable(scores, states, origin),
        )

    def estimate_answerable(
        self, scores: Mapping[str, float], states: AnswerStates | None, origin: Origin
    ) -> float | None:
        """Return the probability, from the question alone, that the model's own answer to it is right.

        None without a calibration of it, or where that does not hold; see ``Calibration.estimate_answerable``.
        """
        if self.calibration is None or self.misfit is not None:
            return None
        return self.calibration.estimate_answerable(scores, states, origin)
