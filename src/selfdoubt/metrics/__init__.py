"""Metrics of risk scores: selective accuracy, ranking, calibration, abstention, and their confidence intervals.

Pure functions of numpy arrays, usable alone: nothing here imports torch. ``docs/metrics.md`` explains each metric and
gives its names in other libraries.
"""

# ruff: noqa: E402  (the check comes before the imports that need numpy)
from __future__ import annotations

from selfdoubt.errors import require

require("numpy", "qa")

from selfdoubt.metrics.abstention import (
    ABSTENTION_METRICS,
    DecisionCounts,
    abstention_f1,
    abstention_precision,
    abstention_recall,
    estimate_abstention,
    hallucination_rate,
    omniscience_index,
)
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
from selfdoubt.metrics.losses import LossCurve, loss_aurc, loss_coverage, loss_prr
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
from selfdoubt.metrics.utility import (
    PRICES,
    BestThreshold,
    abstain_at_price,
    estimate_best_utility,
    find_best_threshold,
    utility,
)

__all__ = [
    "ABSTENTION_METRICS",
    "METRICS",
    "PRICES",
    "BestThreshold",
    "Comparison",
    "Curve",
    "DecisionCounts",
    "Estimate",
    "JudgedAnswers",
    "LossCurve",
    "Metric",
    "Reliability",
    "SystemComparison",
    "abstain_at_price",
    "abstention_f1",
    "abstention_precision",
    "abstention_recall",
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
    "estimate_abstention",
    "estimate_best_utility",
    "estimate_mean",
    "estimate_over_seeds",
    "estimate_share",
    "excess_aurc",
    "find_best_threshold",
    "hallucination_rate",
    "log_losses",
    "loss_aurc",
    "loss_coverage",
    "loss_prr",
    "nll",
    "omniscience_index",
    "paired_difference",
    "prr",
    "reliability",
    "utility",
    "wilson_interval",
]
