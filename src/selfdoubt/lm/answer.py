"""What a person gets: tokens with their doubt, and an answer with named scores. All scores grow with doubt."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from selfdoubt.errors import ConfigError

if TYPE_CHECKING:
    from selfdoubt.lm.calibration import States

#: What is shown in place of an answer that is withheld.
UNSURE = "I'm not sure."
#: The score that stands for an answer's doubt, and the one that colours a token. Without reference answers, or without
#: a question, ``sum_nll`` stands in for the first. By ``benchmarks/quality.py`` no other score that needs no labels
#: ranks wrong answers better: "am I sure of my answer?" and "have I met this subject?" err on different questions.
DEFAULT_RISK = "rank_nll"
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
    scores: Mapping[str, float] = field(repr=False)  #: by the names in ``ANSWER_SCORES``
    risk: float  #: the default score
    risk_name: str
    percentile: float | None  #: share of reference answers with a lower risk, in [0, 1]; None without reference answers
    finish: Literal["stop", "length", "given"]
    p_correct: float | None = None  #: calibrated probability that the answer is right; None without a calibration
    abstain: bool | None = None  #: p_correct is below the calibrated threshold; None without a threshold
    states: States | None = field(default=None, repr=False, compare=False)  #: of the layers that were asked for
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


#: Scores that weigh others by their rank among reference answers, in [0, 1]; ranks compare what sums cannot.
RANK_SCORES: dict[str, tuple[tuple[str, float], ...]] = {
    "rank_nll": (("sum_nll", 2 / 3), ("question_mean_nll", 1 / 3)),
}


def rank_scores(scores: Mapping[str, float], reference: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The ``RANK_SCORES`` that these scores and reference quantiles allow."""
    return {
        name: math.fsum(weight * _rank(scores[part], reference[part]) for part, weight in parts)
        for name, parts in RANK_SCORES.items()
        if all(part in scores and part in reference for part, _ in parts)
    }


def _rank(value: float, quantiles: Sequence[float]) -> float:
    """Share of reference answers below, in [0, 1], linear between quantiles."""
    place = bisect_left(quantiles, value)
    if place == 0 or place == len(quantiles):
        return float(place > 0)
    low, high = quantiles[place - 1], quantiles[place]
    return (place - 1 + (value - low) / (high - low)) / (len(quantiles) - 1)


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


def check_score(name: str) -> None:
    """Refuse what is no answer score.

    Raises:
        ConfigError: If there is no such score.
    """
    known = {*ANSWER_SCORES, *RANK_SCORES}
    if name not in known:
        raise ConfigError(f"no answer score is called {name!r}; choose one of {', '.join(sorted(known))}")


def fallback_score(name: str) -> str:
    """The score that takes this one's place where it cannot be had."""
    return "sum_nll" if name in RANK_SCORES else "mean_nll"


def pick_risk(scores: Mapping[str, float], name: str) -> tuple[float, str]:
    """The risk of this name; without a question (or an answer), the same score of what there is.

    Raises:
        ConfigError: If there is no such score.
    """
    check_score(name)
    bare = name.removeprefix("question_").removeprefix("both_")
    for candidate in (name, bare, f"question_{bare}", fallback_score(name), f"question_{fallback_score(name)}"):
        if candidate in scores:
            return scores[candidate], candidate
    raise ConfigError(f"the score {name!r} needs at least one token, got an empty answer and question")


@runtime_checkable
class Scored(Protocol):
    """Something with answer scores."""

    @property
    def scores(self) -> Mapping[str, float]:
        """By name."""


def reference_quantiles(answers: Sequence[Scored], n: int = 100) -> dict[str, list[float]]:
    """Ascending quantiles of each score over reference answers, from the least to the greatest: ``n + 1`` numbers.

    Where the answers have their tokens, the tokens' own scores are ranked too, as ``token_nll``, ``token_total``, ...

    Raises:
        ConfigError: If there are no answers.
    """
    if not answers:
        raise ConfigError("reference quantiles need at least one answer, got none")
    own = [{name: v for name, v in answer.scores.items() if name in ANSWER_SCORES} for answer in answers]
    found = _quantiles(own, n)
    tokens = [token for answer in answers if isinstance(answer, Answer) for token in answer.tokens]
    own_scores = _TOKEN_SCORES.items()
    rows = [{f"token_{name}": v for name, score in own_scores if (v := score(token)) is not None} for token in tokens]
    return found | _quantiles([rank_scores(scores, found) for scores in own], n) | _quantiles(rows, n)


def _quantiles(rows: Sequence[Mapping[str, float]], n: int) -> dict[str, list[float]]:
    found = {}
    for name in sorted({name for row in rows for name in row}):
        values = sorted(row[name] for row in rows if name in row)
        inner = quantiles(values, n=n, method="inclusive") if len(values) > 1 else values * (n - 1)
        found[name] = [float(f"{v:.5g}") for v in (values[0], *inner, values[-1])]
    return found
