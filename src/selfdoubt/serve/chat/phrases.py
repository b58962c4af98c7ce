"""Numbers in words, as they stand on the page."""

from __future__ import annotations

import math

from selfdoubt.lm.answer import Answer
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.risk_levels import BOUNDS
from selfdoubt.serve.chat.conversation import Turn, confidence

#: One for each level of ``lm.colours``.
LEVEL_NAMES = ("sure", "nearly sure", "wavering", "doubtful", "guessing")


def percent(share: float) -> str:
    """A share in whole percent; what is not certain is never called 0 or 100.

    Example:
        >>> percent(0.874), percent(0.9996), percent(0.001), percent(1.0)
        ('87 %', 'over 99 %', 'under 1 %', '100 %')
    """
    if 0.995 <= share < 1:
        return "over 99 %"
    if 0 < share < 0.005:
        return "under 1 %"
    return f"{share:.0%}".replace("%", " %")


def describe_levels(token_risk: str) -> list[tuple[str, str]]:
    """Each level's name and what it takes to be in it: probabilities where the risk is the surprisal, else nats.

    Example:
        >>> describe_levels("nll")[0], describe_levels("epistemic")[4]
        (('sure', 'over 95 %'), ('guessing', 'over 1.5'))
    """
    if token_risk == "nll":
        said = [f"over {math.exp(-b):.0%}".replace("%", " %") for b in BOUNDS] + ["less"]
    else:
        said = [f"up to {b:g}" for b in BOUNDS] + [f"over {BOUNDS[-1]:g}"]
    return list(zip(LEVEL_NAMES, said, strict=True))


def describe_chance(answer: Answer) -> str:
    """How sure the answer is, first of all; empty where nothing is known to compare it with."""
    if answer.p_correct is not None:
        caveat = f" ({answer.p_correct_note})" if answer.p_correct_note else ""
        return f"Right with {percent(answer.p_correct)}{caveat}"
    if answer.p_correct_note is not None:
        return f"Chance of being right not known here: {answer.p_correct_note}"
    if answer.percentile is not None:
        return f"Riskier than {percent(answer.percentile)} of the reference answers"
    return ""


def describe_answer(answer: Answer, calibration: Calibration | None, *, short: bool = False) -> list[str]:
    """What is to be said of an answer, the most trustworthy first; ``short``: without what a picture beside it says."""
    found = [describe_chance(answer)] if describe_chance(answer) else []
    if (answer.p_correct is not None or answer.p_correct_note is not None) and answer.percentile is not None:
        found.append(f"riskier than {percent(answer.percentile)} of the reference answers")
    if not short and answer.abstain is not None and calibration is not None and calibration.threshold is not None:
        does = "would withhold it" if answer.abstain else "lets it pass"
        found.append(f"the calibrated threshold of {percent(calibration.threshold)} {does}")
    if not found:
        found.append(f"Risk {answer.risk:.2f} ({answer.risk_name}), with nothing to compare it with")
    if answer.finish == "length":
        found.append("cut at max tokens")
    return found


def explain_abstention(turn: Turn) -> str:
    """Why there is no answer to be seen."""
    asked = f"you ask for at least {percent(turn.settings.at_least)}"
    best = turn.best
    if best is None or best.answer is None:
        return f"It was stopped before its verdict, and {asked}."
    sure = confidence(best.answer)
    if sure is None:
        why = best.answer.p_correct_note
        return (
            f"Whether it is right is not known here ({why}), and {asked}."
            if why
            else (f"Nothing says how sure it is, and {asked}.")
        )
    n = turn.answered
    who = "What it would say" if n == 1 else f"The best of {n} answers"
    if best.answer.p_correct is not None:
        return f"{who} is right with {percent(sure)}, and {asked}."
    return f"{who} is riskier than {percent(1 - sure)} of the reference answers, and {asked} to be riskier."


def describe_attempts(turn: Turn) -> str:
    """How answering again went."""
    n = turn.answered
    count = f"{n} {'try' if n == 1 else 'tries'}"
    if turn.confident:
        return _joined(f"Sure enough after {count}", warn_best_of_several(turn))
    how = "stopped" if turn.state == "stopped" else "not sure enough"
    return f"After {count} {how}" + (": this is the least doubtful" if n > 1 else "")


def describe_candidates(turn: Turn) -> str:
    """What stands above several answers."""
    hidden = sum(turn.hides(t) for t in turn.takes)
    line = f"{turn.answered} answers, drawn at temperature {turn.temperature:g}, the least doubtful first"
    return _joined(line, warn_best_of_several(turn), f"{hidden} more not sure enough to show" if hidden else "")


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def warn_best_of_several(turn: Turn) -> str:
    """Why the best chance of several may not hold: it was picked because it is high. Empty where none is told."""
    best = None if turn.best is None else turn.best.answer
    tells = best is not None and turn.answered > 1 and _has_chance(best)
    return "the best of several promises too much" if tells else ""


def warn_conversation(turn: Turn, answer: Answer) -> str:
    """Why the chance that is told may not hold here; empty where nothing speaks against it."""
    return "learnt from single questions, so only a rough guide here" if turn.before and _has_chance(answer) else ""


def _has_chance(answer: Answer) -> bool:
    return confidence(answer) is not None


def describe_progress(turn: Turn) -> str:
    """What is going on while nothing may be seen."""
    count = len(turn.takes[-1].tokens) if turn.takes else 0
    so_far = f"{count} token{'' if count == 1 else 's'}"
    if turn.way == "candidates":
        count = sum(len(t.tokens) for t in turn.takes)
        return f"Thinking of {turn.settings.candidates} answers: {count} tokens so far"
    if turn.way == "until":
        line = f"Try {max(1, len(turn.takes))} of {turn.settings.tries}, until {percent(turn.need)} sure: {so_far}"
        ended = [s for t in turn.takes if t.answer is not None and (s := confidence(t.answer)) is not None]
        return line + (f"; the best so far is {percent(max(ended))} sure" if ended else "")
    return f"Thinking: {so_far} so far" if count else "Reading the question"


def describe_aloud(turn: Turn, calibration: Calibration | None) -> str:
    """What a screen reader says when a turn has ended."""
    if turn.state == "running":
        return ""
    if turn.withheld:
        return f"{turn.shown} {explain_abstention(turn)}" if turn.takes else "Stopped."
    best = turn.best
    said: list[str] = []
    if best is not None and best.answer is not None:
        said = [
            *describe_answer(best.answer, calibration),
            warn_best_of_several(turn),
            warn_conversation(turn, best.answer),
        ]
    about = "".join(f"{part}. " for part in said if part)
    return f"{'Stopped. ' if turn.state == 'stopped' else ''}{turn.shown} {about}".strip()
