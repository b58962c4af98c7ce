"""What further answers to a question are worth: the least risky of them, the majority's, or the first sure one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from selfdoubt.eval.judges.text import same_key
from selfdoubt.eval.records import Record, Sample
from selfdoubt.lm.confidence import is_confident
from selfdoubt.report.metric_entries import Draws, Entry, mean, nothing, proportion
from selfdoubt.risk import percentile

#: "In the 99 % confidence percentile": at most this share of reference answers has a lower risk.
SURE = 0.01


def tries(records: Sequence[Record], run: Mapping[str, Any], draw: Draws) -> dict[str, Any]:
    """Measure the samples of each record, which stand in the order in which they were drawn.

    Args:
        records: Those with samples count; of these, the ones whose samples are all judged.
        run: ``risk`` names the score that is a sample's risk; ``costs`` as for ``measure``.
        draw: The bootstrap, over questions.

    Returns:
        ``drawn`` (questions with samples), ``questions`` (of these, measured), ``samples`` (the greatest number a
        question), ``unjudged`` (questions left out); accuracy of ``one_answer`` (the one that was not drawn),
        ``least_risky``, ``most_risky``, ``random`` and ``majority`` (entries; ties count with their mean); and
        ``until_sure``. Or ``drawn`` and ``why`` there is nothing.
    """
    drawn = [r for r in records if r.samples]
    whole = [r for r in drawn if all(s.correct is not None for s in r.samples)]
    if not whole:
        why = "no question has all of its samples judged" if drawn else "no samples were drawn"
        return {"drawn": len(drawn), "why": why}
    ways: dict[str, Callable[[Sequence[Sample]], float]] = {
        "least_risky": lambda own: _at(own, min(s.risk for s in own)),
        "most_risky": lambda own: _at(own, max(s.risk for s in own)),
        "random": _accuracy,
        "majority": majority,
    }
    first = [r.correct for r in whole if r.correct is not None]
    return {
        "drawn": len(drawn),
        "questions": len(whole),
        "samples": max(len(r.samples) for r in whole),
        "unjudged": len(drawn) - len(whole),
        "one_answer": proportion(first) if first else nothing("none of these answers is judged"),
        **{name: mean([way(r.samples) for r in whole], draw) for name, way in ways.items()},
        "until_sure": _until_sure(whole, records, run, draw),
    }


def majority(samples: Sequence[Sample]) -> float:
    """Share of right ones among the samples that say what most of them say; where several lead, the mean over them."""
    groups: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[same_key(sample.text)].append(sample)
    most = max(len(group) for group in groups.values())
    return fmean(_accuracy(group) for group in groups.values() if len(group) == most)


def _accuracy(samples: Sequence[Sample]) -> float:
    return fmean(bool(s.correct) for s in samples)


def _at(samples: Sequence[Sample], risk: float) -> float:
    return _accuracy([s for s in samples if s.risk == risk])


def _until_sure(
    whole: Sequence[Record], records: Sequence[Record], run: Mapping[str, Any], draw: Draws
) -> dict[str, Any]:
    """Take the first sample whose risk is among the lowest; ``tries`` counts all samples where there is none."""
    name = str(run.get("risk") or "sum_nll")
    own = sorted(r.scores[name] for r in records if name in r.scores)
    own = own or sorted(s.risk for r in records for s in r.samples)
    ranked_here = False
    counts: list[float] = []
    found: list[bool] = []
    for record in whole:
        count = len(record.samples)
        for number, sample in enumerate(record.samples, 1):
            ranked_here |= sample.percentile is None
            place = percentile(sample.risk, own) if sample.percentile is None else sample.percentile
            if is_confident(1 - place, 1 - SURE):
                found.append(bool(sample.correct))
                count = number
                break
        counts.append(float(count))
    tried = mean(counts, draw)
    reached: Entry = proportion([True] * len(found) + [False] * (len(whole) - len(found)))
    return {
        "percentile": SURE,
        "reference": f"the {len(own)} answers of this run ({name})" if ranked_here else "the model's reference answers",
        "reached": reached,
        "accuracy": proportion(found) if found else nothing("no sample is that sure"),
        "tries": tried,
        "cost": _cost(run.get("costs", {}), tried["value"]),
    }


def _cost(costs: Mapping[str, Mapping[str, float]], tried: float) -> dict[str, float | None]:
    """Seconds of so many tries for every question of the run, and how many times those of one answer that is."""
    if "answer" not in costs or "samples" not in costs or not costs["samples"]["passes"]:
        return {"passes": tried, "seconds": None, "ratio": None}
    seconds = costs["samples"]["seconds"] / costs["samples"]["passes"] * tried
    alone = costs["answer"]["seconds"]
    return {"passes": tried, "seconds": seconds, "ratio": seconds / alone if alone else None}
