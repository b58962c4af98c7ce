"""Measures judged answers: computes every number of a report."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from selfdoubt.errors import DataError
from selfdoubt.eval.records import Record
from selfdoubt.eval.repetition import is_repeating
from selfdoubt.eval.scores.agreement import AGREEMENT_SCORES
from selfdoubt.eval.settings import Cost, Run
from selfdoubt.metrics import Estimate, estimate_share
from selfdoubt.report.abstention import measure_abstention, measure_utilities
from selfdoubt.report.best_of_n import measure_samples
from selfdoubt.report.metric_entries import (
    BINS,
    LEVEL,
    Bootstrap,
    ScoreEntries,
    bin_probabilities,
    measure_curve,
    measure_probabilities,
    measure_scores,
    validate_best_score,
)
from selfdoubt.report.results import (
    AnswerCounts,
    BestScoreTest,
    Measurements,
    ProbabilityResults,
    Repetition,
    Report,
    ScoreCost,
    ScoreResults,
    TopicResults,
)
from selfdoubt.report.summary import conclude, find_best_score, find_common_scores

#: The score that others are compared with: minus the log of the sequence's probability, which any model gives.
BASELINE = "sum_nll"
#: Probabilities of being right that a calibration learnt: by the answer, and by the question alone.
PROBABILITIES = ("p_correct", "p_answerable")


def list_costs(score: str) -> tuple[str, ...]:
    """Return the entries of a run's ``costs`` that a score needs; all scores need the answer itself.

    Example:
        >>> list_costs("sum_nll"), list_costs("semantic_entropy"), list_costs("p_false")
        (('answer',), ('answer', 'samples', 'agreement'), ('answer', 'p_true'))
    """
    if score in AGREEMENT_SCORES:
        return ("answer", "samples", "agreement")
    return ("answer", "p_true") if score == "p_false" else ("answer",)


def measure_answers(records: Sequence[Record], run: Run, *, draws: int = 1000, seed: int = 0) -> Report:
    """Measure judged answers.

    Args:
        records: All answers of a run, judged or not.
        run: Settings of the run: ``costs`` of its steps, ``risk``, the name of the score of a sample, and ``threshold``
            and ``promise`` of a calibration.
        draws: Number of bootstrap draws behind each interval.
        seed: Seed of these draws.

    Raises:
        DataError: If there are no records.
    """
    if not records:
        raise DataError("there are no answers to measure; give at least one record")
    judged = [r for r in records if r.correct is not None]
    bootstrap = Bootstrap(draws=draws, seed=seed)
    scores, left_out = _measure_scores(judged, bootstrap, run.costs or {})
    shown = [name for name in dict.fromkeys(("p_correct", find_best_score(scores), BASELINE)) if name in scores]
    measured = Measurements(
        run=run,
        draws=draws,
        seed=seed,
        level=LEVEL,
        counts=_count(records),
        accuracy=estimate_share([bool(r.correct) for r in judged], level=LEVEL),
        repetition=_count_repetition(records),
        baseline=BASELINE,
        scores=scores,
        left_out=left_out,
        best_score_test=_validate_best_score(judged, scores, bootstrap),
        curves={name: measure_curve(*_pair(judged, name)) for name in shown if name and len(judged) > 1},
        probabilities=_measure_probabilities(judged, bootstrap),
        topics=_measure_topics(judged, [name for name in shown if name], bootstrap),
        samples=measure_samples(records, run, bootstrap),
        abstention=measure_abstention(records, run, bootstrap),
        utilities=measure_utilities(records, bootstrap),
    )
    return Report(**vars(measured), verdict=conclude(measured))


def get_risk(record: Record, name: str) -> float | None:
    """Return a score of a record by name; probabilities count as 1 - p, so that they grow with doubt too."""
    if name in PROBABILITIES:
        probability: float | None = getattr(record, name)
        return None if probability is None else 1 - probability
    return record.scores.get(name)


def _count(records: Sequence[Record]) -> AnswerCounts:
    right, wrong = (sum(r.correct is way for r in records) for way in (True, False))
    reasons = Counter(r.note or "no reason was given" for r in records if r.correct is None)
    return AnswerCounts(
        asked=len(records),
        judged=right + wrong,
        right=right,
        wrong=wrong,
        abstained=sum(r.abstain is True for r in records),
        unjudged=len(records) - right - wrong,
        unjudged_because=dict(reasons.most_common()),
    )


def _count_repetition(records: Sequence[Record]) -> Repetition:
    answers = [r for r in records if r.answer is not None and not r.question.choices]
    repeating = [r for r in answers if is_repeating(r.answer or "")]
    return Repetition(
        repeating=len(repeating),
        of=len(answers),
        share=len(repeating) / len(answers) if answers else 0.0,
        right=sum(r.correct is True for r in repeating),
    )


def _pair(records: Iterable[Record], name: str) -> tuple[list[float], list[bool]]:
    """Return scores and judgements of the records that have both."""
    pairs = [(v, r.correct) for r in records if (v := get_risk(r, name)) is not None and r.correct is not None]
    return [v for v, _ in pairs], [c for _, c in pairs]


def _measure_scores(
    judged: Sequence[Record], bootstrap: Bootstrap, costs: Mapping[str, Cost]
) -> tuple[dict[str, ScoreResults], dict[str, str]]:
    names = {name: None for r in judged for name in r.scores}
    learnt = [name for name in PROBABILITIES if any(getattr(r, name) is not None for r in judged)]
    names = {**dict.fromkeys(learnt), **names}
    left_out: dict[str, str] = {}
    if BASELINE not in names:
        left_out[BASELINE] = "no judged answer has it, so nothing is compared with it"
    # Scores of the same answers are resampled together.
    together: dict[tuple[int, ...], dict[str, list[float]]] = defaultdict(dict)
    for name in names:
        known = [(i, v) for i, r in enumerate(judged) if (v := get_risk(r, name)) is not None]
        values = [v for _, v in known]
        if min(values) == max(values):
            left_out[name] = f"it is {values[0]:g} for all {len(values)} judged answers that have it"
        else:
            together[tuple(i for i, _ in known)][name] = values
    scores: dict[str, ScoreResults] = {}
    for places, group in together.items():
        against = [v for i in places if (v := get_risk(judged[i], BASELINE)) is not None]
        paired = len(against) == len(places)
        every = {**group, BASELINE: against} if paired else group
        right = [bool(judged[i].correct) for i in places]
        entries = measure_scores(every, right, BASELINE if paired else None, bootstrap)
        note = _explain_missing(len(judged) - len(places), len(judged), paired)
        for name in group:
            scores[name] = _join(len(places), note, entries[name], _price(name, costs))
    return {name: scores[name] for name in names if name in scores}, left_out


def _join(judged: int, note: str | None, entries: ScoreEntries, cost: ScoreCost) -> ScoreResults:
    return ScoreResults(judged, note, entries.metrics, entries.against, cost)


def _validate_best_score(
    judged: Sequence[Record], scores: Mapping[str, ScoreResults], bootstrap: Bootstrap
) -> BestScoreTest:
    names = find_common_scores(scores)
    if BASELINE not in names:
        return BestScoreTest(why=f"{BASELINE} is missing for some answers")
    complete = [r for r in judged if all(get_risk(r, name) is not None for name in names)]
    risks = {name: _pair(complete, name)[0] for name in names}
    return validate_best_score(risks, [bool(r.correct) for r in complete], BASELINE, bootstrap)


def _explain_missing(missing: int, judged: int, paired: bool) -> str | None:
    notes = [f"missing for {missing} of {judged} judged answers, measured on the others"] if missing else []
    notes += [] if paired else [f"not compared: {BASELINE} is missing for some of these answers"]
    return "; ".join(notes) or None


def _price(name: str, costs: Mapping[str, Cost]) -> ScoreCost:
    names = list_costs(name)
    known = [costs[entry] for entry in names if entry in costs]
    if any(entry not in costs for entry in names if entry != "agreement"):
        return ScoreCost(None, None, None)
    seconds, alone = math.fsum(c.seconds for c in known), costs["answer"].seconds
    return ScoreCost(math.fsum(c.passes for c in known), seconds, seconds / alone if alone else None)


def _measure_probabilities(judged: Sequence[Record], bootstrap: Bootstrap) -> dict[str, ProbabilityResults]:
    sources: dict[str, Callable[[Record], float | None]] = {
        "p_correct": lambda r: r.p_correct,
        "sequence probability": lambda r: math.exp(-r.scores[BASELINE]) if BASELINE in r.scores else None,
        "p_true": lambda r: 1 - r.scores["p_false"] if "p_false" in r.scores else None,
    }
    measured = {}
    for name, source in sources.items():
        pairs = [(p, bool(r.correct)) for r in judged if (p := source(r)) is not None]
        if pairs:
            given, correct = [p for p, _ in pairs], [c for _, c in pairs]
            measured[name] = ProbabilityResults(
                judged=len(pairs),
                bins=BINS,
                binning="of equal width",
                **measure_probabilities(given, correct, bootstrap),
                reliability=bin_probabilities(given, correct),
            )
    return measured


def _measure_topics(judged: Sequence[Record], shown: Sequence[str], bootstrap: Bootstrap) -> tuple[TopicResults, ...]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for r in judged:
        if r.question.topic is not None:
            groups[r.question.topic].append(r)
    measured = []
    for topic, records in sorted(groups.items(), key=lambda g: (-len(g[1]), g[0])):
        metrics = {name: _measure_alone(records, name, bootstrap) for name in shown}
        answered = [r for r in records if r.abstain is False]
        measured.append(
            TopicResults(
                topic=topic,
                judged=len(records),
                accuracy=estimate_share([bool(r.correct) for r in records], level=LEVEL),
                prr={name: entry["prr"] for name, entry in metrics.items()},
                coverage_at_90={name: entry["coverage_at_90"] for name, entry in metrics.items()},
                answered=len(answered) if any(r.abstain is not None for r in records) else None,
                answered_right=sum(bool(r.correct) for r in answered),
            )
        )
    return tuple(measured)


def _measure_alone(records: Sequence[Record], name: str, bootstrap: Bootstrap) -> Mapping[str, Estimate]:
    values, correct = _pair(records, name)
    return measure_scores({name: values}, correct, None, bootstrap, ["prr", "coverage_at_90"])[name].metrics
