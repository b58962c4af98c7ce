"""Laws of streaming Gaussians and of distances to them."""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from selfdoubt import density
from selfdoubt.gaussian import Gaussian, Moments, merge

seeds = st.integers(0, 10_000)
widths = st.integers(1, 8)


def draw(seed: int, n: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width, dtype=torch.float64) + 0.3 * torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix + 2


def fit(x: torch.Tensor, shrinkage: float | None = 0.0) -> Gaussian:
    gaussian = Gaussian(x.shape[1])
    gaussian.fit(Moments.sum(x), shrinkage)
    return gaussian


@given(seeds, widths)
def test_distances_do_not_depend_on_the_axes(seed, width):
    x, new = draw(seed, 100, width), draw(seed + 1, 9, width)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    change = turn * torch.linspace(0.5, 2, width, dtype=torch.float64)
    shift = 10 * torch.randn(width, generator=generator, dtype=torch.float64)
    assert_close(fit(x @ change + shift)(new @ change + shift), fit(x)(new), rtol=1e-3, atol=1e-4)


@given(seeds, widths, st.lists(st.integers(1, 20), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_neither_order_nor_size_of_batches_matters(seed, width, sizes, random):
    x = draw(seed, sum(sizes), width)
    pieces = [Moments.sum(piece) for piece in x.split(sizes)]
    random.shuffle(pieces)
    together, apart = Moments.sum(x), reduce(merge, pieces)
    for name in ("count", "total", "products", "cubes", "quartics"):
        assert_close(getattr(apart.move(together.origin), name), getattr(together, name), rtol=1e-7, atol=1e-7)


@given(seeds, widths, st.floats(-1e3, 1e3))
def test_one_pass_gives_what_two_passes_give(seed, width, offset):
    x = draw(seed, 50, width) + offset
    moments = Moments.sum(x)
    assert_close(moments.mean, x.mean(0))
    expected = torch.from_numpy(np.atleast_2d(np.cov(x.numpy().T)))
    assert_close(moments.compute_covariance(0.0), expected, rtol=1e-7, atol=1e-7)
    apart = x - x.mean(0)
    assert_close(moments.compute_shrinkage(), Moments.sum(apart).compute_shrinkage(), rtol=1e-7, atol=1e-9)


@given(seeds, st.integers(2, 8))
def test_shrinkage_lies_between_nothing_and_all(seed, width):
    x = draw(seed, 12, width)
    moments = Moments.sum(x)
    share = moments.compute_shrinkage()
    assert 0 <= share <= 1
    covariance = moments.compute_covariance(None)
    assert_close(covariance.trace(), moments.compute_covariance(0.0).trace())
    sphere = moments.compute_covariance(1.0)
    assert_close(sphere, sphere[0, 0] * torch.eye(width, dtype=torch.float64))


@given(seeds, st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_a_model_is_fitted_the_same_in_any_batches(seed, sizes):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = draw(seed, 60 + sum(sizes), 3)
    whole, split = density.Wrapper(shrinkage=0.1)(model), density.Wrapper(shrinkage=0.1)(model)
    density.fit(whole, [x])
    density.fit(split, x.split([60, *sizes]))
    assert_close(split(x, return_risk=True)[1], whole(x, return_risk=True)[1], rtol=1e-4, atol=1e-4)


@given(seeds, widths)
def test_distances_in_float32_are_those_in_float64(seed, width):
    x, new = draw(seed, 100, width), draw(seed + 1, 9, width)
    assert_close(fit(x.float())(new.float()).double(), fit(x)(new), rtol=1e-3, atol=1e-3)
