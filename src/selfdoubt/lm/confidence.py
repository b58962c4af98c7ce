"""Decisions between several answers to one question: the best of n, and when to stop trying again."""

from __future__ import annotations

from collections.abc import Iterable

from selfdoubt.lm.answer import Answer


def confidence_order(answer: Answer) -> tuple[bool, float, float]:
    """Return a key for sorting answers to one question, the most confident first; of equals, the least risky.

    An answer to which a calibration gives no number counts less than any to which it gives one.
    """
    is_refused = answer.p_correct is None and answer.p_correct_note is not None
    return is_refused, -answer.confidence, answer.risk


def choose_best(answers: Iterable[Answer]) -> Answer:
    """Return the best of n answers to one question: the most confident; see ``Answer.confidence``.

    Raises:
        ValueError: If there are none.
    """
    return min(answers, key=confidence_order)


def is_confident(confidence: float | None, at_least: float) -> bool:
    """Return True if an answer is confident enough to end further attempts.

    Args:
        confidence: Confidence in [0, 1]: p_correct, or 1 - percentile; None if it is unknown, which is never enough.
        at_least: Least confidence that is enough, in [0, 1].
    """
    return confidence is not None and confidence >= at_least
