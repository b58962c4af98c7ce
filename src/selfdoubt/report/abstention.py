"""Measures decisions to answer or to abstain: those of the calibrated threshold, and those that a price asks for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from selfdoubt.eval.records import Record
from selfdoubt.eval.settings import Run
from selfdoubt.metrics import (
    PRICES,
    Estimate,
    abstain_at_price,
    estimate_abstention,
    estimate_best_utility,
    estimate_share,
    find_best_threshold,
)
from selfdoubt.report.metric_entries import LEVEL, Bootstrap
from selfdoubt.report.results import Abstention, NoAbstention, UtilityResults

_Flags = Bool[np.ndarray, "answers"]


def measure_abstention(records: Sequence[Record], run: Run, bootstrap: Bootstrap) -> Abstention | NoAbstention:
    """Measure the answers that a threshold gave and abstained from."""
    decided = [r for r in records if r.abstain is not None]
    if not decided:
        return NoAbstention("no threshold was set: `selfdoubt calibrate --target-accuracy` sets one")
    judged = [r for r in decided if r.correct is not None]
    answered = [bool(r.correct) for r in judged if not r.abstain]
    abstained = [bool(r.correct) for r in judged if r.abstain]
    return Abstention(
        threshold=run.threshold,
        promise=run.promise,
        decided=len(decided),
        answered=sum(not r.abstain for r in decided),
        coverage=estimate_share([not r.abstain for r in decided], level=LEVEL),
        accuracy=estimate_share(answered, level=LEVEL)
        if answered
        else Estimate.missing("no answer that was given is judged"),
        accuracy_abstained=estimate_share(abstained, level=LEVEL)
        if abstained
        else Estimate.missing("no answer that was abstained from is judged"),
        metrics=estimate_abstention(
            [bool(r.abstain) for r in judged], [bool(r.correct) for r in judged], level=LEVEL, **bootstrap
        )
        if len(judged) > 1
        else None,
    )


def measure_utilities(records: Sequence[Record], bootstrap: Bootstrap) -> tuple[UtilityResults, ...]:
    """Measure the worth of answers with a p_correct at each price of a wrong one; () with fewer than two."""
    known = [r for r in records if r.correct is not None and r.p_correct is not None]
    if len(known) < 2:
        return ()
    p = np.array([r.p_correct for r in known], np.float64)
    correct = np.array([bool(r.correct) for r in known])
    decided = all(r.abstain is not None for r in known)
    threshold = np.array([bool(r.abstain) for r in known]) if decided else None
    results = []
    for price in PRICES:
        rule, best = abstain_at_price(p, price), find_best_threshold(1 - p, correct, price=price)
        results.append(
            UtilityResults(
                price=price,
                answer_all=_estimate_utility(np.zeros_like(correct), correct, price, bootstrap),
                threshold=None if threshold is None else _estimate_utility(threshold, correct, price, bootstrap),
                rule=_estimate_utility(rule, correct, price, bootstrap),
                rule_coverage=float(1 - rule.mean()),
                best=estimate_best_utility(1 - p, correct, price=price, level=LEVEL, **bootstrap),
                best_threshold=None if best.threshold is None else 1 - best.threshold,
                best_coverage=best.coverage,
            )
        )
    return tuple(results)


def _estimate_utility(abstain: _Flags, correct: _Flags, price: float, bootstrap: Bootstrap) -> Estimate:
    return estimate_abstention(abstain, correct, price=price, level=LEVEL, **bootstrap)["utility"]
