"""What a person gets: tokens with their doubt, and an answer with named scores. All scores grow with doubt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any, Literal

from selfdoubt.errors import ConfigError

if TYPE_CHECKING:
    from selfdoubt.lm.calibration import States

#: What is shown in place of an answer that is withheld.
UNSURE = "I'm not sure."
#: The score that stands for an answer's doubt, and the one that colours a token: surprisal, and its sum. By
#: ``benchmarks/quality.py`` entropy ranks a model's own answers a hair better, but of text that somebody else wrote it
#: only says how sure the model was of something else.
DEFAULT_RISK = "sum_nll"
TOKEN_RISK = "nll"


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
    scores: Mapping[str, float] = field(repr=False)  #: by the names in ``ANSWER_SCORES``
    risk: float  #: the default score
    risk_name: str
    percentile: float | None  #: share of reference answers with a lower risk, in [0, 1]; None without reference answers
    finish: Literal["stop", "length", "given"]
    p_correct: float | None = None  #: calibrated probability that the answer is right; None without a calibration
    abstain: bool | None = None  #: p_correct is below the calibrated threshold; None without a threshold
    states: States | None = field(default=None, repr=False, compare=False)  #: of the layers that were asked for

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
            "abstain": self.abstain,
            "finish": self.finish,
            "scores": dict(self.scores),
        }


TokenScore = Callable[[Token], float | None]
Pool = Callable[[Sequence[float]], float]

_TOKEN_SCORES: dict[str, TokenScore] = {
    "nll": lambda t: t.nll,
    "total": lambda t: t.total,
    "aleatoric": lambda t: t.aleatoric,
    "epistemic": lambda t: t.epistemic,
    "disagreement": lambda t: t.disagreement,
    "spread": lambda t: t.spread,
    "scale": lambda t: t.scale,
}
_POOLS: dict[str, Pool] = {"sum": math.fsum, "mean": fmean, "max": max}

#: Answer scores by name: ``{part_}{sum|mean|max}_{token score}``, over the answer's tokens, the ``question_``'s, or
#: ``both_``. Well-known ones under these names: ``sum_nll`` is minus the log of the sequence probability (MSP),
#: ``mean_nll`` the log of perplexity, ``mean_total`` the mean token entropy, ``question_mean_nll`` the surprisal of the
#: question.
ANSWER_SCORES: dict[str, tuple[str, Pool, TokenScore]] = {
    f"{part}{pool}_{name}": (part, _POOLS[pool], score)
    for part in ("", "question_", "both_")
    for pool in _POOLS
    for name, score in _TOKEN_SCORES.items()
}


def answer_scores(answer: Sequence[Token], question: Sequence[Token]) -> dict[str, float]:
    """All scores that these tokens allow: without a question, or without a sculpt, some are absent."""
    parts = {
        "": [*answer],
        "question_": [*question],
        "both_": [*question, *answer] if answer and question else [],
    }
    scores = {}
    for name, (part, pool, score) in ANSWER_SCORES.items():
        values = [v for t in parts[part] if (v := score(t)) is not None]
        if values:
            scores[name] = pool(values)
    return scores


def pick_risk(scores: Mapping[str, float], name: str) -> tuple[float, str]:
    """The risk of this name; without a question (or an answer), the same score of what there is.

    Raises:
        ConfigError: If there is no such score.
    """
    if name not in ANSWER_SCORES:
        raise ConfigError(f"no answer score is called {name!r}; choose one of {', '.join(sorted(ANSWER_SCORES))}")
    bare = name.removeprefix("question_").removeprefix("both_")
    for candidate in (name, bare, f"question_{bare}", "mean_nll", "question_mean_nll"):
        if candidate in scores:
            return scores[candidate], candidate
    raise ConfigError(f"the score {name!r} needs at least one token, got an empty answer and question")


def reference_quantiles(answers: Sequence[Answer], n: int = 100) -> dict[str, list[float]]:
    """Ascending quantiles of each score over reference answers, from the least to the greatest: ``n + 1`` numbers.

    Raises:
        ConfigError: If there are no answers.
    """
    if not answers:
        raise ConfigError("reference quantiles need at least one answer, got none")
    found = {}
    for name in sorted({name for answer in answers for name in answer.scores}):
        values = sorted(answer.scores[name] for answer in answers if name in answer.scores)
        inner = quantiles(values, n=n, method="inclusive") if len(values) > 1 else values * (n - 1)
        found[name] = [float(f"{v:.5g}") for v in (values[0], *inner, values[-1])]
    return found
