"""Estimates: what is stored of them, shares with Wilson's interval, means and two systems."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from selfdoubt import metrics
from selfdoubt.errors import DataError
from selfdoubt.metrics import (
    Estimate,
    compare_systems,
    estimate_mean,
    estimate_share,
    paired_difference,
    wilson_interval,
)

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


@given(st.builds(Estimate, numbers, numbers, numbers, note=st.none() | st.text(), p=numbers))
def test_an_estimate_comes_back_from_json(estimate):
    assert Estimate.parse(json.loads(json.dumps(estimate.to_json()))) == estimate


def test_json_holds_the_reason_and_the_p_value_only_where_there_is_one():
    assert list(Estimate(0.5, 0.4, 0.6, failed=3).to_json().items()) == [("value", 0.5), ("low", 0.4), ("high", 0.6)]
    assert Estimate(0.5, 0.4, 0.6, p=0.01).to_json() == {"value": 0.5, "low": 0.4, "high": 0.6, "p": 0.01}
    assert Estimate.missing("none").to_json() == {"value": None, "low": None, "high": None, "why": "none"}


@pytest.mark.parametrize(
    "entry", [None, 0.5, {}, {"value": 1, "low": 0}, {"value": "1", "low": 0, "high": 1},
              {"value": True, "low": 0, "high": 1}, {"value": float("nan"), "low": 0, "high": 1},
              {"value": 1, "low": 0, "high": 1, "why": 3}],
)  # fmt: skip
def test_another_form_is_refused(entry):
    with pytest.raises(DataError, match="estimate must"):
        Estimate.parse(entry)


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (5, 5), (3, 7), (40, 80)])
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_interval_of_a_share_is_that_of_scipy(hits, n, level):
    expected = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    assert wilson_interval(hits / n, n, level=level) == pytest.approx((expected.low, expected.high), abs=1e-12)
    share = estimate_share([True] * hits + [False] * (n - hits), level=level)
    assert (share.value, share.low, share.high) == pytest.approx((hits / n, expected.low, expected.high), abs=1e-12)
    assert estimate_share([]).value is None


def test_the_interval_of_a_mean_is_about_that_of_scipy():
    values = np.random.default_rng(0).normal(size=300)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=2000, rng=np.random.default_rng(1), method="percentile")
    mean = estimate_mean(values.tolist(), draws=2000)
    slack = 6.5 * 0.085 * theirs.standard_error  # as for bootstrap_interval
    assert mean.value == pytest.approx(values.mean())
    assert (mean.low, mean.high) == pytest.approx(tuple(theirs.confidence_interval), abs=slack)
    assert estimate_mean([]).note == "there is nothing to average"


def test_two_systems_with_the_same_judgements_differ_as_two_scores_do():
    random = np.random.default_rng(2)
    right = random.random(80) < 0.6
    scores = [random.normal(size=80) + strength * ~right for strength in (0.5, 2)]
    sides = [[(float(x), bool(r)) for x, r in zip(score, right, strict=True)] for score in scores]
    expected = paired_difference("prr", scores[1], scores[0], right, draws=50)
    compared = compare_systems("prr", *sides, draws=50)
    assert compared.difference.value == pytest.approx(compared.b - compared.a)
    assert (compared.difference.low, compared.difference.high) == pytest.approx((expected.low, expected.high))


def test_where_one_system_is_always_right_the_difference_says_why():
    a, b = [(0.1, True), (0.2, False)] * 5, [(0.1, True)] * 10
    compared = compare_systems("auroc", a, b, draws=10)
    assert (compared.a, compared.b, compared.difference.value) == (1.0, None, None)
    assert "10 right and 0 wrong" in compared.difference.note


def test_all_is_what_the_package_exposes_and_neither_torch_nor_scipy_is_needed():
    assert all(getattr(metrics, name) is not None for name in metrics.__all__)
    assert sorted(metrics.__all__) == sorted(set(metrics.__all__))
    code = (
        "import sys, numpy as np\n"
        "from selfdoubt import metrics\n"
        "print(metrics.auroc(np.array([0.1, 0.9]), np.array([True, False])))\n"
        "assert not {'torch', 'scipy', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stdout) == (0, "1.0\n"), done.stderr
