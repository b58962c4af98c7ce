"""Learns p_correct, and the threshold of a promise, from judged answers; puts both into an adapter."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from selfdoubt import storage
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.lm.answer import ANSWER_SCORES
from selfdoubt.lm.calibration import Calibration, States
from selfdoubt.qa import heads
from selfdoubt.qa.calibration_report import CalibrationReport, CandidateReport, quality
from selfdoubt.qa.heads import Answers, Fit, fit_logistic, fit_one_score, held_out, losses, within_one_error
from selfdoubt.qa.records import Record
from selfdoubt.qa.threshold import Grid, Promise, find_threshold, grid_from, shortfall

#: From the simplest head to the richest. "score": isotonic on one score; the others are logistic on the answer's
#: surprisal and entropy, the question's too, members' scores too, and one hidden state too.
CANDIDATES = ("score", "answer", "question", "members", "state")
#: Scores that only members (or a sculpt) have.
OF_MEMBERS = ("epistemic", "aleatoric", "disagreement", "spread", "scale")
#: Those of them that a head reads. All together add noise: on the pocket (see experiments/LOG.md) what members say
#: while they read the question adds to the other scores, what they say of the answer is there already.
MEMBER_SCORES = ("question_mean_epistemic", "sum_scale")
WITHOUT_QUESTION = ("sum_epistemic",)
#: Least number of answers a head learns from, and of right and of wrong ones among them.
LEAST, LEAST_OF_CLASS = 20, 5
#: Most topics that are left out in turn; more are merged to so many groups.
TOPIC_GROUPS = 8


def calibrate(
    records: Sequence[Record],
    states: Mapping[str, Any] | None = None,
    *,
    target_accuracy: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    folds: int = 5,
    candidates: Sequence[str] | None = None,
    threshold_share: float = 0.5,
) -> tuple[Calibration, CalibrationReport]:
    """Learn p_correct from judged answers, and with a target the threshold that keeps it.

    All candidates are fitted in ``folds`` folds (equal questions in one); of those within one standard error of the
    best held-out log loss the simplest is taken and fitted on all. With at least two topics of enough right and wrong
    answers, each topic is also left out in turn: how well a head does on a subject that it was not calibrated on.

    With a target, questions are split at random: on one part the head is chosen and fitted; on the other, which it
    never sees, the threshold is tested (``qa.threshold`` says what is promised and why). The stored head is the one
    that was tested. The price is a head, and report, from ``1 - threshold_share`` of the questions only.

    Args:
        records: Judged answers. Left out and counted: unjudged ones, those without an answer or its ``sum_nll``; and in
            the tested part all but one answer of the same question.
        states: Hidden states in the order of ``records``: ``"first.2" -> (records, width)``.
        target_accuracy: Least accuracy of the answers that are given, in (0, 1); None for no threshold.
        confidence: Of keeping it, in (0, 1).
        seed: Of splits and folds.
        folds: At least 2.
        candidates: Some of ``CANDIDATES``; all that the records allow if None.
        threshold_share: Share of questions that tests the threshold, in (0, 1).

    Returns:
        What to store, and what to tell people. Where no threshold qualifies, ``threshold`` is None and the report says
        why.

    Raises:
        ConfigError: If an option is out of range, or a candidate is unknown or cannot be had from these records.
        DataError: If there are too few answers, only right or only wrong ones, no score varies, or one is not finite.
    """
    _check_options(folds, target_accuracy, confidence, threshold_share, candidates)
    kept, left_out = _usable(records)
    answers = _answers(records, kept, states or {})
    options = _options(answers, candidates)
    learning = np.ones(len(answers), bool)
    if target_accuracy is not None:
        learning, once = _split(answers, threshold_share, seed)
        left_out["asked again, so not tested"] = int((~learning & ~once).sum())
    own = answers.at(learning)
    _check_enough(own, target_accuracy is not None)

    parts = heads.folds(own, folds, seed)
    inside = {name: held_out(own, parts, fit, seed) for name, fit in options.items()}
    topics = [records[i].question.topic for i in np.array(kept)[learning]]
    groups = _topic_groups(topics, own.correct)
    outside = {name: held_out(own, groups, fit, seed) for name, fit in options.items()} if groups else {}
    chosen = _choose({name: losses(p, own.correct) for name, p in inside.items()})
    fitted = {name: fit(own, seed) for name, fit in options.items()}

    found = np.full(len(records), np.nan)
    found[np.array(kept)[learning]] = inside[chosen]
    head = fitted[chosen]
    for i, record in enumerate(records):
        if np.isnan(found[i]):
            p = head.p_correct(record.scores, _states_at(head, states or {}, i))
            found[i] = np.nan if p is None else p
    promise, refusal = None, None
    if target_accuracy is not None:
        tested = np.array(kept)[~learning & once]
        right = np.array([records[i].correct for i in tested], bool)
        promise, refusal = _promise(found[tested], right, target_accuracy, confidence, inside[chosen], threshold_share)
    reports = tuple(
        CandidateReport(
            name=name,
            features=fitted[name].features,
            state=_state_name(fitted[name]),
            inside=quality(inside[name], own.correct),
            outside=quality(outside[name], own.correct) if outside else None,
        )
        for name in options
    )
    report = CalibrationReport(
        answers=len(answers),
        left_out={why: n for why, n in left_out.items() if n},
        learnt_from=len(own),
        chosen=chosen,
        candidates=reports,
        topics=len(groups),
        warnings=_warnings(chosen, outside, own.correct),
        promise=promise,
        refusal=refusal,
        out_of_fold=_told(found),
        out_of_topic=_told(_at(np.array(kept)[learning], outside.get(chosen), len(records))),
    )
    head = replace(
        head,
        threshold=None if promise is None else promise.threshold,
        promise=None if promise is None else promise.to_json(),
        about=report.about(),
    )
    return head, report


def _at(rows: Int[np.ndarray, " rows"], p: Float[np.ndarray, " rows"] | None, n: int) -> Float[np.ndarray, " records"]:
    found = np.full(n, np.nan)
    if p is not None:
        found[rows] = p
    return found


def _told(p: Float[np.ndarray, " records"]) -> tuple[float | None, ...]:
    return tuple(None if math.isnan(value) else float(value) for value in p)


def store(calibration: Calibration, adapter_folder: str | os.PathLike[str]) -> Path:
    """Put a calibration into an adapter's ``selfdoubt.json``, in place of one that is there; the rest stays.

    Returns:
        The file.

    Raises:
        LoadError: If the folder is no adapter.
    """
    card = storage.read_card(Path(adapter_folder))
    path = Path(adapter_folder) / storage.CARD
    text = json.dumps({**card, "calibration": calibration.to_json()}, indent=2, allow_nan=False) + "\n"
    storage.write(path, text.encode())
    return path


def _check_options(
    folds: int, target: float | None, confidence: float, share: float, candidates: Sequence[str] | None
) -> None:
    if folds < 2:
        raise ConfigError(f"folds must be at least 2, got {folds}")
    named = {"the target accuracy": target, "the confidence": confidence, "the threshold's share": share}
    for what, value in named.items():
        if value is not None and not 0 < value < 1:
            raise ConfigError(f"{what} is a share between 0 and 1 (90 % is 0.9), got {value}")
    unknown = [name for name in candidates or () if name not in CANDIDATES]
    if unknown or (candidates is not None and not candidates):
        what = f"no candidate is called {unknown[0]!r}" if unknown else "candidates must not be empty"
        raise ConfigError(f"{what}; choose of {', '.join(CANDIDATES)}")


def _usable(records: Sequence[Record]) -> tuple[list[int], dict[str, int]]:
    kept = []
    left_out: Counter[str] = Counter()
    for i, record in enumerate(records):
        if record.correct is None:
            left_out["unjudged"] += 1
        elif record.answer is None:
            left_out["without an answer"] += 1
        elif "sum_nll" not in record.scores:
            left_out["without the score sum_nll"] += 1
        else:
            kept.append(i)
    if not kept:
        why = ", ".join(f"{n} {what}" for what, n in left_out.items()) or "there are none at all"
        raise DataError(f"calibrating needs judged answers with scores, got none ({why}); judge some first")
    return kept, dict(left_out)


def _answers(records: Sequence[Record], kept: Sequence[int], states: Mapping[str, Any]) -> Answers:
    own = [records[i] for i in kept]
    # Only what comes with one answer: samples and P(True) are not asked for when p_correct is.
    names = sorted(set(ANSWER_SCORES).intersection(*(set(r.scores) for r in own)))
    table = np.array([[r.scores[name] for name in names] for r in own], np.float64)
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise DataError(
            f"the score {names[column]} of question {own[row].question.id} is {table[row, column]}, not a number; "
            "ask that question again"
        )
    varies = np.ptp(table, axis=0) > 1e-9 * np.maximum(1, np.abs(table).max(0))
    if not varies[names.index("sum_nll")]:
        raise DataError(
            f"the score sum_nll is {table[0, names.index('sum_nll')]:.4g} for all answers: nothing to learn"
        )
    texts = [" ".join(r.question.text.casefold().split()) for r in own]
    return Answers(
        names=tuple(name for name, v in zip(names, varies, strict=True) if v),
        scores=table[:, varies],
        states={key: _state(key, value, len(records))[np.array(kept)] for key, value in states.items()},
        correct=np.array([r.correct for r in own], bool),
        questions=np.unique(texts, return_inverse=True)[1],
    )


def _state(key: str, value: Any, n: int) -> Float[np.ndarray, "records width"]:
    try:
        heads.split_key(key)
    except ValueError:
        raise ConfigError(f"states are named like 'first.2' (position.layer), got {key!r}") from None
    found = np.asarray(value)
    if found.ndim != 2 or len(found) != n:
        raise DataError(f"the states {key} must be one row for each of {n} records, got the shape {found.shape}")
    if not np.isfinite(found).all():
        raise DataError(f"the states {key} of record {np.argwhere(~np.isfinite(found))[0][0]} are not finite")
    return found.astype(np.float32)


def _options(answers: Answers, wanted: Sequence[str] | None) -> dict[str, Fit]:
    """How to fit each candidate that these answers allow, from the simplest to the richest."""
    members = [name for name in answers.names if name.rpartition("_")[2] in OF_MEMBERS]
    plain = [name for name in answers.names if name not in members]
    own = [name for name in plain if not name.startswith(("question_", "both_"))]
    asked = [name for name in plain if name.startswith("question_")]
    new = [name for name in MEMBER_SCORES if name in members] or [n for n in WITHOUT_QUESTION if n in members]
    new = [name for name in new if not _is_another(answers, name, plain)]
    single = tuple(name for name in heads.SINGLE if name in answers.names)
    found: dict[str, Fit] = {"score": partial(fit_one_score, names=single), "answer": partial(fit_logistic, names=own)}
    read = own
    if asked:
        read = [*read, *asked]
        found["question"] = partial(fit_logistic, names=read)
    if new:
        read = [*read, *new]
        found["members"] = partial(fit_logistic, names=read)
    if answers.states:
        found["state"] = partial(fit_logistic, names=read, keys=sorted(answers.states))
    lacking = [name for name in wanted or () if name not in found]
    if lacking:
        needs = {"question": "scores of the question", "members": "scores of members that differ", "state": "states"}
        raise ConfigError(f"the candidate {lacking[0]!r} needs {needs[lacking[0]]}, and these records have none")
    return {name: fit for name, fit in found.items() if wanted is None or name in wanted}


def _is_another(answers: Answers, name: str, names: Sequence[str]) -> bool:
    """Whether a score is only another name of one of these: without members, aleatoric is total."""
    column = answers.columns([name])
    return bool(np.isclose(answers.columns(names), column, rtol=1e-6, atol=1e-9).all(0).any())


def _split(answers: Answers, share: float, seed: int) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Which answers the head learns from; and one answer of each question, drawn without a look at judgements."""
    draw = np.random.default_rng([seed, 1])
    unique, place = np.unique(answers.questions, return_inverse=True)
    tested = np.zeros(len(unique), bool)
    tested[draw.permutation(len(unique))[: round(share * len(unique))]] = True
    order = draw.permutation(len(place))
    once = np.zeros(len(place), bool)
    once[order[np.unique(place[order], return_index=True)[1]]] = True
    return ~tested[place], once


