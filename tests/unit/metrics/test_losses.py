"""Metrics of losses of any size against a plain loop, and what is refused."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest

from selfdoubt.errors import MetricError
from selfdoubt.metrics import aurc, loss_aurc, loss_coverage, loss_prr, prr


def draw(n=200, seed=0):
    random = np.random.default_rng(seed)
    spread = 0.1 + random.random(n)
    return spread, (spread * random.normal(size=n)) ** 2


def test_the_curve_against_a_plain_loop():
    risk, loss = draw()
    curve = loss_coverage(risk, loss)
    order = sorted(range(200), key=lambda i: risk[i])
    expected = [np.mean([loss[i] for i in order[:k]]) for k in range(1, 201)]
    np.testing.assert_allclose(curve.loss, expected, rtol=1e-12)
    np.testing.assert_allclose(curve.coverage, np.arange(1, 201) / 200)
    assert loss_aurc(risk, loss) == pytest.approx(np.mean(expected))


def test_ties_share_their_mean_loss():
    assert loss_coverage([0.0, 1.0, 1.0], [3.0, 6.0, 0.0]).loss.tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("digits", [1, 9])
def test_losses_of_0_and_1_have_the_numbers_of_right_and_wrong(digits):
    random = np.random.default_rng(1)
    wrong = random.random(300) < 0.3
    risk = np.round(random.normal(size=300) + wrong, digits)
    assert loss_aurc(risk, wrong) == pytest.approx(aurc(risk, ~wrong), abs=1e-12)
    assert loss_prr(risk, wrong) == pytest.approx(prr(risk, ~wrong), abs=1e-12)


def test_the_ratio_is_1_for_the_best_order_and_minus_for_the_worst():
    risk, loss = draw()
    assert loss_prr(loss, loss) == pytest.approx(1)
    assert loss_prr(-loss, loss) < 0
    assert 0 < loss_prr(risk, loss) < 1
    assert loss_prr(np.zeros(200), loss) == pytest.approx(0, abs=1e-12)


def test_the_order_of_the_file_changes_no_bit():
    random = np.random.default_rng(2)
    risk, loss = random.integers(4, size=200) / 4, np.exp(9 * random.normal(size=200))
    for _ in range(20):
        order = random.permutation(200)
        assert loss_prr(risk[order], loss[order]) == loss_prr(risk, loss)
        assert loss_aurc(risk[order], loss[order]) == loss_aurc(risk, loss)


@pytest.mark.parametrize(
    ("risk", "loss", "message"),
    [
        ([0.0, 1.0], [1.0], "one length"),
        ([[0.0, 1.0]], [[1.0, 1.0]], "one length"),
        ([0.0, np.nan], [1.0, 0.0], r"risk\[1\] is nan"),
        ([0.0, 1.0], [np.inf, 0.0], r"loss\[0\] is inf"),
        ([0.0, 1.0], ["a", "b"], "must hold numbers"),
        ([0.0], [0.0], "at least 2"),
    ],
)
def test_what_is_refused(risk, loss, message):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        for metric in (loss_coverage, loss_aurc, loss_prr):
            with pytest.raises(MetricError, match=message):
                metric(np.array(risk), np.array(loss))
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_equal_losses_have_no_ratio():
    with pytest.raises(MetricError, match="all 2 losses are 3"):
        loss_prr([0.0, 1.0], [3.0, 3.0])
