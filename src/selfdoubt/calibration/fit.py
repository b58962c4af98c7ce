"""Fits p_correct, and the threshold of a guaranteed accuracy, on judged answers; stores both in an adapter."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from selfdoubt import storage
from selfdoubt.calibration import heads
from selfdoubt.calibration.arrays import (
    calibration_arrays,
    calibration_rows,
    check_enough,
    group_topics,
    number_questions,
    split_questions,
)
from selfdoubt.calibration.candidates import CANDIDATES, list_candidates, list_question_candidates
from selfdoubt.calibration.heads import (
    CalibrationAnswers,
    Fit,
    Probabilities,
    RowIndices,
    is_within_one_error,
    mean_over,
    predict_held_out,
)
from selfdoubt.calibration.quality import AnswerableReport, CalibrationReport, CandidateReport, measure_quality
from selfdoubt.calibration.threshold import AccuracyGuarantee, Grid, build_grid, explain_no_threshold, find_threshold
from selfdoubt.errors import ConfigError
from selfdoubt.eval.records import Record
from selfdoubt.lm.calibration import Calibration
from selfdoubt.lm.conditions import Conditions
from selfdoubt.lm.hidden_states import AnswerStates
from selfdoubt.metrics import log_losses


class HeldOut(NamedTuple):
    """The rows that are left out in turn."""

    folds: Sequence[RowIndices]  #: of answers like all others
    groups: Sequence[RowIndices]  #: of each set, or of each topic; empty where there are too few
    sets: tuple[str, ...]  #: names of the sets; () where the groups are topics


class FitOptions(TypedDict, total=False):
    """Options of ``fit_calibration``."""

    target_accuracy: float | None
    confidence: float
    seed: int
    folds: int
    candidates: Sequence[str] | None
    threshold_share: float


def fit_calibration(
    records: Sequence[Record],
    states: Mapping[str, Any] | None = None,
    *,
    target_accuracy: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    folds: int = 5,
    candidates: Sequence[str] | None = None,
    threshold_share: float = 0.5,
    conditions: Conditions | None = None,
    sets: Sequence[str] | None = None,
) -> tuple[Calibration, CalibrationReport]:
    """Learn p_correct from judged answers, and with a target the threshold that keeps it.

    All candidates are fitted in ``folds`` folds (equal questions in one); the one of least held-out log loss is fitted
    on all. With at least two topics of enough right and wrong answers, each topic is also left out in turn: how well a
    head does on a subject that it was not calibrated on. With several ``sets``, each is left out in turn instead, and
    the head, its inputs and its penalties are chosen by the log loss on the sets that were left out: by what transfers.

    Next to it a head of p_answerable is learnt in the same way, from what is known before an answer's first token.

    With a target, questions are split at random: on one part the head is chosen and fitted; on the other, which it
    never sees, the threshold is tested (``calibration.threshold`` proves the guarantee). The stored head is the one
    that was tested. The price is a head, and report, from ``1 - threshold_share`` of the questions only.

    Args:
        records: Judged answers. Left out and counted: unjudged ones, those without an answer or its ``sum_nll``; and in
            the tested part all but one answer of the same question.
        states: Hidden states in the order of ``records``: ``"first.2" -> (records, width)``.
        target_accuracy: Least accuracy of the answers at or above the threshold, in (0, 1); None for no threshold.
        confidence: Probability with which the target accuracy is kept, in (0, 1).
        seed: Seed of splits and folds.
        folds: Number of folds of the cross-validation, at least 2.
        candidates: Names in ``CANDIDATES`` to choose from; None takes all that the records allow.
        threshold_share: Share of questions that tests the threshold, in (0, 1).
        conditions: Conditions under which the answers were made, and their model (``Conditions.of_model``): answers
            made under others get no p_correct. Answers cut at max tokens are found in the records. None stores no
            conditions, and each p_correct comes with a note that says so.
        sets: Name of each record's set of questions, e.g. of its run; None where all are of one.

    Returns:
        The calibration to store, and a report for people. Where no threshold qualifies, ``threshold`` is
        None and the report says why.

    Raises:
        ConfigError: If an option is out of range, or a candidate is unknown or needs scores that these records lack.
        DataError: If there are too few answers, only right or only wrong ones, no score varies, or one is not finite.
    """
    _check_options(folds, target_accuracy, confidence, threshold_share, candidates)
    places, left_out = calibration_rows(records)
    learning, one_per_question = np.ones(len(places), bool), np.ones(len(places), bool)
    if target_accuracy is not None:
        learning, one_per_question = split_questions(
            number_questions([records[i] for i in places]), threshold_share, seed
        )
    kept = places[learning]
    arrays = calibration_arrays(records, kept, states or {}, sets)  # no other answer is known while a head is fitted
    check_enough(arrays, target_accuracy is not None)
    options = list_candidates(arrays, candidates)
    folded = heads.split_folds(arrays, folds, seed)
    left_out_sets = heads.list_sets(arrays)
    held_out = HeldOut(
        folded,
        left_out_sets or group_topics([records[i].question.topic for i in kept], arrays),
        tuple(sets[kept[rows[0]]] for rows in left_out_sets) if sets is not None else (),
    )
    chosen, head, reports, inside, outside = _measure_all(options, arrays, held_out, seed)
    p_correct = _apply_to_all(head, records, states or {}, kept, inside[chosen])
    answerable, of_questions = None, None
    asked = list_question_candidates(arrays, candidates)
    if asked:
        best, answerable, entries, known, _ = _measure_all(asked, arrays, held_out, seed)
        alone = _apply_to_all(answerable, records, states or {}, kept, known[best])
        of_questions = AnswerableReport(best, entries, _to_optional(alone))
    promise, refusal = None, None
    if target_accuracy is not None:
        again, tested = places[~learning & ~one_per_question], places[~learning & one_per_question]
        scored = np.array([all(name in records[i].scores for name in head.features) for i in tested], bool)
        left_out |= {"asked again, so not tested": len(again), "without a score that the head reads": sum(~scored)}
        tested = tested[scored]
        right = np.array([records[i].correct for i in tested], bool)
        p_tested = np.nan_to_num(p_correct[tested], nan=0.0)  # too far from all that was learnt: abstain
        promise, refusal = _find_guarantee(
            p_tested, right, target_accuracy, confidence, inside[chosen], threshold_share
        )
    report = CalibrationReport(
        answers=len(places),
        left_out={why: int(n) for why, n in left_out.items() if n},
        learnt_from=len(arrays),
        chosen=chosen,
        candidates=reports,
        topics=0 if held_out.sets else len(held_out.groups),
        sets=held_out.sets,
        warnings=() if held_out.sets else _warnings(chosen, outside, arrays.correct),
        promise=promise,
        refusal=refusal,
        out_of_fold=_to_optional(p_correct),
        out_of_topic=_to_optional(_at(kept, outside.get(chosen), len(records))),
        answerable=of_questions,
    )
    head = replace(
        head,
        threshold=None if promise is None else promise.threshold,
        promise=None if promise is None else promise.to_json(),
        about=report.about(),
        conditions=None if conditions is None else replace(conditions, cut=_fewest_when_cut(records, places)),
        answerable=answerable,
    )
    return head, report


def _fewest_when_cut(records: Sequence[Record], places: heads.RowIndices) -> int | None:
    """Return the fewest tokens of an answer that was cut at max tokens; None where none was."""
    usable = [records[i] for i in places]
    return min((len(r.tokens) for r in usable if r.finish == "length" and r.tokens), default=None)


def _at(rows: Int[np.ndarray, " rows"], p: Float[np.ndarray, " rows"] | None, n: int) -> Float[np.ndarray, " records"]:
    filled = np.full(n, np.nan)
    if p is not None:
        filled[rows] = p
    return filled


def _to_optional(p: Float[np.ndarray, " records"]) -> tuple[float | None, ...]:
    return tuple(None if math.isnan(value) else float(value) for value in p)


def store_calibration(calibration: Calibration, adapter_folder: str | os.PathLike[str]) -> Path:
    """Store a calibration in an adapter's ``selfdoubt.json``, in place of an earlier one; other entries stay.

    Returns:
        Path of ``selfdoubt.json``.

    Raises:
        LoadError: If the folder is not an adapter, or its files are not those that were saved.
    """
    manifest = storage.read_manifest(adapter_folder)
    storage.verify(adapter_folder, manifest)
    return storage.write_manifest(adapter_folder, {**manifest, "calibration": calibration.to_json()})


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


def _measure_all(
    options: Mapping[str, Fit], arrays: CalibrationAnswers, held_out: HeldOut, seed: int
) -> tuple[str, Calibration, tuple[CandidateReport, ...], dict[str, Probabilities], dict[str, Probabilities]]:
    """Fit all candidates, held out and on all answers; choose one by what is left out.

    Returns:
        The name of the chosen candidate, its head, the reports of all, and their probabilities out of fold and out of
        set or topic.
    """
    inside = {name: predict_held_out(arrays, held_out.folds, fit, seed) for name, fit in options.items()}
    outside = {
        name: predict_held_out(arrays, held_out.groups, fit, seed) for name, fit in options.items() if held_out.groups
    }
    by_what = outside if held_out.sets else inside
    groups = held_out.groups if held_out.sets else held_out.folds
    # Of equals the simplest. The simplest within one standard error of the best was no better: of the pocket's
    # questions, by heads from 100, 250 and 600 of them (12, 10 and 5 draws), log loss on the others was .425, .386 and
    # .347, and .422, .376 and .343 so.
    chosen = min(options, key=lambda name: mean_over(log_losses(by_what[name], arrays.correct), groups))
    fitted = {name: fit(arrays, seed) for name, fit in options.items()}
    of_sets = held_out.groups if held_out.sets else ()
    reports = tuple(
        CandidateReport(
            name=name,
            features=fitted[name].features,
            state=None if (state := fitted[name].state) is None else str(state.key),
            inside=measure_quality(inside[name], arrays.correct, of_sets),
            outside=measure_quality(outside[name], arrays.correct, of_sets) if outside else None,
            by_set={
                of: measure_quality(outside[name][rows], arrays.correct[rows])
                for of, rows in zip(held_out.sets, of_sets, strict=True)
            },
        )
        for name in options
    )
    return chosen, fitted[chosen], reports, inside, outside


def _warnings(
    chosen: str, outside: Mapping[str, Float[np.ndarray, " n"]], correct: Bool[np.ndarray, " n"]
) -> tuple[str, ...]:
    """Return a warning where a simpler head than the chosen one does better on topics that were left out."""
    if not outside:
        return ()
    seen = ~np.isnan(outside[chosen])
    loss = {name: log_losses(p[seen], correct[seen]) for name, p in outside.items()}
    simpler = list(outside)[: list(outside).index(chosen)]
    better = [name for name in simpler if not is_within_one_error(loss[chosen], loss[name])]
    if not better:
        return ()
    best = min(better, key=lambda name: loss[name].mean())
    return (
        f"the head {chosen!r} does best on questions like these, but on topics that it was not calibrated on the "
        f"simpler {best!r} does better (log loss {loss[best].mean():.3f} against {loss[chosen].mean():.3f}): where "
        f"other topics will be asked, calibrate with candidates up to {best!r}",
    )


def _find_guarantee(
    p: Float[np.ndarray, " n"],
    correct: Bool[np.ndarray, " n"],
    target: float,
    confidence: float,
    elsewhere: Float[np.ndarray, " others"],
    share: float,
) -> tuple[AccuracyGuarantee | None, str | None]:
    grid: Grid = build_grid(elsewhere, len(p), target, confidence)
    promise = find_threshold(p, correct, target, confidence, grid=grid)
    return promise, None if promise else explain_no_threshold(p, correct, target, confidence, grid=grid, share=share)


def _apply_to_all(
    head: Calibration, records: Sequence[Record], states: Mapping[str, Any], kept: RowIndices, known: Probabilities
) -> Float[np.ndarray, " records"]:
    """Return the known held-out probabilities of the kept records, and for all others what the head says; else NaN."""
    p = _at(kept, known, len(records))
    for i, record in enumerate(records):
        if np.isnan(p[i]):
            value = head.p_correct(record.scores, _states_at(head, states, i))
            p[i] = np.nan if value is None else value
    return p


def _states_at(head: Calibration, states: Mapping[str, Any], row: int) -> AnswerStates | None:
    """Return the states of one record that ``head`` reads."""
    if head.state is None:
        return None
    hidden = torch.as_tensor(np.asarray(states[str(head.state.key)])[row])[None].float()
    return AnswerStates((head.state.layer,), hidden, hidden, hidden)
