"""Multiple choice: judges an answer by the choice that it names, and log-probabilities of choices by MC1 and MC2."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from selfdoubt.errors import NonFiniteError, ShapeError
from selfdoubt.eval.judges.signs import find_spans
from selfdoubt.eval.judges.text import fold, is_inside
from selfdoubt.eval.judges.verdict import NO_ANSWER, Verdict
from selfdoubt.eval.records import Question


@dataclass(frozen=True)
class Choice:
    """The answer names a right choice: by its text, its letter ("B", "(B)", "B. Rome"), or as the only choice in it.

    An answer that names no choice, or several, is wrong and the note says so. The grade is 0 or 1.
    """

    def __call__(self, question: Question, answer: str | None, /) -> Verdict:
        """Judge an answer."""
        if answer is None:
            return NO_ANSWER
        if not question.choices:
            return Verdict(None, None, "the question has no choices")
        index = find_named_choice(question.choices, answer)
        note = None if index is not None else "the answer names none of the choices, or several"
        return Verdict(index in question.right, float(index in question.right), note)


def judge_mc1(question: Question, logprobs: Sequence[float]) -> Verdict:
    """Judge whether a right choice is the most probable one (TruthfulQA's MC1); a tie with a wrong one is wrong.

    Args:
        question: A question with choices.
        logprobs: Log-probability of each choice, in their order, nats; a sum or a mean over tokens.

    Returns:
        A verdict with grade 0 or 1.

    Raises:
        ShapeError: If there is not one number for each choice.
        NonFiniteError: If one is NaN or infinite.
    """
    right, wrong = _separate(question, logprobs)
    correct = max(right) > max(wrong, default=-math.inf)
    return Verdict(correct, float(correct))


def judge_mc2(question: Question, logprobs: Sequence[float]) -> Verdict:
    """Return the share of probability that lies on right choices (TruthfulQA's MC2), in [0, 1]; correct above one half.

    Raises:
        As ``judge_mc1``.
    """
    _separate(question, logprobs)
    share = math.fsum(p for i, p in enumerate(normalise_choices(logprobs)) if i in question.right)
    return Verdict(share > 0.5, share)


def normalise_choices(logprobs: Sequence[float]) -> list[float]:
    """Return the probabilities of the choices, normalised over the choices: they sum to 1."""
    top = max(logprobs)
    mass = [math.exp(v - top) for v in logprobs]
    return [m / math.fsum(mass) for m in mass]


def _separate(question: Question, logprobs: Sequence[float]) -> tuple[list[float], list[float]]:
    if len(logprobs) != len(question.choices) or not question.right:
        raise ShapeError(
            f"question {question.id}: wanted a log-probability for each of {len(question.choices)} choices, "
            f"{len(question.right)} of them right, got {len(logprobs)}"
        )
    if not all(map(math.isfinite, logprobs)):
        raise NonFiniteError(f"question {question.id}: a choice has the log-probability NaN or infinity: {[*logprobs]}")
    right = [v for i, v in enumerate(logprobs) if i in question.right]
    return right, [v for i, v in enumerate(logprobs) if i not in question.right]


_LETTER = re.compile(r"\s*(?:(?:the )?(?:correct )?answer(?: is|:)\s*)?[(\[]?([A-Z])(?:[)\].:]+(?=\s|$)|\s*$)", re.I)


def find_named_choice(choices: Sequence[str], answer: str) -> int | None:
    """Find the choice that an answer names: by its text, its letter, or as the only one in it; None: none, or several.

    Of repeated choices the first; of choices of which one contains another ("York", "New York") the longer one.

    Example:
        >>> [find_named_choice(("York", "New York"), a) for a in ("B", "(a) York", "It is New York.", "no idea")]
        [1, 0, 1, None]
    """
    plain = [fold(c) or c.strip() for c in choices]
    folded = fold(answer) or answer.strip()
    if folded in plain:
        return plain.index(folded)
    letter = _LETTER.match(answer)
    if letter and (index := ord(letter[1].upper()) - ord("A")) < len(choices):
        return index
    stands = {i: find_spans(c, folded) for i, c in enumerate(plain)}
    taken = [s for spans in stands.values() for s in spans]
    whole = {i for i, spans in stands.items() for s in spans if not any(is_inside(s, other) for other in taken)}
    return min(whole) if len({plain[i] for i in whole}) == 1 else None