def _check_enough(answers: Answers, split: bool) -> None:
    wrong, right = answers.classes
    if len(answers) >= LEAST and min(wrong, right) >= LEAST_OF_CLASS:
        return
    part = " in the part that the head learns from (the other part tests the threshold)" if split else ""
    if not min(wrong, right):
        raise DataError(
            f"all {len(answers)} answers{part} are {'right' if right else 'wrong'}: calibrating needs both kinds"
        )
    raise DataError(
        f"calibrating needs at least {LEAST} judged answers{part}, with {LEAST_OF_CLASS} questions answered right and "
        f"{LEAST_OF_CLASS} wrong; got {len(answers)} answers, {right} and {wrong}: judge more"
    )


def _topic_groups(topics: Sequence[str | None], correct: Bool[np.ndarray, " n"]) -> list[Int[np.ndarray, " rows"]]:
    """Rows of each topic, or of some topics together; none if fewer than two have enough answers of both kinds."""
    names = np.array(["" if t is None else t for t in topics])
    sizes = Counter(n for n in names.tolist() if n)
    enough = [t for t in sizes if min(correct[names == t].sum(), (~correct[names == t]).sum()) >= LEAST_OF_CLASS]
    if len(enough) < 2:
        return []
    groups: list[list[str]] = [[] for _ in range(min(TOPIC_GROUPS, len(sizes)))]
    for topic, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        min(groups, key=lambda g: sum(sizes[t] for t in g)).append(topic)
    return [np.flatnonzero(np.isin(names, group)) for group in groups]


