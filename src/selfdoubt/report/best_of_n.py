"""Accuracy of several answers to a question: of the least risky, of the majority, of the first confident one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from selfdoubt.eval.records import Record, Sample
from selfdoubt.eval.scores.agreement import cluster_answers
from selfdoubt.eval.settings import Run
from selfdoubt.lm.confidence import is_confident
from selfdoubt.metrics import Estimate, estimate_mean, estimate_share
from selfdoubt.report.metric_entries import Bootstrap
from selfdoubt.report.results import NoSamples, SampleResults, ScoreCost, UntilConfident
from selfdoubt.risk import percentile

#: "In the 99 % confidence percentile": at most this share of reference answers has a lower risk.
CONFIDENT = 0.01


def measure_samples(records: Sequence[Record], run: Run, bootstrap: Bootstrap) -> SampleResults | NoSamples:
    """Measure the samples of each record, which are in the order in which they were drawn.

    Args:
        records: All records; those count that have samples, all of them judged.
        run: Settings of the run: ``risk`` names the score of a sample; ``costs`` as for ``measure_answers``.
        bootstrap: Settings of the bootstrap over questions.
    """
    drawn = [r for r in records if r.samples]
    whole = [r for r in drawn if all(s.correct is not None for s in r.samples)]
    if not whole:
        why = "no question has all of its samples judged" if drawn else "no samples were drawn"
        return NoSamples(len(drawn), why)
    rules: dict[str, Callable[[Sequence[Sample]], float]] = {
        "least_risky": lambda samples: _accuracy_at(samples, min(s.risk for s in samples)),
        "most_risky": lambda samples: _accuracy_at(samples, max(s.risk for s in samples)),
        "random": _accuracy,
        "majority": measure_majority,
    }
    first = [r.correct for r in whole if r.correct is not None]
    return SampleResults(
        drawn=len(drawn),
        questions=len(whole),
        samples=max(len(r.samples) for r in whole),
        unjudged=len(drawn) - len(whole),
        one_answer=estimate_share(first) if first else Estimate.missing("none of these answers is judged"),
        **{name: estimate_mean([rule(r.samples) for r in whole], **bootstrap) for name, rule in rules.items()},
        until_confident=_measure_until_confident(whole, records, run, bootstrap),
    )


def measure_majority(samples: Sequence[Sample]) -> float:
    """Return the share of right ones among the samples with the most frequent answer.

    If several answers are equally frequent, it is the mean over them.
    """
    clusters = cluster_answers([sample.text for sample in samples])
    groups = [[s for s, c in zip(samples, clusters, strict=True) if c == number] for number in sorted(set(clusters))]
    most = max(map(len, groups))
    return fmean(_accuracy(group) for group in groups if len(group) == most)


def _accuracy(samples: Sequence[Sample]) -> float:
    return fmean(bool(s.correct) for s in samples)


def _accuracy_at(samples: Sequence[Sample], risk: float) -> float:
    return _accuracy([s for s in samples if s.risk == risk])


def _measure_until_confident(
    whole: Sequence[Record], records: Sequence[Record], run: Run, bootstrap: Bootstrap
) -> UntilConfident:
    """Measure the first sample whose risk is among the lowest; without one, all samples count as tries."""
    name = run.risk or "sum_nll"
    reference = sorted(r.scores[name] for r in records if name in r.scores)
    reference = reference or sorted(s.risk for r in records for s in r.samples)
    ranked_here = False
    counts: list[float] = []
    reached: list[bool] = []
    for record in whole:
        count = len(record.samples)
        for number, sample in enumerate(record.samples, 1):
            ranked_here |= sample.percentile is None
            rank = percentile(sample.risk, reference) if sample.percentile is None else sample.percentile
            if is_confident(1 - rank, 1 - CONFIDENT):
                reached.append(bool(sample.correct))
                count = number
                break
        counts.append(float(count))
    tried = estimate_mean(counts, **bootstrap)
    here = f"the {len(reference)} answers of this run ({name})"
    return UntilConfident(
        percentile=CONFIDENT,
        reference=here if ranked_here else "the model's reference answers",
        reached=estimate_share([True] * len(reached) + [False] * (len(whole) - len(reached))),
        accuracy=estimate_share(reached) if reached else Estimate.missing("no sample is that sure"),
        mean_tries=tried,
        cost=_price_tries(run, tried.value),
    )


def _price_tries(run: Run, tried: float | None) -> ScoreCost:
    """Return the price of this many tries for every question of the run."""
    costs = run.costs or {}
    if tried is None or "answer" not in costs or "samples" not in costs or not costs["samples"].passes:
        return ScoreCost(passes=tried, seconds=None, ratio=None)
    seconds = costs["samples"].seconds / costs["samples"].passes * tried
    alone = costs["answer"].seconds
    return ScoreCost(passes=tried, seconds=seconds, ratio=seconds / alone if alone else None)
