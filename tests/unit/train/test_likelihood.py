"""Fused likelihoods against torch's own operations: sums, gradients, and numbers at the ends of their range."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from selfdoubt.train import likelihood
from selfdoubt.train.likelihood import sum_expected_surprisals, sum_surprisals

ROWS, CLASSES = 7, 33


def numbers(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    y = 5 * torch.randn(ROWS, CLASSES, generator=generator)
    s = 3 * torch.randn(ROWS, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    return y.to(dtype).requires_grad_(), s.to(dtype).requires_grad_(), labels


def written_out(y, s, labels, std_per_scale):
    std = std_per_scale * F.softplus(s.float())
    return F.cross_entropy(y.float() / (1 + math.pi / 8 * std.square()).sqrt(), labels, reduction="sum")


@pytest.fixture(params=[1, 2 * CLASSES, 2**16])
def _blocks(request, monkeypatch):
    monkeypatch.setattr(likelihood, "BLOCK_NUMBERS", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_surprisals_against_cross_entropy(dtype):
    y, _, labels = numbers(dtype=dtype)
    fast, slow = sum_surprisals(y, labels), F.cross_entropy(y.float(), labels, reduction="sum")
    assert_close(fast, slow)
    assert_close(torch.autograd.grad(fast * 0.5, y), torch.autograd.grad(slow * 0.5, y))


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("std_per_scale", [1.0, math.sqrt(2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expected_surprisals_against_the_formula(dtype, std_per_scale):
    y, s, labels = numbers(dtype=dtype)
    fast, slow = sum_expected_surprisals(y, s, labels, std_per_scale), written_out(y, s, labels, std_per_scale)
    assert_close(fast, slow)
    # In bfloat16 a gradient is rounded before it is weighted.
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
    assert_close(torch.autograd.grad(fast * 0.5, [y, s]), torch.autograd.grad(slow * 0.5, [y, s]), **close)


def test_large_numbers_overflow_nowhere():
    y = torch.tensor([[1e4, -1e4, 0.0], [80.0, 79.0, -90.0]], requires_grad=True)
    s = torch.tensor([[-90.0, 50.0, 0.0], [1e3, -1e3, 2.0]], requires_grad=True)
    labels = torch.tensor([1, 0])
    fast, slow = sum_expected_surprisals(y, s, labels, 1.0), written_out(y, s, labels, 1.0)
    assert_close(fast, slow)
    found = torch.autograd.grad(fast, [y, s])
    assert all(g.isfinite().all() for g in found)
    assert_close(found, torch.autograd.grad(slow, [y, s]), rtol=1e-4, atol=1e-6)


def test_a_number_that_is_none_makes_the_loss_none():
    y, s, labels = numbers()
    broken = y.detach().clone()
    broken[3, 5] = math.nan
    assert sum_surprisals(broken, labels).isnan()
    assert sum_expected_surprisals(broken, s, labels, 1.0).isnan()


def test_only_what_trains_gets_a_gradient():
    y, s, labels = numbers()
    (grad,) = torch.autograd.grad(sum_expected_surprisals(y.detach(), s, labels, 1.0), s)
    assert_close(grad, torch.autograd.grad(written_out(y, s, labels, 1.0), s)[0], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert_close(sum_surprisals(y, labels), F.cross_entropy(y, labels, reduction="sum"))