def _choose(loss: Mapping[str, Float[np.ndarray, " n"]]) -> str:
    """The simplest within one standard error of the best."""
    best = min(loss, key=lambda name: loss[name].mean())
    return next(name for name in loss if within_one_error(loss[name], loss[best]))


def _warnings(
    chosen: str, outside: Mapping[str, Float[np.ndarray, " n"]], correct: Bool[np.ndarray, " n"]
) -> tuple[str, ...]:
    if not outside:
        return ()
    seen = ~np.isnan(outside[chosen])
    loss = {name: losses(p[seen], correct[seen]) for name, p in outside.items()}
    simpler = list(outside)[: list(outside).index(chosen)]
    better = [name for name in simpler if not within_one_error(loss[chosen], loss[name])]
    if not better:
        return ()
    best = min(better, key=lambda name: loss[name].mean())
    return (
        f"the head {chosen!r} does best on questions like these, but on topics that it was not calibrated on the "
        f"simpler {best!r} does better (log loss {loss[best].mean():.3f} against {loss[chosen].mean():.3f}): where "
        f"other topics will be asked, calibrate with candidates up to {best!r}",
    )


def _promise(
    p: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    target: float,
    confidence: float,
    elsewhere: Float[np.ndarray, " others"],
    share: float,
) -> tuple[Promise | None, str | None]:
    grid: Grid = grid_from(elsewhere, len(p), target, confidence)
    promise = find_threshold(p, correct, target, confidence, grid=grid)
    return promise, None if promise else shortfall(p, correct, target, confidence, grid=grid, share=share)


def _states_at(head: Calibration, states: Mapping[str, Any], row: int) -> States | None:
    """What ``head`` reads of one record's states."""
    if head.state is None:
        return None
    hidden = torch.as_tensor(np.asarray(states[f"{head.state.position}.{head.state.layer}"])[row])[None].float()
    return States((head.state.layer,), hidden, hidden, hidden)


def _state_name(head: Calibration) -> str | None:
    return None if head.state is None else f"{head.state.position}.{head.state.layer}"
