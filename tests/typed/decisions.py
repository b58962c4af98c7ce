"""Types that a caller sees of ``selfdoubt.interpret``: tensors, arrays and lists go in, tensors come out."""

from __future__ import annotations

from typing import assert_type

import numpy as np
from torch import Tensor

from selfdoubt import interpret


def check_numbers(y: Tensor, array: np.ndarray) -> None:
    assert_type(interpret.error_probability(y), Tensor)
    assert_type(interpret.error_probability(array), Tensor)
    assert_type(interpret.error_probability([[0.5, 0.5]]), Tensor)
    assert_type(interpret.parametric_interval(y, array, level=0.5), interpret.Interval)
    assert_type(interpret.decide(array, [[0, 1], [1, 0]], reject_cost=0.5).rejected, Tensor)


def check_fitted(y: Tensor, target: np.ndarray) -> None:
    intervals = interpret.ConformalIntervals.fit(y, target, level=0.9)
    assert_type(intervals, interpret.ConformalIntervals)
    assert_type(intervals.predict(y).contains(target), Tensor)
    assert_type(interpret.ConformalSets.parse(interpret.ConformalSets.fit(y, y).to_json()), interpret.ConformalSets)
    interpret.parametric_interval(y, y, distribution="cauchy")  # type: ignore[arg-type]
