"""Turns judged records into the arrays that calibration heads learn from, and splits them by question and topic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from selfdoubt.calibration import heads
from selfdoubt.calibration.heads import LEAST_OF_CLASS, CalibrationAnswers, RowIndices
from selfdoubt.errors import DataError
from selfdoubt.eval.records import Record
from selfdoubt.lm.hidden_states import StateKey
from selfdoubt.lm.scores import ANSWER_SCORES

#: Least number of answers a head learns from.
LEAST = 20
#: Most topics that are left out in turn; more are merged to this number of groups.
TOPIC_GROUPS = 8


def calibration_rows(records: Sequence[Record]) -> tuple[RowIndices, dict[str, int]]:
    """Return indices of the records that can be learnt from, and the number of the others by reason.

    Raises:
        DataError: If no record can be learnt from.
    """
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
    return np.array(kept), dict(left_out)


def calibration_arrays(
    records: Sequence[Record], kept: RowIndices, states: Mapping[str, Any], sets: Sequence[str] | None = None
) -> CalibrationAnswers:
    """Return the records at these indices, with the scores that all of them have and that vary.

    Args:
        records: Judged answers.
        kept: Indices of those to return.
        states: Hidden states of all records, by "position.layer".
        sets: Name of each record's set of questions; None where all are of one.

    Raises:
        ConfigError: If a state is not named "position.layer".
        DataError: If a score or a state is not finite, ``sum_nll`` is always the same, or states do not fit.
    """
    usable = [records[i] for i in kept]
    # Only what comes with one answer: samples and P(True) are not asked for when p_correct is.
    names = sorted(set(ANSWER_SCORES).intersection(*(set(r.scores) for r in usable)))
    table = np.array([[r.scores[name] for name in names] for r in usable], np.float64)
    if not np.isfinite(table).all():
        row, column = np.argwhere(~np.isfinite(table))[0]
        raise DataError(
            f"the score {names[column]} of question {usable[row].question.id} is {table[row, column]}, not a number; "
            "ask that question again"
        )
    varies = np.ptp(table, axis=0) > 1e-9 * np.maximum(1, np.abs(table).max(0))
    if not varies[names.index("sum_nll")]:
        raise DataError(
            f"the score sum_nll is {table[0, names.index('sum_nll')]:.4g} for all answers: nothing to learn"
        )
    return CalibrationAnswers(
        names=tuple(name for name, v in zip(names, varies, strict=True) if v),
        scores=table[:, varies],
        states={key: _state(key, value, len(records))[kept] for key, value in states.items()},
        correct=np.array([r.correct for r in usable], bool),
        questions=number_questions(usable),
        sets=None if sets is None else np.unique([sets[i] for i in kept], return_inverse=True)[1],
    )


def number_questions(records: Sequence[Record]) -> Int[np.ndarray, " records"]:
    """Return a number for each record's question: equal where the texts are, except for case and spaces."""
    texts = [" ".join(r.question.text.casefold().split()) for r in records]
    return np.unique(texts, return_inverse=True)[1]


def _state(key: str, value: Any, n: int) -> Float[np.ndarray, "records width"]:
    StateKey.parse(key)
    table = np.asarray(value)
    if table.ndim != 2 or len(table) != n:
        raise DataError(f"the states {key} must be one row for each of {n} records, got the shape {table.shape}")
    if not np.isfinite(table).all():
        raise DataError(f"the states {key} of record {np.argwhere(~np.isfinite(table))[0][0]} are not finite")
    return table.astype(np.float32)


def split_questions(
    questions: Int[np.ndarray, " n"], share: float, seed: int
) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Choose the answers that the head learns from, and one answer of each question, by the questions alone."""
    draw = np.random.default_rng([seed, 1])
    unique, place = np.unique(questions, return_inverse=True)
    tested = np.zeros(len(unique), bool)
    tested[draw.permutation(len(unique))[: round(share * len(unique))]] = True
    order = draw.permutation(len(place))
    one_per_question = np.zeros(len(place), bool)
    one_per_question[order[np.unique(place[order], return_index=True)[1]]] = True
    return ~tested[place], one_per_question


def check_enough(answers: CalibrationAnswers, split: bool) -> None:
    """Check that there are enough right and wrong answers to learn a head from.

    Raises:
        DataError: If there are too few answers, or no right or no wrong one.
    """
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


def group_topics(topics: Sequence[str | None], answers: CalibrationAnswers) -> list[RowIndices]:
    """Return the rows of each topic, or of several merged topics.

    The list is empty if fewer than two topics have enough right and wrong answers.

    A topic is left out if too few answers remain to learn from without it and without the questions that it shares.
    """
    names = np.array(["" if t is None else t for t in topics])
    sizes = Counter(n for n in names.tolist() if n)
    enough = [t for t in sizes if min(answers.at(names == t).classes) >= LEAST_OF_CLASS]
    groups: list[list[str]] = [[] for _ in range(min(TOPIC_GROUPS, len(sizes)))]
    for topic, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        min(groups, key=lambda g: sum(sizes[t] for t in g)).append(topic)
    rows_of_groups = [np.flatnonzero(np.isin(names, group)) for group in groups]
    usable = [
        rows
        for (rest, _), rows in zip(heads.leave_each_out(answers, rows_of_groups), rows_of_groups, strict=True)
        if min(rest.classes) >= LEAST_OF_CLASS
    ]
    both = answers.at(np.concatenate(usable)).classes if len(usable) > 1 else (0, 0)
    return usable if len(enough) > 1 and min(both) >= LEAST_OF_CLASS else []
