"""Distributions in few passes against scipy, in every dtype, and the largest values against those of torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax
from torch.testing import assert_close

from selfdoubt.distributions import (
    Distributions,
    compute_divergence,
    compute_entropy_of_mean,
    compute_uniform_divergence,
    find_first,
    find_top,
)

CLASSES = [7, 40, 64 * 64, 64 * 70 + 13]


def random_logits(*shape, seed=0, scale=3.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_distributions_against_scipy(classes, shift):
    logits = random_logits(3, 2, classes) + shift
    measured = Distributions.measure(logits)
    logp = log_softmax(logits.numpy(), -1)
    probs = np.exp(logp)
    assert_close(measured.probs.numpy(), probs)
    assert_close(measured.top.numpy(), logp.argmax(-1))
    assert_close(measured.entropy().numpy(), stats.entropy(probs, axis=-1))
    assert_close(compute_entropy_of_mean(measured.probs).numpy(), stats.entropy(probs.mean(0), axis=-1))
    classes_of = torch.randint(classes, (3, 2, 4), generator=torch.Generator().manual_seed(1))
    assert_close(measured.logprobs(classes_of).numpy(), np.take_along_axis(logp, classes_of.numpy(), -1))
    flat = np.full(classes, 1 / classes)
    assert_close(
        compute_uniform_divergence(measured).numpy(), stats.entropy(flat[:, None, None], np.moveaxis(probs, -1, 0))
    )
    divergence = compute_divergence(measured.select(0), measured.select(slice(1, None)))
    assert_close(divergence.numpy(), np.stack([stats.entropy(probs[0], p, axis=-1) for p in probs[1:]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 300.0])
def test_low_precision_is_measured_in_float32(dtype, scale):
    logits = random_logits(2, 3, 50_000, scale=scale).to(dtype)
    measured, exact = Distributions.measure(logits), Distributions.measure(logits.double())
    assert measured.probs.dtype == torch.float32
    assert_close(measured.entropy().double(), exact.entropy(), rtol=2e-6, atol=2e-6)
    assert_close(measured.lognorm.double(), exact.lognorm, rtol=1e-6, atol=1e-6)


def test_small_divergences_are_not_lost_in_rounding():
    base = random_logits(1, 5, 50_000)
    other = base + 1e-3 * random_logits(1, 5, 50_000, seed=1)
    small, exact = (
        compute_divergence(Distributions.measure(base.to(dtype)).select(0), Distributions.measure(other.to(dtype)))
        for dtype in (torch.float32, torch.float64)
    )
    assert exact.max() < 1e-5
    assert_close(small.double(), exact, rtol=0, atol=5e-7)  # as that of differences of log-probabilities


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("classes", CLASSES)
def test_a_logit_that_is_not_finite_makes_the_entropy_nan(bad, classes):
    logits = random_logits(4, classes).float()
    logits[1, 0] = logits[3, -1] = bad
    logits[2] = bad
    assert Distributions.measure(logits).entropy().isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_first_of_the_largest_values_against_argmax(classes, dtype):
    x = random_logits(9, 2, classes).to(dtype)
    x[0] = 0.0
    x[1, :, -1] = 99.0
    x[2, :, [0, -1]] = 99.0
    x[3, :, [classes // 2, classes // 2 + 1]] = 99.0
    x[4] = x[4].round()  # many are equal
    for values in (x, x.transpose(0, 1), x[::2]):
        assert torch.equal(find_first(values), values.argmax(-1))


@pytest.mark.parametrize("classes", CLASSES[1:])
def test_the_largest_values_against_topk(classes):
    x = random_logits(3, 2, classes).float()
    x[0, 0, -1] = 9.0
    assert torch.equal(find_top(x, 32), x.topk(32).indices)
