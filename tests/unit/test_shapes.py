"""Wrappers on the shapes of models that people bring: equal to one whole model per member, in values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from selfdoubt import density, sample, sculpt, vote
from selfdoubt.forecast import Forecast
from selfdoubt.rows import Replacement
from selfdoubt.tree import iter_tensors
from tests.ladder.rungs import looped, voter
from tests.shapes import SHAPES, build, make_inputs
from tests.zoo import causal, prompts

#: Rounding of float64 in the gradients and outputs of networks of this size.
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
DTYPES = [torch.float64, torch.float32]
#: The projections of ``nn.MultiheadAttention`` take no noise one by one.
NOISY = r"^(?!.*self_attn)"
#: Settings with which the base or the only member answers: its numbers are the plain model's, bit for bit.
EXACT = {
    "zero voter": lambda s: vote.Wrapper(1, weight_noise=0, answer_from="mean", shared_inputs=s.shared),
    "zero low-rank voter": lambda s: vote.Wrapper(
        1, weight_noise=0, rank=2, answer_from="mean", shared_inputs=s.shared
    ),
    "vote": lambda s: vote.Wrapper(shared_inputs=s.shared),
    "sample": lambda s: sample.Wrapper(param_filter=NOISY, shared_inputs=s.shared),
    "sculpt": lambda s: sculpt.Wrapper(param_filter=s.head),
    "density": lambda s: density.Wrapper(),
    "voters around a sculpt": lambda s: vote.Wrapper(shared_inputs=s.shared),
}


def iter_forecasts(tree):
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        for value in tree:
            yield from iter_forecasts(value)
    elif isinstance(tree, Forecast):
        yield tree


def call(model, name, batch=6, dtype=torch.float64):
    args, kwargs = make_inputs(name, batch, dtype)
    return model(*args, **kwargs)


def forecast(wrapped, name, batch=6):
    args, kwargs = make_inputs(name, batch)
    return list(iter_forecasts(wrapped.forecast(*args, **kwargs)))


def batched(tree, batch=6):
    return [x for x in iter_tensors(tree) if x.ndim and len(x) == batch]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", SHAPES)
def test_an_answer_of_the_base_is_the_plain_models_bit_for_bit(name, kind, dtype):
    # torch multiplies by other kernels where a weight trains, and in its fused encoder layers.
    base = build(name, dtype).requires_grad_(False)
    inside = sculpt.Wrapper(param_filter=SHAPES[name].head)(base) if "around" in kind else base
    wrapped = EXACT[kind](SHAPES[name])(inside)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            expected, found = call(base, name, dtype=dtype), call(wrapped, name, dtype=dtype)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    pairs = list(zip(iter_tensors(found), iter_tensors(expected), strict=True))
    assert pairs
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_voters_against_one_whole_model_each_and_its_gradients(name, rank):
    base = build(name)
    wrapped = vote.Wrapper(3, rank=rank, weight_noise=0.5, shared_inputs=SHAPES[name].shared)(base)
    alone = [voter(wrapped, base, m) for m in range(3)]
    merged = [vote.merge_voter(wrapped, m) for m in range(3)]
    found = forecast(wrapped, name)
    for m in range(3):
        for f, expected, same in zip(found, batched(call(alone[m], name)), batched(call(merged[m], name)), strict=True):
            assert_close(f.members[m], expected, **TIGHT)
            assert_close(same, expected, **TIGHT)
        assert [type(x) for x in merged[m].modules()] == [type(x) for x in base.modules()]
        assert set(merged[m].state_dict()) == set(base.state_dict())
    slow = looped(wrapped)
    for f, expected in zip(found, forecast(slow, name), strict=True):
        assert_close(f.members, expected.members, **TIGHT)
    if rank is None:
        for model in (wrapped, slow):
            sum(f.members.sin().sum() for f in forecast(model, name) if f.members.is_floating_point()).backward()
        gradients = {n: p.grad for n, p in slow.named_parameters() if p.requires_grad}
        for n, p in wrapped.named_parameters():
            if p.requires_grad and gradients[n] is not None:
                assert_close(p.grad, gradients[n], **TIGHT)


@pytest.mark.parametrize("name", SHAPES)
def test_a_training_step_against_each_voter_on_its_share(name):
    base = build(name)
    wrapped = vote.Wrapper(3, weight_noise=0.5, shared_inputs=SHAPES[name].shared)(base).train()
    for module in wrapped.modules():
        if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
            module.eval()
    wrapped.requires_grad_(True)
    args, kwargs = make_inputs(name)
    shared = SHAPES[name].shared
    outputs = batched(wrapped(*args, **kwargs))
    sum(y.sin().sum() for y in outputs if y.is_floating_point()).backward()
    for m in range(3):
        alone = vote.merge_voter(wrapped, m).eval().requires_grad_(True)

        def share(x, m=m):
            return x[2 * m : 2 * m + 2] if len(x) == 6 else x

        own = {k: share(v) for k, v in kwargs.items()}
        expected = batched(alone(*(a if i and shared else share(a) for i, a in enumerate(args)), **own), 2)
        for y, one in zip(outputs, expected, strict=True):
            assert_close(y[2 * m : 2 * m + 2], one, **TIGHT)
        sum(y.sin().sum() for y in expected if y.is_floating_point()).backward()
        for leaf_name in wrapped.leaf_names:
            leaf, plain = wrapped.module.get_submodule(leaf_name), alone.get_submodule(leaf_name)
            for key, deviation in leaf.deviations.items():
                gradient = plain.get_parameter(key.replace("/", ".")).grad
                if gradient is not None:
                    assert_close(deviation.grad[m], gradient, **TIGHT)


@pytest.mark.parametrize("name", SHAPES)
def test_samples_do_not_depend_on_the_batch_and_the_base_stays(name):
    base = build(name)
    spec = sample.Wrapper(4, sample.Normal(0.3), param_filter=NOISY, shared_inputs=SHAPES[name].shared)
    wrapped = spec(base)
    whole, one = forecast(wrapped, name, 6), forecast(wrapped, name, 6)
    args, kwargs = make_inputs(name)
    shared = SHAPES[name].shared
    half = [a if i and shared else a[:3] for i, a in enumerate(args)]
    first = list(iter_forecasts(wrapped.forecast(*half, **{k: v[:3] for k, v in kwargs.items()})))
    for f, again, part, plain in zip(whole, one, first, batched(call(base, name)), strict=True):
        assert torch.equal(f.members, again.members)
        assert_close(f.members[:, :3], part.members, **TIGHT)
        assert_close(f.base, plain, **TIGHT)
        if f.members.is_floating_point():
            assert f.std.max() > 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_a_merged_voter_keeps_the_wrapper_inside(name):
    base, head = build(name), SHAPES[name].head
    wrapped = vote.Wrapper(3, weight_noise=0.5, shared_inputs=SHAPES[name].shared)(
        sculpt.Wrapper(param_filter=head)(base)
    )
    args, kwargs = make_inputs(name)
    found = [f for f in forecast(wrapped, name) if f.scale_std is not None]
    assert found
    for f in (f for f in found if f.kind == "values"):
        assert_close(f.total.square(), f.aleatoric.square() + f.epistemic.square(), **TIGHT)
    for m in range(3):
        alone = vote.merge_voter(wrapped, m)
        assert isinstance(alone.spec, sculpt.Wrapper)
        _, scale = alone(*args, return_risk=True, **kwargs)
        for f, s in zip(iter_forecasts(alone.forecast(*args, **kwargs)), forecast(wrapped, name), strict=True):
            assert_close(f.members[0], s.members[m], **TIGHT)
        for member, expected in zip(iter_tensors(scale), found, strict=True):
            assert member.shape == expected.mean.shape


def test_a_merged_voter_shares_what_voters_do_not_change():
    base = build("bert")
    wrapped = vote.Wrapper(3, param_filter="query|value")(base)
    alone = vote.merge_voter(wrapped, 2)
    before = {name: p.data_ptr() for name, p in base.named_parameters()}
    changed = {name for name, p in alone.named_parameters() if p.data_ptr() != before[name]}
    assert changed == {name for name in before if "query" in name or "value" in name}
    assert not any(isinstance(m, Replacement) for m in alone.modules())
    state = copy.deepcopy(wrapped.state_dict())
    for p in alone.parameters():
        if p.requires_grad:
            p.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(state.values(), wrapped.state_dict().values(), strict=True))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 stores weights as (in, out), and ties its embedding
def test_merged_voters_of_language_models(family, rank):
    base, ids = causal(family), torch.tensor(prompts(5, 5))
    wrapped = vote.Wrapper(3, param_filter=".", rank=rank, weight_noise=0.5)(base)
    with torch.no_grad():
        members = wrapped.forecast(input_ids=ids)["logits"].members
        for m in range(3):
            assert_close(vote.merge_voter(wrapped, m)(input_ids=ids).logits, members[m], **TIGHT)


@pytest.mark.parametrize("kind", ["sample", "density"])
def test_merged_voters_around_samples_and_a_density(kind):
    base = build("resnet")
    if kind == "sample":
        inner = sample.Wrapper(4, sample.Normal(0.3), answer_from="mean")(base)
    else:
        inner = density.Wrapper()(base)
    wrapped = vote.Wrapper(3, weight_noise=0.5, answer_from="mean")(inner)
    (x,), _ = make_inputs("resnet", 30)
    if kind == "density":
        density.fit(wrapped, [x])
    members = wrapped.forecast(x).members
    for m in range(3):
        alone = vote.merge_voter(wrapped, m)
        assert alone.spec == inner.spec
        found = alone.forecast(x)
        if kind == "density":
            assert_close(found.members[0], members[m], **TIGHT)
            assert found.density.shape == (30,)
        elif m == 0:  # the first voter's noise is that of samples without voters; others draw their own
            assert_close(found.members, members[:4], **TIGHT)
        else:
            assert (found.members - members[4 * m : 4 * m + 4]).abs().max() > 1e-3
