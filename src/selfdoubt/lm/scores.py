"""Scores of an answer by name: a part of the conversation, a pool, and a signal of its tokens. All grow with doubt."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, quantiles
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float

from selfdoubt.errors import ConfigError
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.rauq import compute_rauq
from selfdoubt.risk import percentile

Part = Literal["answer", "question", "both"]
Pool = Literal["sum", "mean", "max"]
Signal = Literal[
    "nll", "total", "aleatoric", "epistemic", "disagreement", "spread", "scale", "divergence", "margin",
    "self_certainty", "layer_disagreement", "density", "relative_density",
]  # fmt: skip

#: The score that is an answer's risk, and the signal that is a token's. Without reference answers, or without a
#: question, ``sum_nll`` takes the place of the first. By ``benchmarks/real.py`` on three pretrained models prepared
#: with the questions of this package no other pair of scores that need no labels ranks free answers better on the mean:
#: an answer is as doubtful as it is surprising token by token, and as its question is long and strange.
DEFAULT_RISK = "rank_joint"
TOKEN_RISK: Signal = "nll"

_PREFIXES: dict[Part, str] = {"answer": "", "question": "question_", "both": "both_"}
_POOLS: dict[Pool, Callable[[Sequence[float]], float]] = {"sum": math.fsum, "mean": fmean, "max": max}


#: Attention of the positions that predict an answer's tokens on themselves, in some layers.
Attention: TypeAlias = Float[np.ndarray, "tokens layers heads"]


@dataclass(frozen=True)
class Score:
    """One number for many tokens: ``pool`` of ``signal`` over the tokens of ``part``.

    Well-known ones by name: ``sum_nll`` is minus the log of the sequence probability (MSP), ``mean_nll`` the log of
    perplexity, ``mean_total`` the mean token entropy, ``question_mean_nll`` the surprisal of the question.

    Example:
        >>> Score.parse("question_max_nll")
        Score(part='question', pool='max', signal='nll')
        >>> str(Score("answer", "sum", "nll"))
        'sum_nll'
    """

    part: Part
    pool: Pool
    signal: Signal

    def __str__(self) -> str:
        return f"{_PREFIXES[self.part]}{self.pool}_{self.signal}"

    @classmethod
    def parse(cls, name: str) -> AnswerScore:
        """Return the score of a name.

        Raises:
            ConfigError: If the name is unknown; the message lists all.
        """
        if name not in ANSWER_SCORES:
            raise _unknown(name)
        return ANSWER_SCORES[name]

    def compute(self, answer: Sequence[Token], question: Sequence[Token]) -> float | None:
        """Return the score; None where no token has the signal, or ``both`` lacks one part."""
        tokens: list[Token] = []
        if self.part != "both" or (answer and question):
            tokens = [*(question if self.part != "answer" else ()), *(answer if self.part != "question" else ())]
        values = [value for token in tokens if (value := getattr(token, self.signal)) is not None]
        return _POOLS[self.pool](values) if values else None

    @property
    def needs_question(self) -> bool:
        """True if the score reads the question's tokens."""
        return self.part != "answer"


@dataclass(frozen=True)
class RauqScore:
    """The score ``rauq`` of an answer, see ``compute_rauq``."""

    part: Part = "answer"

    def __str__(self) -> str:
        return "rauq"

    def compute(self, answer: Sequence[Token], attention: Attention | None) -> float | None:
        """Return the score; None without the attention of each token."""
        if attention is None or not answer or len(attention) != len(answer):
            return None
        return compute_rauq(np.array([token.logprob for token in answer]), attention)

    @property
    def signal(self) -> Signal:
        """The signal that it reads next to the attention."""
        return "nll"

    @property
    def needs_question(self) -> bool:
        """True if the score reads the question's tokens."""
        return False


#: A score of an answer's tokens, and maybe the question's.
AnswerScore: TypeAlias = Score | RauqScore
#: Signals that are not computed where a prompt is read: a question has none.
ANSWER_SIGNALS: tuple[Signal, ...] = ("margin", "self_certainty", "layer_disagreement")
#: Signals that compare members: of a single one they are 0, or another's equal.
MEMBER_SIGNALS: tuple[Signal, ...] = ("aleatoric", "epistemic", "disagreement", "spread", "divergence")
#: All scores by name.
ANSWER_SCORES: dict[str, AnswerScore] = {
    str(score): score
    for score in (Score(p, o, s) for p in get_args(Part) for o in get_args(Pool) for s in get_args(Signal))
    if score.part == "answer" or score.signal not in ANSWER_SIGNALS
} | {"rauq": RauqScore()}
#: Scores that weigh others by their rank among reference answers, in [0, 1]; ranks compare what sums cannot.
RANK_SCORES: dict[str, tuple[tuple[AnswerScore, float], ...]] = {
    name: tuple((ANSWER_SCORES[score], weight) for score, weight in weighted.items())
    for name, weighted in {
        "rank_joint": {"mean_nll": 1 / 2, "question_sum_nll": 1 / 2},
        "rank_nll": {"sum_nll": 2 / 3, "question_mean_nll": 1 / 3},
        "rank_nll_total": {"sum_nll": 1 / 2, "mean_total": 1 / 2},
        "rank_nll_rauq": {"sum_nll": 1 / 2, "rauq": 1 / 2},
        "rank_density": {"sum_nll": 2 / 3, "mean_relative_density": 1 / 3},
    }.items()
}


