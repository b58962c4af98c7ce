"""Parametric and conformal intervals against scipy, MAPIE and order statistics, and what is refused."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import laplace, norm
from sklearn.base import BaseEstimator, RegressorMixin

from selfdoubt import interpret
from selfdoubt.errors import ConfigError, DataError, NonFiniteError, ShapeError
from selfdoubt.interpret import ConformalIntervals, Interval
from tests import oracles

NAN = float("nan")


@pytest.mark.parametrize(("name", "law"), [("normal", norm), ("laplace", laplace(scale=1 / math.sqrt(2)))])
@pytest.mark.parametrize("level", [0.01, 0.5, 0.9, 0.999])
def test_parametric_intervals_against_scipy(name, law, level):
    y, std = torch.randn(20).double(), torch.rand(20).double()
    interval = interpret.parametric_interval(y, std, level=level, distribution=name)
    low, high = law.interval(level)
    np.testing.assert_allclose(interval.low, y + low * std, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(interval.high, y + high * std, rtol=1e-9, atol=1e-12)


def test_an_interval_knows_its_width_and_its_targets():
    interval = Interval(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0]))
    assert interval.width.tolist() == [1.0, 2.0]
    assert interval.contains([1.0, 2.5]).tolist() == [True, False]
    with pytest.raises(ShapeError, match="reshape"):
        interval.contains([[1.0], [2.0]])
    with pytest.raises(NonFiniteError):
        interval.contains([1.0, NAN])


def draw(n, seed):
    """Rows (y, risk, target) whose noise is 0.3 to 2.3, of a model that is off by its own error."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, generator=generator).double()
    noise = (0.3 + 2 * x) * torch.randn(n, generator=generator)
    y = (3 * x).sin() + 0.1
    return y, 0.1 + x, (3 * x).sin() + noise


class Fixed(RegressorMixin, BaseEstimator):
    """A fitted model of scikit-learn that returns one column of its input."""

    def __init__(self, column=0):
        self.column = column

    def fit(self, x, y):
        self.fitted_ = True
        return self

    def predict(self, x):
        return x[:, self.column]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("n", "level"), [(200, 0.9), (37, 0.8), (20, 0.95), (100, 0.5)])
