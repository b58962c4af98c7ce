"""``generate_until``: draws answers until one is confident enough."""

from __future__ import annotations

from dataclasses import dataclass

from selfdoubt.errors import ConfigError
from selfdoubt.lm import defaults
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.confidence import is_confident
from selfdoubt.lm.front import ModelWithFront
from selfdoubt.lm.generation import generate_answers
from selfdoubt.lm.inputs import PromptLike
from selfdoubt.lm.options import Options, read_number
from selfdoubt.lm.scores import fallback_score


@dataclass(frozen=True)
class Attempts:
    """The outcome of answering until confident: the first confident answer, or else the least risky."""

    answer: Answer
    attempts: int
    confident: bool


def generate_until(
    lm: ModelWithFront,
    prompt: PromptLike,
    percentile: float,
    max_tries: int,
    options: Options,
) -> Attempts:
    """Draw answers until one is confident enough; see ``RiskAwareLM.generate_until``."""
    if not 0 <= read_number("percentile", percentile, whole=False) <= 1:
        raise ConfigError(f"the percentile must be between 0 and 1, got {percentile}")
    if read_number("max_tries", max_tries, whole=True) < 1:
        raise ConfigError(f"max_tries must be at least 1, got {max_tries}")
    front = lm.front
    if not {front.risk, str(fallback_score(front.risk))} & set(front.reference):
        raise ConfigError(
            f"a percentile of {front.risk} needs reference answers, and this model has none; "
            "use an adapter that has them (the pocket model does)"
        )
    options.setdefault("temperature", 1.0)
    first = options.get("seed", defaults.SEED)
    answers: list[Answer] = []
    for i in range(max_tries):
        answers += generate_answers(lm, [prompt], 1, [first + i], options)
        rank = answers[-1].percentile
        if is_confident(None if rank is None else 1 - rank, 1 - percentile):
            return Attempts(answers[-1], i + 1, True)
    return Attempts(min(answers, key=lambda a: a.risk), max_tries, False)