def compute_answer_scores(
    answer: Sequence[Token],
    question: Sequence[Token],
    attention: Attention | None = None,
    *,
    members_read: Literal["prompt", "answer"] = "prompt",
) -> dict[str, float]:
    """Return all scores by name; without a question, attention or a sculpt, some are absent.

    Where members read the answer only, none compares them on the question.
    """
    scores = {}
    for name, score in ANSWER_SCORES.items():
        if members_read == "answer" and compares_members_on_question(score):
            continue
        value = score.compute(answer, question) if isinstance(score, Score) else score.compute(answer, attention)
        if value is not None:
            scores[name] = value
    return scores


def compares_members_on_question(score: AnswerScore) -> bool:
    """Return True for a score that needs members' distributions at the question's tokens."""
    return score.needs_question and score.signal in MEMBER_SIGNALS


def compute_rank_scores(scores: Mapping[str, float], reference: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the ``RANK_SCORES`` that these scores and reference quantiles allow."""
    return {
        name: math.fsum(
            weight * percentile(scores[str(score)], reference[str(score)], linear=True) for score, weight in weighted
        )
        for name, weighted in RANK_SCORES.items()
        if all(str(score) in scores and str(score) in reference for score, _ in weighted)
    }


def choose_default_risk(reference: Mapping[str, Sequence[float]]) -> str:
    """Choose the score that is the risk where none is named, by the reference quantiles that there are.

    It is ``DEFAULT_RISK`` where the reference answers know it. Else it is ``rank_nll``: the pocket model's, on whose
    questions it is better, and that of adapters made earlier; without reference answers ``sum_nll`` takes its place.
    """
    return DEFAULT_RISK if DEFAULT_RISK in reference else "rank_nll"


def check_score(name: str) -> None:
    """Check that a score has this name.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name not in ANSWER_SCORES and name not in RANK_SCORES:
        raise _unknown(name)


def check_signal(name: str) -> None:
    """Check that a signal has this name.

    Raises:
        ConfigError: If the name is unknown.
    """
    if name not in get_args(Signal):
        raise ConfigError(f"no token signal is called {name!r}; choose one of {', '.join(get_args(Signal))}")


def _unknown(name: str) -> ConfigError:
    known = sorted({*ANSWER_SCORES, *RANK_SCORES})
    return ConfigError(f"no answer score is called {name!r}; choose one of {', '.join(known)}")


def fallback_score(name: str) -> Score:
    """Return the score that takes this one's place where it is absent."""
    return Score("answer", "sum" if name in RANK_SCORES else "mean", "nll")


def pick_risk(scores: Mapping[str, float], name: str) -> tuple[float, str]:
    """Return the risk and its name: the named score, or if it is absent the one that takes its place.

    Without a question (or an answer) that is the same score of the other part.

    Raises:
        ConfigError: If the name is unknown, or there is neither an answer nor a question.
    """
    for candidate in _fallbacks(name):
        if candidate in scores:
            return scores[candidate], candidate
    raise ConfigError(f"the score {name!r} needs at least one token, got an empty answer and question")


def _fallbacks(name: str) -> Iterator[str]:
    """Yield a score's name, and those of the scores that take its place, in order."""
    check_score(name)
    yield name
    for score in (ANSWER_SCORES.get(name), fallback_score(name)):
        if isinstance(score, Score):
            yield str(replace(score, part="answer"))
            yield str(replace(score, part="question"))


@runtime_checkable
class HasScores(Protocol):
    """An answer, or the record of one."""

    @property
    def scores(self) -> Mapping[str, float]:
        """Scores by name."""


def reference_quantiles(answers: Sequence[HasScores], n: int = 100) -> dict[str, list[float]]:
    """Return ascending quantiles of each score over reference answers, from the least to the greatest: ``n + 1`` each.

    Where the answers have their tokens, the tokens' own signals are ranked too, as ``token_nll``, ``token_total``, ...

    Raises:
        ConfigError: If there are no answers.
    """
    if not answers:
        raise ConfigError("reference quantiles need at least one answer, got none")
    rows = [{name: v for name, v in answer.scores.items() if name in ANSWER_SCORES} for answer in answers]
    tokens = [token for answer in answers if isinstance(answer, Answer) for token in answer.tokens]
    token_rows = [{f"token_{s}": v for s in get_args(Signal) if (v := getattr(t, s)) is not None} for t in tokens]
    known = _quantiles(rows, n)
    return known | _quantiles([compute_rank_scores(row, known) for row in rows], n) | _quantiles(token_rows, n)


def _quantiles(rows: Sequence[Mapping[str, float]], n: int) -> dict[str, list[float]]:
    """Return quantiles of each name's values, with five digits."""
    result = {}
    for name in sorted({name for row in rows for name in row}):
        values = sorted(row[name] for row in rows if name in row)
        inner = quantiles(values, n=n, method="inclusive") if len(values) > 1 else values * (n - 1)
        result[name] = [float(f"{v:.5g}") for v in (values[0], *inner, values[-1])]
    return result
