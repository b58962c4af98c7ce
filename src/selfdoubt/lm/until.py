"""Answers again until an answer is among the surest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfdoubt.errors import ConfigError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.inputs import Question
from selfdoubt.lm.options import Options, read_number
from selfdoubt.lm.scores import fallback_score

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


@dataclass(frozen=True)
class Attempts:
    """The outcome of answering until confident: the first confident answer, or else the least risky."""

    answer: Answer
    tries: int
    confident: bool


def generate_until(
    lm: RiskAwareLM,
    prompt: Question,
    percentile: float,
    max_tries: int,
    options: Options,
) -> Attempts:
    """Answer again; see ``RiskAwareLM.generate_until``."""
    if not 0 <= read_number("percentile", percentile, whole=False) <= 1:
        raise ConfigError(f"the percentile must be between 0 and 1, got {percentile}")
    if read_number("max_tries", max_tries, whole=True) < 1:
        raise ConfigError(f"max_tries must be at least 1, got {max_tries}")
    if not {lm.risk, str(fallback_score(lm.risk))} & set(lm.reference):
        raise ConfigError(
            f"a percentile of {lm.risk} needs reference answers, and this model has none; "
            "use an adapter that has them (the pocket model does)"
        )
    options.setdefault("temperature", 1.0)
    first = options.get("seed", 0)
    tried: list[Answer] = []
    for i in range(max_tries):
        tried += lm._generate([prompt], 1, [first + i], options)
        rank = tried[-1].percentile
        if rank is not None and rank <= percentile:
            return Attempts(tried[-1], i + 1, True)
    return Attempts(min(tried, key=lambda a: a.risk), max_tries, False)
