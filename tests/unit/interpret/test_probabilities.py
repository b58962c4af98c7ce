"""Probabilities of error against numerical integration, closed forms and simulation, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import laplace, norm

from selfdoubt import interpret
from selfdoubt.errors import ConfigError, DataError, NonFiniteError, ShapeError
from selfdoubt.forecast import Forecast


def integrate(logit, std):
    """E[sigmoid(logit + std z)] by scipy's adaptive quadrature."""
    crossing = [-logit / std] if abs(logit / std) < 12 else None
    return quad(lambda z: norm.pdf(z) * expit(logit + std * z), -12, 12, points=crossing, limit=2000, epsabs=1e-14)[0]


@pytest.mark.parametrize("std", [0.25, 0.96875, 1.0, 3.0, 25.0, 200.0])
@pytest.mark.parametrize("logit", [0.0, 0.5, 2.0, -5.0, 12.0])
def test_binary_noise_against_numerical_integration(logit, std):
    p = interpret.average_binary_noise(torch.tensor([logit]).double(), torch.tensor([std]).double())
    assert p.item() == pytest.approx(integrate(logit, std), abs=1e-12)


def test_binary_noise_keeps_small_probabilities():
    logit, std = torch.tensor([-40.0, -40.0]).double(), torch.tensor([0.0, 0.5]).double()
    p = interpret.average_binary_noise(logit, std)
    # So far out sigmoid(x) = exp(x), whose mean is exp(logit + std^2 / 2).
    torch.testing.assert_close(p, (logit + std.square() / 2).exp(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("std", [0.5, 3.0, 20.0])
def test_noise_on_two_logits_is_noise_on_their_difference(std):
    y, spread = torch.randn(40, 2).double() * 3, std * torch.rand(40, 2).double()
    p = interpret.average_noise(y, spread)
    each = [integrate(float(a - b), float(s.square().sum().sqrt())) for (a, b), s in zip(y, spread, strict=True)]
    np.testing.assert_allclose(p[:, 0], each, atol=1e-12)
    torch.testing.assert_close(p.sum(-1), torch.ones(40).double())


@pytest.mark.parametrize("std", [0.5, 3.0])
def test_noise_on_many_logits_with_one_class_out_of_reach_is_noise_on_the_others(std):
    y, spread = torch.randn(40, 2).double() * 3, std * torch.rand(40, 2).double()
    far = torch.cat([y, torch.full((40, 1), -500.0)], -1), torch.cat([spread, torch.zeros(40, 1)], -1)
    torch.testing.assert_close(
        interpret.average_noise(*far)[:, :2], interpret.average_noise(y, spread), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(("classes", "std"), [(3, 0.8), (3, 8.0), (12, 2.0)])
def test_noise_on_many_logits_against_simulation(classes, std):
    y, spread = 2 * torch.randn(10, classes).double(), std * torch.rand(10, classes).double()
    draws = (y + spread * torch.randn(20_000, 10, classes).double()).softmax(-1)
    error = (draws.std(0) / math.sqrt(20_000)).clamp_min(1e-6)
    apart = (interpret.average_noise(y, spread) - draws.mean(0)).abs() / error
    # At most 120 numbers, near normal by their 20,000 draws: beyond 8 with a probability below 1e-12.
    assert apart.max() < 8


def test_no_noise_is_the_softmax():
    y = 4 * torch.randn(5, 7, 6).double()
    for method in ("exact", "mean_field"):
        p = interpret.average_noise(y, torch.zeros_like(y), method=method)
        torch.testing.assert_close(p, y.softmax(-1), atol=1e-9, rtol=0)


def test_the_mean_field_is_near_for_little_noise_and_exact_where_all_classes_are_alike():
    y, spread = 2 * torch.randn(50, 5).double(), 0.5 * torch.rand(50, 5).double()
    near, exact = (interpret.average_noise(y, spread, method=m) for m in ("mean_field", "exact"))
    assert (near - exact).abs().max() < 0.02
    assert ((near - exact).abs().mean() < (y.softmax(-1) - exact).abs().mean()).item()
    alike = interpret.average_noise(torch.zeros(1, 5), torch.full((1, 5), 3.0), method="mean_field")
    torch.testing.assert_close(alike, torch.full((1, 5), 0.2))


def test_float32_is_integrated_in_float64():
    y, spread = torch.randn(6, 4), torch.rand(6, 4)
    p = interpret.average_noise(y, spread)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, interpret.average_noise(y.double(), spread.double()).float())


def test_members_are_averaged_as_probabilities():
    logits = 3 * torch.randn(4, 5, 3).double()
    torch.testing.assert_close(interpret.average_members(logits), logits.softmax(-1).mean(0))
    torch.testing.assert_close(interpret.average_members(logits[:1]), logits[0].softmax(-1))


def test_a_forecast_of_logits_answers_with_its_mean():
    members = 3 * torch.randn(4, 5, 3).double()
    p = interpret.class_probabilities(Forecast(members, kind="logits"))
    torch.testing.assert_close(p, members.softmax(-1).mean(0))
    torch.testing.assert_close(interpret.error_probability(p), 1 - members.softmax(-1).mean(0).amax(-1))


def test_a_forecast_of_a_base_model_answers_with_the_base():
    members, base = torch.randn(4, 5, 3), torch.randn(5, 3)
    p = interpret.class_probabilities(Forecast(members, kind="logits", base=base))
    torch.testing.assert_close(p, base.softmax(-1))


@pytest.mark.parametrize("with_base", [False, True])
def test_a_forecast_with_a_scale_averages_over_its_noise(with_base):
    members, scale = 3 * torch.randn(4, 5, 3).double(), torch.rand(4, 5, 3).double()
    if with_base:
        base = torch.randn(5, 3).double()
        forecast, expected = Forecast(members, scale[:1], "logits", base), interpret.average_noise(base, scale[0])
    else:
        each = [interpret.average_noise(y, std) for y, std in zip(members, scale, strict=True)]
        forecast, expected = Forecast(members, scale, "logits"), torch.stack(each).mean(0)
    torch.testing.assert_close(interpret.class_probabilities(forecast), expected)


def test_error_probability_keeps_small_errors():
    p = torch.tensor([[1.0, 1e-30], [0.25, 0.75]])
    torch.testing.assert_close(interpret.error_probability(p), torch.tensor([1e-30, 0.25]), rtol=1e-6, atol=0)


def test_the_share_of_errors_is_the_mean_error_probability():
    probs = torch.randn(20_000, 4).mul(2).softmax(-1)
    labels = probs.multinomial(1)[:, 0]
    wrong = (probs.argmax(-1) != labels).double()
    expected = interpret.error_probability(probs).double()
    error = (expected * (1 - expected)).sum().sqrt() / len(wrong)
    assert abs(wrong.mean() - expected.mean()) < 7 * error  # false alarm below 1e-11


@pytest.mark.parametrize(("name", "law"), [("normal", norm(scale=2.0)), ("laplace", laplace(scale=2 / math.sqrt(2)))])
def test_probabilities_at_a_threshold_against_scipy(name, law):
    y = torch.linspace(-5, 5, 11).double()
    above = interpret.probability_above(y, torch.full_like(y, 2.0), 1.0, distribution=name)
    np.testing.assert_allclose(above, law.sf(1.0 - y.numpy()), rtol=1e-12)
    wrong = interpret.wrong_side_probability(y, torch.full_like(y, 2.0), 1.0, distribution=name)
    np.testing.assert_allclose(wrong, law.cdf(-np.abs(y.numpy() - 1.0)), rtol=1e-12)


def test_a_prediction_without_spread_is_certain_of_its_side():
    y, std = [0.0, 1.0, 2.0], [0.0, 0.0, 0.0]
    assert interpret.wrong_side_probability(y, std, 1.0).tolist() == [0.0, 0.5, 0.0]
    assert interpret.probability_above(y, std, 1.0).tolist() == [0.0, 0.5, 1.0]


def test_arrays_lists_and_halves_are_taken():
    y, std = np.array([0.5, -1.0])[::-1], np.array([1.0, 2.0])[::-1]
    p = interpret.probability_above(y, std, 0.0)
    assert p.dtype == torch.float64
    torch.testing.assert_close(interpret.probability_above(y.tolist(), std.tolist(), 0.0), p.float())
    half = interpret.probability_above(torch.tensor([0.5]).bfloat16(), torch.tensor([1.0]).bfloat16(), 0)
    assert half.dtype == torch.float32
    needs_gradient = torch.ones(2, requires_grad=True)
    assert not interpret.probability_above(needs_gradient, needs_gradient, 0.0).requires_grad


def test_a_column_of_a_table_is_read_in_its_order():
    pandas = pytest.importorskip("pandas")
    column = pandas.Series([0.25, 0.9], index=[1, 0])
    assert interpret.binary_error_probability(column).tolist() == pytest.approx([0.25, 0.1])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: interpret.average_binary_noise([x], [1.0]),
        lambda x: interpret.average_binary_noise([1.0], [x]),
        lambda x: interpret.average_noise([[x, 1.0, 2.0]], [[1.0] * 3]),
        lambda x: interpret.average_noise([[0.0] * 3], [[1.0, x, 1.0]]),
        lambda x: interpret.average_members([[[x, 1.0]]]),
        lambda x: interpret.class_probabilities(Forecast(torch.tensor([[[x, 0.0]]]), kind="logits")),
        lambda x: interpret.error_probability([[x, 1.0]]),
        lambda x: interpret.binary_error_probability([x]),
        lambda x: interpret.probability_above([x], [1.0], 0.0),
        lambda x: interpret.probability_above([1.0], [1.0], x),
        lambda x: interpret.wrong_side_probability([1.0], [x], 0.0),
    ],
)
def test_numbers_that_are_not_finite_are_refused(call, bad):
    with pytest.raises(NonFiniteError) as caught:
        call(bad)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: interpret.error_probability([[2.0, -1.0]]), DataError, r"in \[0, 1\], got 2; for logits give"),
        (lambda: interpret.error_probability([[0.4, 0.4]]), DataError, "must sum to 1, and one is 0.2 away"),
        (lambda: interpret.error_probability([0.5]), ShapeError, "two classes or more"),
        (lambda: interpret.error_probability(torch.empty(0, 3)), ShapeError, "probs is empty"),
        (lambda: interpret.error_probability([[0.5, 0.5], [1.0]]), ShapeError, "a list of numbers"),
        (lambda: interpret.error_probability([["a", "b"]]), ShapeError, "a list of numbers"),
        (lambda: interpret.error_probability(torch.ones(2, 2) * 1j), ShapeError, "real numbers"),
        (lambda: interpret.binary_error_probability([1.5]), DataError, "got 1.5"),
        (lambda: interpret.average_members(torch.zeros(3, 4)), ShapeError, r"logits\[None\]"),
        (lambda: interpret.average_members(torch.zeros(3, 2, 1)), ShapeError, "two classes or more"),
        (lambda: interpret.average_noise([[0.0]], [[1.0]]), ShapeError, "average_binary_noise"),
        (lambda: interpret.average_noise([[0.0, 1.0]], [[1.0]]), ShapeError, "one shape"),
        (lambda: interpret.average_noise([[0.0, 1.0]], [[1.0, -1.0]]), DataError, "not its logarithm"),
        (lambda: interpret.average_noise([[0.0] * 3], [[1.0] * 3], method="best"), ConfigError, "mean_field"),
        (lambda: interpret.probability_above(torch.ones(3, 1), torch.ones(3), 0.0), ShapeError, r"\(3, 1\) and \(3,\)"),
        (lambda: interpret.probability_above([1.0], [-1.0], 0.0), DataError, "at least 0, got -1"),
        (lambda: interpret.probability_above([1.0], [1.0], torch.ones(2)), ConfigError, "one number, got tensor"),
        (lambda: interpret.probability_above([1.0], [1.0], "high"), ConfigError, "one number, got 'high'"),
        (lambda: interpret.probability_above([1.0], [1.0], 0.0, distribution="cauchy"), ConfigError, "cauchy"),
        (
            lambda: interpret.class_probabilities(Forecast(torch.zeros(2, 3, 4))),
            ConfigError,
            "output='logits'",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("unchecked")
def test_logits_are_no_forecast():
    with pytest.raises(
        ConfigError, match=r"^class probabilities need a forecast, got Tensor; give wrapped\.forecast\(x\)"
    ):
        interpret.class_probabilities(torch.zeros(3, 2))
