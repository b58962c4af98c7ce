"""Rows of a benchmark's results: how well scores rank wrong answers, and their paired differences to one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks import results
from selfdoubt.eval.records import Record
from selfdoubt.metrics import Estimate, compare_scores

BASELINE = "sum_nll"
METRICS = ("auroc", "prr")


def score_rows(
    about: results.Row,
    scores: Mapping[str, np.ndarray],
    records: Sequence[Record],
    draws: int,
    baseline: str = BASELINE,
    metrics: Sequence[str] = METRICS,
) -> list[results.Row]:
    """Return a row for each score and metric, with intervals over questions.

    Answers for which a score is NaN are left out for all of them, so that differences are paired.

    Args:
        about: Entries that all rows share: model, arm, domain.
        scores: Scores that grow with doubt, one number for each record.
        records: Judged answers.
        draws: Resamples of the questions.
        baseline: Name of the score that the others are compared with.
        metrics: Names of metrics.
    """
    right = np.array([bool(r.correct) for r in records])
    defined = ~np.any([np.isnan(v) for v in scores.values()], axis=0)
    ids = [r.question.id for r, d in zip(records, defined, strict=True) if d]
    used = {name: values[defined] for name, values in scores.items()}
    compared = compare_scores(used, right[defined], metrics, baseline=baseline, draws=draws, clusters=ids)
    rows = []
    for (name, metric), comparison in compared.items():
        value, interval = round_estimate(comparison.estimate)
        row: results.Row = {
            **about, "score": name, "metric": metric, "value": value, "interval": interval,
            "answers": int(defined.sum()),
        }  # fmt: skip
        if comparison.difference is not None:
            row["against"] = baseline
            row["gain"], row["gain_interval"] = round_estimate(comparison.difference)
        rows.append(row)
    return rows


def round_estimate(estimate: Estimate) -> tuple[float, list[float]]:
    """Return an estimate's value and interval, to four places."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None or low is None or high is None:
        raise ValueError(f"an estimate has no number: {estimate.note}; ask more questions")
    return round(value, 4), [round(low, 4), round(high, 4)]