def test_conformal_intervals_against_mapie(n, level, scaled):
    regression = oracles.load("mapie.regression")
    scores = oracles.load("mapie.conformity_scores")
    (y, risk, target), (new_y, new_risk, _) = draw(n, 1), draw(50, 2)
    fitted = [Fixed(column).fit(None, None) for column in (0, 1)]
    score = scores.ResidualNormalisedScore(fitted[1], prefit=True) if scaled else "absolute"
    theirs = regression.SplitConformalRegressor(fitted[0], confidence_level=level, conformity_score=score, prefit=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.conformalize(torch.stack([y, risk], -1).numpy(), target.numpy())
        _, bounds = theirs.predict_interval(torch.stack([new_y, new_risk], -1).numpy())
    ours = ConformalIntervals.fit(y, target, risk if scaled else None, level=level)
    low, high = ours.predict(new_y, new_risk if scaled else None)
    np.testing.assert_allclose(low, bounds[:, 0, 0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(high, bounds[:, 1, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scaled", [False, True])
def test_intervals_of_90_percent_cover_90_percent(scaled):
    coverages = []
    for seed in range(50):
        y, risk, target = draw(199, 2 * seed)
        intervals = ConformalIntervals.fit(y, target, risk if scaled else None)
        new_y, new_risk, new_target = draw(500, 2 * seed + 1)
        interval = intervals.predict(new_y, new_risk if scaled else None)
        coverages.append(interval.contains(new_target).double().mean().item())
    # The expected coverage is 180 / 200; of one seed its standard deviation is 0.026 (a beta-binomial of 500), of the
    # mean of 50 seeds 0.0036. 0.03 are 8 of them: false alarm below 1e-14.
    assert 0.87 < sum(coverages) / 50 < 0.93


def test_a_risk_that_follows_the_noise_gives_shorter_intervals_and_even_coverage():
    (y, risk, target), (new_y, new_risk, new_target) = draw(4000, 1), draw(4000, 2)
    plain, scaled = ConformalIntervals.fit(y, target), ConformalIntervals.fit(y, target, risk)
    quiet = new_risk < 0.3
    coverage = [
        float(interval.contains(new_target)[quiet].double().mean())
        for interval in (plain.predict(new_y), scaled.predict(new_y, new_risk))
    ]
    assert coverage[0] > 0.97  # far too wide where there is little noise
    assert abs(coverage[1] - 0.9) < 0.05


def test_outputs_of_a_row_are_covered_one_by_one():
    y, target = torch.zeros(99, 2, 3), torch.randn(99, 2, 3)
    intervals = ConformalIntervals.fit(y, target)
    assert intervals.shape == (2, 3)
    alone = [ConformalIntervals.fit(y[:, i, j], target[:, i, j]).quantiles[0] for i in range(2) for j in range(3)]
    assert intervals.quantiles == tuple(alone)
    assert intervals.predict(torch.zeros(4, 2, 3)).high.shape == (4, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_row_that_sets_the_quantile_is_covered(dtype):
    y, target = torch.randn(9).to(dtype), (100 * torch.randn(9)).round().to(dtype)
    interval = ConformalIntervals.fit(y, target).predict(y)
    assert interval.contains(target).all()


def test_fitted_intervals_print_and_go_to_json_and_back():
    y, risk, target = draw(40, 0)
    fitted = ConformalIntervals.fit(y[:, None], target[:, None], risk[:, None], level=0.8)
    assert ConformalIntervals.parse(json.loads(json.dumps(fitted.to_json()))) == fitted
    assert "level=0.8, n=40, scaled=True" in repr(fitted)


@pytest.mark.parametrize(
    "change",
    [{"quantiles": [-1.0]}, {"quantiles": [NAN]}, {"quantiles": []}, {"level": 1.0}, {"n": 0}, {"scaled": 1}, {"x": 1}],
)
def test_a_broken_record_of_intervals_is_refused(change):
    record = ConformalIntervals((1.0,), (), level=0.9, n=9, scaled=False).to_json() | change
    with pytest.raises(DataError, match="fit it again"):
        ConformalIntervals.parse(record)


def test_a_record_whose_quantiles_do_not_fit_its_shape_is_refused():
    with pytest.raises(DataError, match="needs 3 quantiles, got 1"):
        ConformalIntervals.parse({"quantiles": [1.0], "shape": [3], "level": 0.9, "n": 9, "scaled": False})


@pytest.mark.parametrize(("level", "least"), [(0.9, 9), (0.95, 19), (0.99, 99), (0.5, 1), (2 / 3, 2), (0.8, 4)])
def test_too_few_rows_for_a_level_are_refused(level, least):
    zeros, ones = torch.zeros(least), torch.ones(least)
    assert ConformalIntervals.fit(zeros, ones, level=level).quantiles == (1.0,)
    with pytest.raises(DataError if least > 1 else ShapeError, match=f"at least {least} calibration rows|empty"):
        ConformalIntervals.fit(zeros[1:], ones[1:], level=level)


ROWS, FITTED = torch.zeros(20), ConformalIntervals((1.0,), (), level=0.9, n=20, scaled=False)
SCALED = ConformalIntervals((1.0,), (), level=0.9, n=20, scaled=True)


@pytest.mark.parametrize("level", [0, 1, -0.1, 90, NAN, True, "0.9", None, torch.tensor([0.9])])
@pytest.mark.usefixtures("unchecked")
def test_levels_outside_0_and_1_are_refused(level):
    for call in (
        lambda: ConformalIntervals.fit(ROWS, ROWS, level=level),
        lambda: interpret.parametric_interval(ROWS, ROWS, level=level),
    ):
        with pytest.raises(ConfigError, match=r"must lie in \(0, 1\)"):
            call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ConformalIntervals.fit(ROWS, ROWS[:, None]), ShapeError, r"\(20,\) and \(20, 1\); try target.reshape"),
        (lambda: ConformalIntervals.fit(torch.tensor(1.0), torch.tensor(1.0)), ShapeError, "axis of rows"),
        (lambda: ConformalIntervals.fit(ROWS, ROWS, ROWS), DataError, "above 0, got 20 of 20"),
        (lambda: ConformalIntervals.fit(ROWS, ROWS, ROWS[1:] + 1), ShapeError, "y and risk"),
        (lambda: ConformalIntervals.fit(ROWS, ROWS + NAN), NonFiniteError, "20 of 20 values of target"),
        (lambda: ConformalIntervals.fit([], []), ShapeError, "empty"),
        (lambda: FITTED.predict(ROWS, ROWS + 1), ConfigError, "without a risk"),
        (lambda: SCALED.predict(ROWS), ConfigError, "give predict"),
        (lambda: SCALED.predict(ROWS, ROWS), DataError, "above 0"),
        (lambda: FITTED.predict(ROWS[:, None]), ShapeError, "as in calibration"),
        (lambda: FITTED.predict(ROWS + NAN), NonFiniteError, "20 of 20 values of y"),
        (lambda: interpret.parametric_interval(ROWS, ROWS - 1), DataError, "at least 0"),
        (lambda: interpret.parametric_interval(ROWS, ROWS, distribution="t"), ConfigError, "laplace"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
