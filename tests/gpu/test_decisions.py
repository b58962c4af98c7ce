"""On a CUDA device: decisions are those of the CPU, and arguments may lie on either."""

from __future__ import annotations

import pytest
import torch

from selfdoubt import interpret

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

LOGITS, STD = torch.linspace(-4, 4, 40).reshape(10, 4).sin() * 3, torch.linspace(0.1, 3, 40).reshape(10, 4)
CALLS = {
    "average_noise": lambda y, std: interpret.average_noise(y, std),
    "mean_field": lambda y, std: interpret.average_noise(y, std, method="mean_field"),
    "average_binary_noise": interpret.average_binary_noise,
    "wrong_side_probability": lambda y, std: interpret.wrong_side_probability(y, std, 0.5),
    "parametric_interval": lambda y, std: interpret.parametric_interval(y, std).high,
    "error_probability": lambda y, std: interpret.error_probability(y.softmax(-1)),
    "decide": lambda y, std: interpret.decide(y.softmax(-1), [[0, 1], [1, 0], [2, 2], [1, 3]], reject_cost=0.5).cost,
    "intervals": lambda y, std: interpret.ConformalIntervals.fit(y, STD, std).predict(y, std).high,
    "sets": lambda y, std: interpret.ConformalSets.fit(y.softmax(-1), torch.arange(10) % 4).predict(y.softmax(-1)),
}


@pytest.mark.parametrize("name", CALLS)
def test_decisions_on_a_device_are_those_of_the_cpu(name):
    result = CALLS[name](LOGITS.cuda(), STD)
    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), CALLS[name](LOGITS, STD), rtol=1e-5, atol=1e-6)


def test_the_quality_of_a_risk_on_a_device_is_that_of_the_cpu():
    assert interpret.measure_risk(STD.cuda(), LOGITS.square()) == interpret.measure_risk(STD, LOGITS.square())
