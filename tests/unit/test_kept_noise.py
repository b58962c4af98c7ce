"""Noise that is kept between calls, to the bit the noise that is computed in each."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from selfdoubt import sample

DISTRIBUTIONS = {
    "bernoulli": sample.Bernoulli(0.3),
    "normal": sample.Normal(0.4),
    "trainable bernoulli": sample.Bernoulli(0.3, trainable=True),
    "trainable normal": sample.Normal(0.4, trainable=True),
}
LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "convolution": (lambda: nn.Conv2d(6, 5, 1), (2, 6, 3, 3)),
}


def build(distribution, *, layer="linear", dtype=torch.float32, answer_from="mean"):
    torch.manual_seed(0)
    base = nn.Sequential(LAYERS[layer][0]()).to(dtype).eval()
    return sample.Wrapper(n_samples=3, distribution=distribution, answer_from=answer_from)(base)


def rows_of(wrapped, layer="linear", dtype=torch.float32):
    shape = LAYERS[layer][1]
    return torch.randn(wrapped.spec.members(training=False) * shape[0], *shape[1:], dtype=dtype)


def kept(wrapped, x, **options):
    with torch.inference_mode():
        return wrapped.forward_rows(x, **options)[0].clone()


def computed(wrapped, x):
    with torch.enable_grad():
        return wrapped.forward_rows(x)[0].detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("answer_from", ["mean", "base"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_kept_noise_is_the_computed_noise(name, layer, answer_from, dtype):
    wrapped = build(DISTRIBUTIONS[name], layer=layer, dtype=dtype, answer_from=answer_from)
    x = rows_of(wrapped, layer, dtype)
    expected = computed(wrapped, x)
    for options in ({}, {"same_weights": True}, {}):
        assert torch.equal(kept(wrapped, x, **options), expected)
    leaf, strided = wrapped.module[0], x.mT.contiguous().mT
    with torch.no_grad():
        ours = leaf._make_noisy(strided)
    assert torch.equal(ours, leaf._make_noisy(strided))  # the layer itself rounds by the strides of its input


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_change_of_the_noise_is_seen(name):
    wrapped = build(DISTRIBUTIONS[name])
    x = rows_of(wrapped)
    before = kept(wrapped, x)
    wrapped.module[0].set_noise(0.6)
    changed = kept(wrapped, x, same_weights=True)
    assert torch.equal(changed, computed(wrapped, x))
    assert not torch.equal(changed, before)
    if wrapped.module[0].distribution.trainable:
        optimizer = torch.optim.SGD([wrapped.module[0].parameter], lr=0.1)
        wrapped(x, training=True).square().sum().backward()
        optimizer.step()
        trained = kept(wrapped, x, same_weights=True)
        assert torch.equal(trained, computed(wrapped, x))
        wrapped.module[0].parameter.data.add_(1.0)
        assert torch.equal(kept(wrapped, x), computed(wrapped, x))
        assert not torch.equal(kept(wrapped, x), trained)


def test_a_step_costs_one_product_per_leaf():
    from tests.unit.test_factors import CountKernels

    wrapped = build(sample.Bernoulli(0.3), answer_from="base")
    x = rows_of(wrapped)
    kept(wrapped, x)
    address = next(iter(wrapped.module[0]._kept.values()))[1].data_ptr()
    with CountKernels() as counter:
        kept(wrapped, x, same_weights=True)
    assert counter.counts["mul"] == 1
    assert not set(counter.counts) & {"cat", "arange", "ge", "repeat", "__rshift__", "index_select"}
    wrapped.module[0].set_noise(0.5)
    kept(wrapped, x)
    assert next(iter(wrapped.module[0]._kept.values()))[1].data_ptr() == address  # where a captured graph reads it


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_make_their_own(duplicate):
    wrapped = build(sample.Normal(0.4))
    x = rows_of(wrapped)
    before = kept(wrapped, x)
    other = duplicate(wrapped)
    assert other.module[0]._kept == {}
    assert torch.equal(kept(other, x), before)
    other.module[0].set_noise(0.1)
    assert not torch.equal(kept(other, x), before)
    assert torch.equal(kept(wrapped, x), before)


def test_noise_that_was_kept_without_gradients_serves_with_them():
    wrapped = build(sample.Bernoulli(0.3))
    x = rows_of(wrapped)
    kept(wrapped, x)
    with torch.no_grad():
        y = wrapped.forward_rows(x)[0]
    wrapped.forward_rows(x)[0].sum().backward()
    assert wrapped.module[0].leaf.weight.grad.abs().max() > 0
    assert not y.is_inference()
