"""Everything that a report says, as plain data: what ``report.json`` holds.

A number is an entry ``{"value", "low", "high"}`` with its 95 % interval; where it is not defined, ``value`` is None and
``why`` says why. The layout, ``format`` 1::

    format, run             its number; the run's settings and ``costs``, as given
    draws, seed, level      of the bootstrap
    counts                  asked, judged, right, wrong, abstained, unjudged, unjudged_because {reason: answers}
    accuracy                entry, of all judged answers
    repetition              answers that repeat themselves (``is_repeating``): repeating, of (answers that there are),
                            share, and right (judged right all the same)
    baseline                the score that others are compared with
    scores                  by name: judged (answers that have the score), note, metrics {name: entry},
                            against {"auroc" | "prr": entry of the difference to the baseline}, cost
    left_out                {score: why}
    picked                  the best score of one half, compared with the baseline on the other: see ``figures.picked``
    curves                  {score: percentile, accuracy, low, high}: accuracy of the answers whose confidence is at
                            or above a percentile, so 90 stands for the surest tenth; and riskiest_tenth
    probabilities           by name: judged, bins, ece, brier, nll (entries) and reliability,
                            a list of bins of equally many answers
    topics                  list: topic, judged, accuracy, prr {score: entry}, coverage_at_90, answered, answered_right
    samples                 see ``tries``; or why there are none
    abstention              threshold, promise, decided, answered (counts), coverage, accuracy, accuracy_withheld
                            (entries); or why there is none
    verdict                 see ``headline``

Intervals are of the bootstrap over questions; those of accuracies, at a coverage too, are Wilson's, because where all
of few answers are right all resamples say the same.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from selfdoubt.errors import DataError
from selfdoubt.eval.records import Record
from selfdoubt.eval.repetition import is_repeating
from selfdoubt.report.best_of_n import tries
from selfdoubt.report.metric_entries import (
    LEVEL,
    Draws,
    Entry,
    curve,
    nothing,
    of_probabilities,
    of_scores,
    picked,
    proportion,
)
from selfdoubt.report.summary import best_of, common, verdict

FORMAT = 1
#: Minus the log of the sequence's probability: what a model says of its own answer without any of this.
BASELINE = "sum_nll"
#: Scores that further answers to the same question are drawn for.
OF_SAMPLES = frozenset(
    {"self_consistency", "semantic_entropy", "semantic_entropy_weighted", "n_clusters", "lexical_dissimilarity"}
)


def needs(score: str) -> tuple[str, ...]:
    """Which entries of a run's ``costs`` a score is paid with: all need the answer itself.

    Example:
        >>> needs("sum_nll"), needs("semantic_entropy"), needs("p_false")
        (('answer',), ('answer', 'samples', 'agreement'), ('answer', 'p_true'))
    """
    if score in OF_SAMPLES:
        return ("answer", "samples", "agreement")
    return ("answer", "p_true") if score == "p_false" else ("answer",)


def measure(records: Sequence[Record], run: Mapping[str, Any], *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Measure judged answers.

    Args:
        records: All answers of a run, judged or not.
        run: Settings, for people; ``costs``: {"answer": {"passes", "seconds"}, "samples": ..., "p_true": ...},
            passes of one question and seconds of all; ``risk``: the score that is a sample's risk; ``threshold`` and
            ``promise`` of the calibration.
        draws: Bootstrap draws behind each interval.
        seed: Of these draws.

    Returns:
        What the head of this file lays out, JSON-able.

    Raises:
        DataError: If there are no records.
    """
    if not records:
        raise DataError("there are no answers to measure; give at least one record")
    judged = [r for r in records if r.correct is not None]
    draw = Draws(draws, seed)
    costs = run.get("costs", {})
    scores, left_out = _scores(judged, draw, costs)
    shown = [name for name in dict.fromkeys(("p_correct", best_of(scores), BASELINE)) if name in scores]
    report: dict[str, Any] = {
        "format": FORMAT,
        "run": dict(run),
        "draws": draws,
        "seed": seed,
        "level": LEVEL,
        "counts": _counts(records),
        "accuracy": proportion([bool(r.correct) for r in judged]),
        "repetition": _repetition(records),
        "baseline": BASELINE,
        "scores": scores,
        "left_out": left_out,
        "picked": _picked(judged, scores, draw),
        "curves": {name: curve(*_pairs(judged, name)) for name in shown if len(judged) > 1},
        "probabilities": _probabilities(judged, draw),
        "topics": _topics(judged, shown, draw),
        "samples": tries(records, run, draw),
        "abstention": _abstention(records, run),
    }
    return {**report, "verdict": verdict(report)}


def risk_of(record: Record, name: str) -> float | None:
    """A score of a record by name; ``p_correct`` counts as 1 - p_correct, so that it grows with doubt too."""
    if name == "p_correct":
        return None if record.p_correct is None else 1 - record.p_correct
    return record.scores.get(name)


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    right, wrong = (sum(r.correct is way for r in records) for way in (True, False))
    reasons = Counter(r.note or "no reason was given" for r in records if r.correct is None)
    return {
        "asked": len(records),
        "judged": right + wrong,
        "right": right,
        "wrong": wrong,
        "abstained": sum(r.abstain is True for r in records),
        "unjudged": len(records) - right - wrong,
        "unjudged_because": dict(reasons.most_common()),
    }


def _repetition(records: Sequence[Record]) -> dict[str, Any]:
    answers = [r for r in records if r.answer is not None and not r.question.choices]
    found = [r for r in answers if is_repeating(r.answer or "")]
    return {
        "repeating": len(found),
        "of": len(answers),
        "share": len(found) / len(answers) if answers else 0.0,
        "right": sum(r.correct is True for r in found),
    }


