"""The quality of a risk, of classifiers and regressions, by the metrics of ``selfdoubt.metrics``."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from selfdoubt import metrics
from selfdoubt.errors import MetricError, MissingExtraError, NonFiniteError, ShapeError
from selfdoubt.interpret import measure_risk, risk_quality


def test_of_right_and_wrong_it_has_the_numbers_of_the_metrics():
    random = np.random.default_rng(0)
    wrong = random.random(300) < 0.3
    risk = np.round(random.normal(size=300) + wrong, 1)
    quality = measure_risk(risk, torch.tensor(wrong))
    assert quality.aurc == pytest.approx(metrics.aurc(risk, ~wrong), abs=1e-12)
    assert quality.prr == pytest.approx(metrics.prr(risk, ~wrong), abs=1e-12)
    assert quality.auroc == pytest.approx(metrics.auroc(risk, ~wrong), abs=1e-12)
    assert quality.mean_loss == pytest.approx(wrong.mean())
    assert quality.loss_at_80 == pytest.approx(1 - metrics.accuracy_at(risk, ~wrong, coverage=0.8), abs=1e-12)


def test_of_a_regression_it_has_no_auroc():
    std = 0.1 + torch.rand(2000)
    errors = (std * torch.randn(2000)).square()
    quality = measure_risk(std[:, None], errors[:, None])
    assert quality.auroc is None
    assert quality.loss_at_80 < quality.mean_loss
    assert 0.1 < quality.prr < 1
    assert json.loads(json.dumps(quality.to_json()))["n"] == 2000


def test_a_constant_risk_is_a_random_order():
    quality = measure_risk(torch.ones(50), torch.rand(50).square())
    assert quality.prr == pytest.approx(0, abs=1e-9)
    assert quality.aurc == pytest.approx(quality.mean_loss)


def test_without_numpy_it_says_what_to_install(monkeypatch):
    def require(module, extra):
        raise MissingExtraError(f"{module} of {extra}")

    monkeypatch.setattr(risk_quality, "require", require)
    with pytest.raises(MissingExtraError, match="numpy of qa"):
        measure_risk([0.0, 1.0], [0.0, 1.0])


@pytest.mark.parametrize(
    ("risk", "loss", "error", "message"),
    [
        ([0.0, 1.0], [1.0], ShapeError, "one shape"),
        ([0.0, float("nan")], [1.0, 0.0], NonFiniteError, "1 of 2 values of risk"),
        ([0.0, 1.0], [1.0, float("inf")], NonFiniteError, "1 of 2 values of loss"),
        ([], [], ShapeError, "empty"),
        ([1.0], [0.0], MetricError, "at least 2"),
        ([0.0, 1.0], [2.0, 2.0], MetricError, "all 2 losses are 2"),
    ],
)
def test_bad_input_is_one_line(risk, loss, error, message):
    with pytest.raises(error, match=message) as caught:
        measure_risk(risk, loss)
    assert "\n" not in str(caught.value)
