"""What a person gets: tokens with their doubt, and an answer with named scores. All scores grow with doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selfdoubt.lm.hidden_states import AnswerStates

#: What is shown in place of an answer that is withheld.
UNSURE = "I'm not sure."


@dataclass(frozen=True)
class Alternative:
    """A token that could have stood in the chosen one's place."""

    text: str
    id: int
    probability: float


@dataclass(frozen=True)
class Token:
    """One token and the doubt about it. Entropies and log-probabilities are in nats.

    ``text`` is the piece this token adds to the text; it is empty while a character of several bytes is not complete.
    """

    text: str
    id: int
    logprob: float  #: of this token under the mean distribution, <= 0
    total: float  #: entropy of the mean distribution, in [0, log vocabulary]
    aleatoric: float  #: mean entropy of the members
    epistemic: float  #: total - aleatoric, in [0, log members]
    disagreement: float  #: share of members that would have chosen another token, in [0, 1]
    spread: float  #: standard deviation over members of this token's probability, in [0, 0.5]
    scale: float | None  #: predicted standard deviation of this token's logit (sculpt)
    risk: float  #: the score that colours the token
    alternatives: tuple[Alternative, ...] = ()
    gap: float = 0.0  #: log-probability of the most probable token less this one's, nats, >= 0

    @property
    def nll(self) -> float:
        """Surprisal: minus the log-probability, nats."""
        return 0.0 - self.logprob  # never -0.0, which prints with its sign


@dataclass(frozen=True)
class Answer:
    """An answer (or any scored text), the question's own words, and what both say about doubt.

    ``question`` holds only the words that a person wrote, not the chat template around them.
    """

    text: str
    tokens: tuple[Token, ...]
    question: tuple[Token, ...]
    scores: Mapping[str, float] = field(repr=False)  #: by the names in ``scores.ANSWER_SCORES``
    risk: float  #: the default score
    risk_name: str
    percentile: float | None  #: share of reference answers with a lower risk, in [0, 1]; None without reference answers
    finish: Literal["stop", "length", "given"]
    p_correct: float | None = None  #: calibrated probability that the answer is right; None without a calibration
    abstain: bool | None = None  #: p_correct is below the calibrated threshold; None without a threshold
    states: AnswerStates | None = field(default=None, repr=False, compare=False)  #: of the layers that were asked for
    p_correct_note: str | None = None  #: why a calibrated model has no p_correct here, or a caveat; one line

    @property
    def most_doubtful(self) -> Token | None:
        """The token of the answer with the highest risk."""
        return max(self.tokens, key=lambda token: token.risk, default=None)

    @property
    def withheld(self) -> bool:
        """Whether the model abstains from its own answer; text that it was given to score is never withheld."""
        return bool(self.abstain) and self.finish != "given"

    @property
    def shown(self) -> str:
        """What a person should see: the text, or that the model is not sure."""
        return UNSURE if self.withheld else self.text

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
            "finish": self.finish,
            "scores": dict(self.scores),
        }
