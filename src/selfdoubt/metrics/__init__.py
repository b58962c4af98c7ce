"""Metrics of risk scores: selective accuracy, ranking, calibration, and their confidence intervals.

Pure functions of numpy arrays, usable alone: nothing here imports torch. ``docs/metrics.md`` explains each metric and
gives its names in other libraries.
"""

from __future__ import annotations

from selfdoubt.metrics.bootstrap import (
    Comparison,
    SystemComparison,
    bootstrap_interval,
    compare_scores,
    compare_systems,
    estimate_mean,
    estimate_over_seeds,
    paired_difference,
)
from selfdoubt.metrics.calibration import Reliability, brier, ece, log_losses, nll, reliability
from selfdoubt.metrics.estimate import Estimate
from selfdoubt.metrics.proportion import estimate_share, wilson_interval
from selfdoubt.metrics.selective import (
    METRICS,
    Curve,
    JudgedAnswers,
    Metric,
    accuracy_at,
    accuracy_coverage,
    auarc,
    augrc,
    auprc,
    aurc,
    auroc,
    coverage_at,
    drop_unjudged,
    excess_aurc,
    prr,
)

__all__ = [
    "METRICS",
    "Comparison",
    "Curve",
    "Estimate",
    "JudgedAnswers",
    "Metric",
    "Reliability",
    "SystemComparison",
    "accuracy_at",
    "accuracy_coverage",
    "auarc",
    "augrc",
    "auprc",
    "aurc",
    "auroc",
    "bootstrap_interval",
    "brier",
    "compare_scores",
    "compare_systems",
    "coverage_at",
    "drop_unjudged",
    "ece",
    "estimate_mean",
    "estimate_over_seeds",
    "estimate_share",
    "excess_aurc",
    "log_losses",
    "nll",
    "paired_difference",
    "prr",
    "reliability",
    "wilson_interval",
]
