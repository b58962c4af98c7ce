"""Decisions from predictions and their risk: probabilities of error, intervals, prediction sets, and rejection.

Pure functions of numbers: they take tensors, arrays or lists, need torch alone, and give tensors without a gradient.
``docs/interpret.md`` shows each of them with its formula, and says when it holds.
"""

from __future__ import annotations

from selfdoubt.interpret.conformal import ConformalIntervals
from selfdoubt.interpret.intervals import Interval, parametric_interval
from selfdoubt.interpret.logit_noise import average_binary_noise, average_noise, class_probabilities
from selfdoubt.interpret.probabilities import (
    average_members,
    binary_error_probability,
    error_probability,
    probability_above,
    wrong_side_probability,
)
from selfdoubt.interpret.rejection import REJECT, Decision, decide
from selfdoubt.interpret.risk_quality import RiskQuality, measure_risk
from selfdoubt.interpret.sets import ConformalSets

__all__ = [
    "REJECT",
    "ConformalIntervals",
    "ConformalSets",
    "Decision",
    "Interval",
    "RiskQuality",
    "average_binary_noise",
    "average_members",
    "average_noise",
    "binary_error_probability",
    "class_probabilities",
    "decide",
    "error_probability",
    "measure_risk",
    "parametric_interval",
    "probability_above",
    "wrong_side_probability",
]
