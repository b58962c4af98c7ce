"""Phrases of the page: puts numbers and states into words."""

from __future__ import annotations

import math
from functools import partial

from selfdoubt.formatting import format_percent
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.risk_levels import BOUNDS
from selfdoubt.serve.chat.conversation import Turn, get_confidence

#: One for each level of ``lm.risk_levels``.
LEVEL_NAMES = ("sure", "nearly sure", "wavering", "doubtful", "guessing")
#: Formats a share in whole percent.
format_share = partial(format_percent, digits=0, more="over ", less="under ")


def describe_levels(token_risk: str) -> list[tuple[str, str]]:
    """Return each level's name and its bound: a probability if the risk is the surprisal, else nats.

    Example:
        >>> describe_levels("nll")[0], describe_levels("epistemic")[4]
        (('sure', 'over 95 %'), ('guessing', 'over 1.5'))
    """
    if token_risk == "nll":
        bounds = [f"over {format_share(math.exp(-b))}" for b in BOUNDS] + ["less"]
    else:
        bounds = [f"up to {b:g}" for b in BOUNDS] + [f"over {BOUNDS[-1]:g}"]
    return list(zip(LEVEL_NAMES, bounds, strict=True))


def describe_chance(answer: Answer) -> str:
    """Return the answer's confidence in words; empty without a calibration and without reference answers."""
    if answer.p_correct is not None:
        note = f" ({answer.p_correct_note})" if answer.p_correct_note else ""
        return f"Right with {format_share(answer.p_correct)}{note}"
    if answer.p_correct_note is not None:
        return f"Chance of being right not known here: {answer.p_correct_note}"
    if answer.percentile is not None:
        return f"Riskier than {format_share(answer.percentile)} of the reference answers"
    return ""


def describe_answer(answer: Answer, calibration: Calibration | None, *, short: bool = False) -> list[str]:
    """Return statements on an answer, the most trustworthy first.

    Args:
        answer: The answer.
        calibration: The model's.
        short: Leave out those that a picture next to it makes, too.
    """
    phrases = [describe_chance(answer)] if describe_chance(answer) else []
    if (answer.p_correct is not None or answer.p_correct_note is not None) and answer.percentile is not None:
        phrases.append(f"riskier than {format_share(answer.percentile)} of the reference answers")
    if answer.p_answerable is not None:
        phrases.append(f"from the question alone {format_share(answer.p_answerable)}")
    if not short and answer.abstain is not None and calibration is not None and calibration.threshold is not None:
        does = "would abstain" if answer.abstain else "lets it pass"
        phrases.append(f"the calibrated threshold of {format_share(calibration.threshold)} {does}")
    if not phrases:
        phrases.append(f"Risk {answer.risk:.2f} ({answer.risk_name}), with nothing to compare it with")
    if answer.finish == "length":
        phrases.append("cut at max tokens")
    return phrases


def explain_abstention(turn: Turn) -> str:
    """Return why no answer can be seen."""
    need = f"you ask for at least {format_share(turn.settings.at_least)}"
    best = turn.best
    if best is None or best.answer is None:
        return f"It was stopped before its verdict, and {need}."
    sure = get_confidence(best.answer)
    if sure is None:
        why = best.answer.p_correct_note
        return (
            f"Whether it is right is not known here ({why}), and {need}."
            if why
            else (f"Nothing says how sure it is, and {need}.")
        )
    n = turn.answered
    subject = "What it would say" if n == 1 else f"The best of {n} answers"
    if best.answer.p_correct is not None:
        return f"{subject} is right with {format_share(sure)}, and {need}."
    return f"{subject} is riskier than {format_share(1 - sure)} of the reference answers, and {need} to be riskier."


def describe_attempts(turn: Turn) -> str:
    """Return how answering again went."""
    n = turn.answered
    count = f"{n} {'try' if n == 1 else 'tries'}"
    if turn.is_confident:
        return _join(f"Sure enough after {count}", warn_best_of_several(turn))
    how = "stopped" if turn.state == "stopped" else "not sure enough"
    return f"After {count} {how}" + (": this is the least doubtful" if n > 1 else "")


def describe_candidates(turn: Turn) -> str:
    """Return the line above several answers."""
    hidden = sum(turn.hides(attempt) for attempt in turn.attempts)
    first = f"{turn.answered} answers, drawn at temperature {turn.temperature:g}, the least doubtful first"
    return _join(first, warn_best_of_several(turn), f"{hidden} more not sure enough to show" if hidden else "")


def _join(*phrases: str) -> str:
    return "; ".join(filter(None, phrases))


def warn_best_of_several(turn: Turn) -> str:
    """Return a warning that the best p_correct of several is too high, because it was picked as the highest; or ""."""
    best = None if turn.best is None else turn.best.answer
    is_picked = best is not None and turn.answered > 1 and get_confidence(best) is not None
    return "the best of several promises too much" if is_picked else ""


def warn_conversation(turn: Turn, answer: Answer) -> str:
    """Return a warning that p_correct may not hold after earlier turns; empty without a reason."""
    is_shaky = turn.before and get_confidence(answer) is not None
    return "learnt from single questions, so only a rough guide here" if is_shaky else ""


def describe_progress(turn: Turn) -> str:
    """Return the state of a turn while nothing of it may be seen."""
    count = len(turn.attempts[-1].tokens) if turn.attempts else 0
    so_far = f"{count} token{'' if count == 1 else 's'}"
    if turn.mode == "candidates":
        count = sum(len(attempt.tokens) for attempt in turn.attempts)
        return f"Thinking of {turn.settings.candidates} answers: {count} tokens so far"
    if turn.mode == "until":
        attempt, most = max(1, len(turn.attempts)), turn.settings.max_tries
        text = f"Try {attempt} of {most}, until {format_share(turn.needed_confidence)} sure: {so_far}"
        ended = [s for t in turn.attempts if t.answer is not None and (s := get_confidence(t.answer)) is not None]
        return text + (f"; the best so far is {format_share(max(ended))} sure" if ended else "")
    return f"Thinking: {so_far} so far" if count else "Reading the question"


def describe_aloud(turn: Turn, calibration: Calibration | None) -> str:
    """Return the text that a screen reader reads when a turn has ended."""
    if turn.state == "running":
        return ""
    if turn.is_hidden:
        return f"{turn.shown} {explain_abstention(turn)}" if turn.attempts else "Stopped."
    best = turn.best
    phrases: list[str] = []
    if best is not None and best.answer is not None:
        phrases = [
            *describe_answer(best.answer, calibration),
            warn_best_of_several(turn),
            warn_conversation(turn, best.answer),
        ]
    sentences = "".join(f"{phrase}. " for phrase in phrases if phrase)
    return f"{'Stopped. ' if turn.state == 'stopped' else ''}{turn.shown} {sentences}".strip()
