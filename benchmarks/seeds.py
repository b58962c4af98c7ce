"""Compares arms that were run with the same seeds."""

from __future__ import annotations

from typing import Any

from benchmarks import results
from selfdoubt.metrics import Estimate, estimate_over_seeds


def compare_arms(rows: list[results.Row], arm: str, baseline: str, name: str, **about: Any) -> Estimate | None:
    """Return the mean difference of a number between two arms over the seeds of both; None below two.

    Args:
        rows: Rows with an arm and a seed.
        arm: The arm.
        baseline: The arm that it is compared with.
        name: Name of the number; rows in which it is None are left out.
        **about: Further entries that the rows must have.
    """
    chosen = [r for r in rows if about.items() <= r.items()]
    mine, theirs = ({r["seed"]: r[name] for r in chosen if r["arm"] == a} for a in (arm, baseline))
    pairs = [(value, theirs.get(seed)) for seed, value in mine.items()]
    gaps = [value - other for value, other in pairs if value is not None and other is not None]
    return estimate_over_seeds(gaps) if len(gaps) > 1 else None
