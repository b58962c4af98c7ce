"""The heads that a calibration chooses among: from the simplest to the richest, by the inputs that they read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from selfdoubt.calibration.heads import CalibrationAnswers, Fit, fit_logistic, fit_one_score
from selfdoubt.errors import ConfigError
from selfdoubt.lm.hidden_states import StateKey
from selfdoubt.lm.scores import Score

#: From the simplest head to the richest. "score": isotonic on one score; the others are logistic on the answer's
#: surprisal and entropy, the question's too, members' scores too, and one hidden state too.
CANDIDATES = ("score", "answer", "question", "members", "state")
#: Signals of one pass that heads read. Margin, self-certainty and the disagreement of late layers are noise next to
#: them (see experiments/LOG.md): with these, too, a head of 250 pocket answers keeps no threshold that it kept before.
OF_ONE_PASS = ("nll", "total")
#: Signals that only members (or a sculpt) have.
OF_MEMBERS = ("epistemic", "aleatoric", "disagreement", "spread", "divergence", "scale")
#: The scores of these signals that a head reads. All of them together add noise: on the pocket (see experiments/LOG.md)
#: the members' disagreement over the question adds to the other scores, that over the answer does not.
MEMBER_SCORES = ("question_mean_epistemic", "sum_scale")
WITHOUT_QUESTION = ("sum_epistemic",)
#: Scores of members among which a head on one score chooses, next to all scores that need none.
SINGLE_MEMBER_SCORES = ("mean_epistemic", "question_mean_epistemic", "both_mean_epistemic")
_NEEDS = {"question": "scores of the question", "members": "scores of members that differ", "state": "states"}


def list_candidates(answers: CalibrationAnswers, chosen: Sequence[str] | None) -> dict[str, Fit]:
    """Return a fit function of p_correct per candidate that these answers allow, from the simplest to the richest.

    Raises:
        ConfigError: If a chosen candidate needs what these answers lack.
    """
    plain, members = _split_names(answers)
    of_answer = [name for name in plain if Score.parse(name).part == "answer"]
    asked = [name for name in plain if Score.parse(name).part == "question"]
    new = [name for name in MEMBER_SCORES if name in members] or [n for n in WITHOUT_QUESTION if n in members]
    new = [name for name in new if not _is_another(answers, name, plain)]
    single = ["sum_nll", *(name for name in plain if name != "sum_nll")]  # of equals the best-known one
    single += [name for name in SINGLE_MEMBER_SCORES if name in members]
    options: dict[str, Fit] = {
        "score": partial(fit_one_score, names=single),
        "answer": partial(fit_logistic, names=of_answer),
    }
    read = of_answer
    if asked:
        read = [*read, *asked]
        options["question"] = partial(fit_logistic, names=read)
    if new:
        read = [*read, *new]
        options["members"] = partial(fit_logistic, names=read)
    if answers.states:
        options["state"] = partial(fit_logistic, names=read, keys=sorted(answers.states))
    lacking = [name for name in chosen or () if name not in options]
    if lacking:
        raise ConfigError(f"the candidate {lacking[0]!r} needs {_NEEDS[lacking[0]]}, and these records have none")
    return {name: fit for name, fit in options.items() if chosen is None or name in chosen}


def list_question_candidates(answers: CalibrationAnswers, allowed: Sequence[str] | None) -> dict[str, Fit]:
    """Return a fit function of p_answerable per candidate: they read what is known before an answer's first token.

    None are there for answers without scores of their questions. Hidden states are read where ``allowed`` has "state".
    """
    plain, members = _split_names(answers)
    asked = [name for name in plain if Score.parse(name).part == "question"]
    if not asked:
        return {}
    new = [name for name in MEMBER_SCORES if name in members and Score.parse(name).part == "question"]
    new = [name for name in new if not _is_another(answers, name, plain)]
    read = [*asked, *new]
    options: dict[str, Fit] = {
        "score": partial(fit_one_score, names=read),
        "question": partial(fit_logistic, names=read),
    }
    keys = sorted(key for key in answers.states if StateKey.parse(key).position != "mean")
    if keys and (allowed is None or "state" in allowed):
        options["state"] = partial(fit_logistic, names=read, keys=keys)
    return options


def _split_names(answers: CalibrationAnswers) -> tuple[list[str], list[str]]:
    """Return the names of the surprisals and entropies, and of the scores that need members."""
    scores = [score for score in map(Score.parse, answers.names) if isinstance(score, Score)]
    plain = [str(score) for score in scores if score.signal in OF_ONE_PASS]
    return plain, [str(score) for score in scores if score.signal in OF_MEMBERS]


def _is_another(answers: CalibrationAnswers, name: str, names: Sequence[str]) -> bool:
    """Return whether a score is only another name of one of these: without members, aleatoric is total."""
    column = answers.columns([name])
    return bool(np.isclose(answers.columns(names), column, rtol=1e-6, atol=1e-9).all(0).any())