def _pairs(records: Iterable[Record], name: str) -> tuple[list[float], list[bool]]:
    """A score and the judgement, where there are both."""
    found = [(v, r.correct) for r in records if (v := risk_of(r, name)) is not None and r.correct is not None]
    return [v for v, _ in found], [c for _, c in found]


def _scores(
    judged: Sequence[Record], draw: Draws, costs: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Any], dict[str, str]]:
    names = {name: None for r in judged for name in r.scores}
    if any(r.p_correct is not None for r in judged):
        names = {"p_correct": None, **names}
    left_out: dict[str, str] = {}
    if BASELINE not in names:
        left_out[BASELINE] = "no judged answer has it, so nothing is compared with it"
    #: Scores of the same answers are resampled together.
    together: dict[tuple[int, ...], dict[str, list[float]]] = defaultdict(dict)
    for name in names:
        found = [(i, v) for i, r in enumerate(judged) if (v := risk_of(r, name)) is not None]
        values = [v for _, v in found]
        if min(values) == max(values):
            left_out[name] = f"it is {values[0]:g} for all {len(values)} judged answers that have it"
        else:
            together[tuple(i for i, _ in found)][name] = values
    scores: dict[str, Any] = {}
    for places, group in together.items():
        against = [v for i in places if (v := risk_of(judged[i], BASELINE)) is not None]
        paired = len(against) == len(places)
        every = {**group, BASELINE: against} if paired else group
        figures = of_scores(every, [bool(judged[i].correct) for i in places], BASELINE if paired else None, draw)
        for name in group:
            note = _note(len(judged) - len(places), len(judged), paired)
            scores[name] = {"judged": len(places), "note": note, **figures[name], "cost": _cost(name, costs)}
    return {name: scores[name] for name in names if name in scores}, left_out


def _picked(judged: Sequence[Record], scores: Mapping[str, Any], draw: Draws) -> dict[str, Any]:
    names = common(scores)
    if BASELINE not in names:
        return {"why": f"{BASELINE} is missing for some answers"}
    own = [r for r in judged if all(risk_of(r, name) is not None for name in names)]
    return picked({name: _pairs(own, name)[0] for name in names}, [bool(r.correct) for r in own], BASELINE, draw)


def _note(missing: int, judged: int, paired: bool) -> str | None:
    notes = [f"missing for {missing} of {judged} judged answers, measured on the others"] if missing else []
    notes += [] if paired else [f"not compared: {BASELINE} is missing for some of these answers"]
    return "; ".join(notes) or None


def _cost(name: str, costs: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Passes a question, seconds of the whole run, and how many times the seconds of the answers alone that is."""
    parts = needs(name)
    known = [costs[part] for part in parts if part in costs]
    if any(part not in costs for part in parts if part != "agreement"):
        return {"passes": None, "seconds": None, "ratio": None}
    seconds, alone = math.fsum(c["seconds"] for c in known), costs["answer"]["seconds"]
    passes = math.fsum(c["passes"] for c in known)
    return {"passes": passes, "seconds": seconds, "ratio": seconds / alone if alone else None}


def _probabilities(judged: Sequence[Record], draw: Draws) -> dict[str, Any]:
    ways: dict[str, Callable[[Record], float | None]] = {
        "p_correct": lambda r: r.p_correct,
        "sequence probability": lambda r: math.exp(-r.scores[BASELINE]) if BASELINE in r.scores else None,
        "p_true": lambda r: 1 - r.scores["p_false"] if "p_false" in r.scores else None,
    }
    found = {}
    for name, way in ways.items():
        pairs = [(p, bool(r.correct)) for r in judged if (p := way(r)) is not None]
        if pairs:
            own = of_probabilities([p for p, _ in pairs], [c for _, c in pairs], draw)
            found[name] = {"judged": len(pairs), **own}
    return found


def _topics(judged: Sequence[Record], shown: Sequence[str], draw: Draws) -> list[dict[str, Any]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for r in judged:
        if r.question.topic is not None:
            groups[r.question.topic].append(r)
    found = []
    for topic, own in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
        figures = {name: _alone(own, name, draw) for name in shown}
        answered = [r for r in own if r.abstain is False]
        found.append(
            {
                "topic": topic,
                "judged": len(own),
                "accuracy": proportion([bool(r.correct) for r in own]),
                "prr": {name: entry["prr"] for name, entry in figures.items()},
                "coverage_at_90": {name: entry["coverage_at_90"] for name, entry in figures.items()},
                "answered": len(answered) if any(r.abstain is not None for r in own) else None,
                "answered_right": sum(bool(r.correct) for r in answered),
            }
        )
    return found


def _alone(records: Sequence[Record], name: str, draw: Draws) -> dict[str, Entry]:
    values, correct = _pairs(records, name)
    return of_scores({name: values}, correct, None, draw, ["prr", "coverage_at_90"])[name]["metrics"]


def _abstention(records: Sequence[Record], run: Mapping[str, Any]) -> dict[str, Any]:
    decided = [r for r in records if r.abstain is not None]
    if not decided:
        return {"why": "no threshold was set: `selfdoubt calibrate --target-accuracy` sets one"}
    given = [bool(r.correct) for r in decided if not r.abstain and r.correct is not None]
    withheld = [bool(r.correct) for r in decided if r.abstain and r.correct is not None]
    coverage: Entry = proportion([not r.abstain for r in decided])
    return {
        "threshold": run.get("threshold"),
        "promise": run.get("promise"),
        "decided": len(decided),
        "answered": sum(not r.abstain for r in decided),
        "coverage": coverage,
        "accuracy": proportion(given) if given else nothing("no answer that was given is judged"),
        "accuracy_withheld": proportion(withheld) if withheld else nothing("no answer that was withheld is judged"),
    }
