"""The result types: a ``Token`` with its risk, an ``Answer`` with named scores. All scores grow with doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selfdoubt.lm.hidden_states import AnswerStates

#: "stop": the answer ended by itself or at a stop; "length": it was cut; "given": it is existing text.
Finish = Literal["stop", "length", "given"]
#: Shown in place of an answer from which the model abstains.
UNSURE = "I'm not sure."


@dataclass(frozen=True)
class Alternative:
    """One of the most probable tokens in a chosen token's place."""

    text: str
    id: int
    probability: float


@dataclass(frozen=True)
class Token:
    """One token and its scores. Entropies and log-probabilities are in nats.

    ``text`` is the piece this token adds to the text; it is empty while a character of several bytes is not complete.
    """

    text: str
    id: int
    logprob: float  #: log-probability of this token under the mean distribution, <= 0
    total: float  #: entropy of the mean distribution, in [0, log vocabulary]
    aleatoric: float  #: mean entropy of the members
    epistemic: float  #: entropy of the members' mean less aleatoric, in [0, log members]
    disagreement: float  #: share of members whose most probable token is another, in [0, 1]
    spread: float  #: standard deviation over members of this token's probability, in [0, 0.5]
    scale: float | None  #: predicted standard deviation of this token's logit (sculpt)
    risk: float  #: the score that colours the token
    alternatives: tuple[Alternative, ...] = ()
    gap: float = 0.0  #: log-probability of the most probable token less this one's, nats, >= 0
    divergence: float | None = None  #: mean KL(base || member), nats; None unless the base answers for its members
    margin: float | None = None  #: 1 - (largest - second largest probability), in [0, 1]; None in a question
    self_certainty: float | None = None  #: minus KL(uniform || distribution), nats, <= 0; None in a question
    layer_disagreement: float | None = None  #: disagreement of late layers on the most probable tokens, nats
    density: float | None = None  #: distance of the state from all usual ones; None without their statistics
    relative_density: float | None = None  #: distance from the states of usual answers, less ``density``

    @property
    def nll(self) -> float:
        """Surprisal: minus the log-probability, nats."""
        return 0.0 - self.logprob  # never -0.0, which prints with its sign


@dataclass(frozen=True)
class Answer:
    """An answer (or any scored text), the user's tokens of the question, and the scores of both.

    ``question`` holds only tokens of the user's text, not those of the chat template around it.
    """

    text: str
    tokens: tuple[Token, ...]
    question: tuple[Token, ...]
    scores: Mapping[str, float] = field(repr=False)  #: by the names in ``scores.ANSWER_SCORES``
    risk: float  #: the score ``risk_name``
    risk_name: str  #: name of the score that is the risk
    percentile: float | None  #: share of reference answers with a lower risk, in [0, 1]; None without reference answers
    finish: Finish
    p_correct: float | None = None  #: calibrated probability that the answer is right; None without a calibration
    abstain: bool | None = None  #: p_correct is below the calibrated threshold; None without a threshold
    states: AnswerStates | None = field(default=None, repr=False, compare=False)  #: of the layers that were asked for
    p_correct_note: str | None = None  #: why a calibrated model has no p_correct here, or a caveat; one line
    #: Calibrated probability, from the question alone, that the model's own answer is right; None if not known here.
    p_answerable: float | None = None

    @property
    def most_doubtful(self) -> Token | None:
        """The token of the answer with the highest risk."""
        return max(self.tokens, key=lambda token: token.risk, default=None)

    @property
    def confidence(self) -> float:
        """Confidence in the answer, to compare it with others: p_correct, else 1 - percentile, else -risk."""
        if self.p_correct is not None:
            return self.p_correct
        return -self.risk if self.percentile is None else 1 - self.percentile

    @property
    def abstained(self) -> bool:
        """True if the model abstains from its own answer; False for text that it was given to score."""
        return bool(self.abstain) and self.finish != "given"

    @property
    def shown(self) -> str:
        """The text to show: the answer's, or ``UNSURE`` if the model abstains."""
        return UNSURE if self.abstained else self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the tokens."""
        return {
            "text": self.text,
            "risk": self.risk,
            "risk_name": self.risk_name,
            "percentile": self.percentile,
            "p_correct": self.p_correct,
            "p_correct_note": self.p_correct_note,
            "abstain": self.abstain,
            "p_answerable": self.p_answerable,
            "finish": self.finish,
            "scores": dict(self.scores),
        }
