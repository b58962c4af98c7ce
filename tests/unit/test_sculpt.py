"""Predicted spread: against torch.distributions, and on data whose true spread is known."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import ConfigError, WrapError
from selfdoubt.storage import to_json
from tests.zoo import FAMILIES, causal, mlp, prompts

FALSE_ALARM = 1e-10
ORACLES = {sculpt.Normal: torch.distributions.Normal, sculpt.Laplace: torch.distributions.Laplace}
both = pytest.mark.parametrize("distribution", ORACLES)


@both
def test_moments_and_likelihood_against_torch(distribution):
    y, scale = torch.randn(50, dtype=torch.float64), torch.rand(50, dtype=torch.float64) + 0.1
    target, oracle = torch.randn(50, dtype=torch.float64), ORACLES[distribution](y, scale)
    assert_close(distribution.nll((y, scale), target), -oracle.log_prob(target))
    assert_close(distribution.std((y, scale)), oracle.stddev)
    assert_close(distribution.mean((y, scale)), oracle.mean)


@both
def test_draws_follow_the_distribution(distribution):
    y, scale = torch.full((20_000,), 0.7), torch.full((20_000,), 0.3)
    draws = distribution.sample((y, scale), generator=torch.Generator().manual_seed(0))
    expected = (stats.norm if distribution is sculpt.Normal else stats.laplace)(0.7, 0.3)
    assert stats.kstest(draws.numpy(), expected.cdf).pvalue > FALSE_ALARM
    assert draws.isfinite().all()


@both
def test_draws_are_differentiable_in_mean_and_scale(distribution):
    y, scale = torch.zeros(100, requires_grad=True), torch.ones(100, requires_grad=True)
    draws = distribution.sample((y, scale))
    draws.sum().backward()
    assert torch.equal(y.grad, torch.ones(100))
    assert_close(scale.grad, draws.detach())  # y + scale * noise at y = 0, scale = 1


@both
def test_a_seed_gives_the_same_draws(distribution):
    pair = (torch.zeros(3), torch.ones(3))
    first, second = (distribution.sample(pair, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first, second)


@both
def test_outputs_without_a_scale_pass_through(distribution):
    tree = {"logits": torch.zeros(3), "cache": None, "hidden": torch.ones(2)}
    scales = {"logits": torch.ones(3), "cache": None, "hidden": None}
    drawn = distribution.sample((tree, scales))
    assert drawn["hidden"] is tree["hidden"]
    assert drawn["cache"] is None
    assert not torch.equal(drawn["logits"], tree["logits"])
    assert distribution.std((tree, scales))["hidden"] is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_language_model_is_its_output_embedding(family):
    (name,) = sculpt.Wrapper()(causal(family)).leaf_names
    assert causal(family).get_submodule(name) is causal(family).get_output_embeddings()


@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (mlp(), torch.randn(5, 4, dtype=torch.float64)),
        (nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1)), torch.randn(5, 3, 7, 7)),
        (nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, dilation=2)), torch.randn(5, 4, 9)),
        (nn.Sequential(Conv1D(6, 4)), torch.randn(5, 2, 4)),
    ],
    ids=["linear", "conv2d", "conv1d", "hf-conv1d"],
)
def test_the_scale_has_the_outputs_shape_and_starts_where_it_is_told(model, x, n_layers):
    wrapped = sculpt.Wrapper(n_layers=n_layers, initial_scale=0.37)(model)
    y, risk = wrapped(x, return_risk=True)
    assert torch.equal(y, model(x))
    assert_close(risk, torch.full_like(y, 0.37))


@pytest.mark.parametrize("rank", [2, None])
def test_one_layer_may_be_low_rank_or_full(rank):
    branch = sculpt.Wrapper(n_layers=1, rank=rank)(mlp()).module[2].branch
    assert [tuple(p.shape) for p in branch.parameters()] == ([(3, 8), (3,)] if rank is None else [(2, 8), (3, 2), (3,)])


@pytest.mark.parametrize("name", ["nll", "sample"])
def test_the_learnt_spread_is_the_true_one(name):
    # Noise grows with x; both ways of training must find it.
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(1024, 1, generator=generator) - 1
    true_std = 0.1 + 0.4 * (x + 1)
    y = true_std * torch.randn(1024, 1, generator=generator)
    wrapped = sculpt.Wrapper(distribution=sculpt.Normal)(mlp(1, 16, 1, dtype=torch.float32))
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        pair = wrapped(x, return_risk=True, training=True)
        if name == "nll":
            loss = sculpt.Normal.nll(pair, y).mean()
        else:
            # A score that is proper for draws: the energy distance of two independent draws.
            a, b = sculpt.Normal.sample(pair), sculpt.Normal.sample(pair)
            loss = ((a - y).abs() + (b - y).abs() - (a - b).abs()).mean()
        loss.backward()
        optimizer.step()
    _, risk = wrapped(x, return_risk=True)
    learnt = torch.cat([risk, true_std], 1).T.detach()
    assert torch.corrcoef(learnt)[0, 1] > 0.95
    assert (learnt[0] / learnt[1]).log().abs().mean() < 0.25


def test_a_task_loss_on_draws_reaches_the_head_and_the_branch():
    wrapped = sculpt.Wrapper()(mlp())
    pair = wrapped(torch.randn(6, 4, dtype=torch.float64), return_risk=True, training=True)
    sculpt.Normal.sample(pair).square().mean().backward()
    missing = [n for n, p in wrapped.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    assert wrapped.module[2].branch[-1].bias.grad.abs().min() > 0


@pytest.mark.parametrize("kind", ["vote", "sample"])
@both
def test_both_uncertainties_at_once_follow_the_law_of_total_variance(distribution, kind):
    outers = {
        "vote": vote.Wrapper(n_voters=3, answer_from="mean"),
        "sample": sample.Wrapper(n_samples=4, answer_from="mean"),
    }
    inner = sculpt.Wrapper(distribution=distribution)(mlp())
    for parameter in inner.module[2].branch.parameters():
        parameter.data.normal_(std=0.5)
    wrapped = outers[kind](inner)
    x = torch.randn(5, 4, dtype=torch.float64)
    y, risk = wrapped(x, return_risk=True)
    forecast = wrapped.forecast(x)
    members = forecast.members
    scales = forecast.scale_std
    assert_close(y, members.mean(0))
    assert_close(risk.square(), members.var(0, correction=0) + scales.square().mean(0))
    assert_close(forecast.epistemic, members.std(0, correction=0))
    assert_close(forecast.aleatoric.square(), scales.square().mean(0))
    assert_close(forecast.total, risk)
    assert scales.std(0).max() > 1e-3  # members predict different scales
    plain_std = math.sqrt(2) if distribution is sculpt.Laplace else 1.0
    rows = wrapped.forward_rows(x.repeat(len(members), 1))
    assert_close(scales.flatten(0, 1), rows[1] * plain_std)


def test_voters_around_a_sculpt_train_both():
    wrapped = vote.Wrapper(n_voters=3)(sculpt.Wrapper()(mlp()))
    pair = wrapped(torch.randn(6, 4, dtype=torch.float64), training=True, return_risk=True)
    sculpt.Normal.nll(pair, torch.zeros(6, 3, dtype=torch.float64)).mean().backward()
    trained = {n for n, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("deviations" in n for n in trained)
    assert any("branch" in n for n in trained)


def test_a_softcapped_output_still_finds_its_scale():
    wrapped = sculpt.Wrapper()(causal("gemma2"))
    y, risk = wrapped(input_ids=torch.tensor(prompts(4)), return_risk=True)
    assert risk.logits.shape == y.logits.shape


@both
def test_a_distribution_is_a_class_or_an_instance(distribution):
    assert sculpt.Wrapper(distribution=distribution()) == sculpt.Wrapper(distribution=distribution)
    assert to_json(sculpt.Wrapper(distribution=distribution()))["distribution"] == distribution.__name__
    pair = (torch.zeros(3), torch.ones(3))
    of_class, of_instance = (
        d.sample(pair, generator=torch.Generator().manual_seed(4)) for d in (distribution, distribution())
    )
    assert torch.equal(of_class, of_instance)
    assert torch.equal(distribution().std(pair), distribution.std(pair))


class TwoOutputs(nn.Module):
    """Two linear layers whose outputs have one shape; ``cap`` changes them after the layers."""

    def __init__(self, cap=lambda y: y) -> None:
        super().__init__()
        self.first, self.second, self.cap = nn.Linear(4, 3), nn.Linear(4, 3), cap

    def forward(self, x):
        # Not in the order in which the layers run.
        second = self.cap(self.second(x))
        return {"first": self.cap(self.first(x)), "second": second}


def spread(wrapped):
    """Make the heads' scales differ."""
    for name, parameter in wrapped.named_parameters():
        if ".branch." in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    return wrapped


@pytest.mark.parametrize("heads", ["first", "second", "first|second"])
@pytest.mark.parametrize("outer", [None, vote.Wrapper(n_voters=2)], ids=["alone", "inside vote"])
def test_outputs_of_equal_shape_have_the_scale_of_their_own_head(heads, outer):
    inner = spread(sculpt.Wrapper(param_filter=heads)(TwoOutputs()))
    model = inner if outer is None else outer(inner)
    x = torch.randn(5, 4)
    rows = x if outer is None else x.repeat(2, 1)
    _, scales = model.forward_rows(rows)
    for name in ("first", "second"):
        if name in heads:
            head = (inner if outer is None else model.module).module.get_submodule(name)
            model.call.members = 1 if outer is None else 2
            assert torch.equal(scales[name], head.scale(rows))
        else:
            assert scales[name] is None


def test_scales_of_changed_outputs_of_equal_shape_are_refused():
    wrapped = sculpt.Wrapper(param_filter="first|second")(TwoOutputs(torch.tanh))
    with pytest.raises(WrapError, match=r"^[^\n]*none of the outputs .* is its own tensor[^\n]*$"):
        wrapped(torch.randn(5, 4))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_hidden_states_as_wide_as_the_vocabulary_have_no_scale(family):
    """Gemma 2 caps its logits, so that they are not the head's own tensor."""
    base = causal(family)
    small = type(base)(type(base.config)(**base.config.to_dict() | {"vocab_size": base.config.hidden_size}))
    wrapped = sculpt.Wrapper()(small.eval())
    ids = torch.tensor(prompts(4)) % base.config.hidden_size
    y, risk = wrapped(input_ids=ids, output_hidden_states=True, return_risk=True)
    assert y.hidden_states[-1].shape == y.logits.shape
    assert_close(risk.logits, torch.full_like(y.logits, 0.1))
    assert all(scale is None for scale in risk.hidden_states)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: sculpt.Wrapper(n_layers=0),
            ConfigError,
            r"n_layers must be a whole number from 1 to 64, got 0; try n_layers=2",
        ),
        (
            lambda: sculpt.Wrapper(rank=0),
            ConfigError,
            r"rank must be None or a whole number from 1 to 65536, got 0; try rank=16",
        ),
        (lambda: sculpt.Wrapper(rank=None), ConfigError, r"a branch of 2 layers needs a width; try rank=16"),
        (lambda: sculpt.Wrapper(initial_scale=0.0), ConfigError, r"initial_scale .* got 0\.0"),
        (lambda: sculpt.Wrapper()(nn.Sequential(nn.LayerNorm(3))), WrapError, r"no linear or convolution layer"),
        (
            lambda: sculpt.Wrapper(param_filter="0")(nn.Sequential(nn.LayerNorm(3))),
            WrapError,
            r"a head must be .* 0 is LayerNorm; .*param_filter",
        ),
        (
            lambda: sculpt.Wrapper(param_filter="0")(mlp(4, 8, 3, dtype=torch.float32))(torch.ones(2, 4)),
            WrapError,
            r"the wrapped head gives \[\(2, 8\)\], and no output has that shape: \[\(2, 3\)\]",
        ),
    ],
)
def test_what_cannot_be_sculpted(make, error, words):
    with pytest.raises(error, match=f"^{words}[^\n]*$"):
        make()


@pytest.mark.parametrize("distribution", [sculpt.Normal, sculpt.Laplace])
def test_a_likelihood_needs_a_scale(distribution):
    with pytest.raises(ConfigError, match=r"two tensors, got Tensor and NoneType; give the output of a head"):
        distribution.nll((torch.ones(3), None), torch.ones(3))


def test_a_frozen_base_learns_nothing_and_neither_does_its_scale_alone():
    x = torch.ones(3, 4, dtype=torch.float64)
    wrapped = vote.Wrapper()(sculpt.Wrapper()(mlp()))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    mean, risk = wrapped(x, return_risk=True)  # without wrapped.train()
    sculpt.Normal.nll((mean, risk), torch.zeros_like(mean)).mean().backward()
    branch = [p for name, p in wrapped.named_parameters() if ".branch." in name and ".deviations." not in name]
    assert branch
    assert all(p.grad is None or not p.grad.any() for p in branch)
    optimizer.zero_grad()
    head = torch.nn.Linear(3, 1).double()
    head(wrapped(x, return_risk=True)[0]).sum().backward()  # frozen features under a head that learns
    assert head.weight.grad.abs().sum() > 0
    optimizer.step()
    assert wrapped.answers_from_base
    moving = x.clone().requires_grad_()  # a saliency map
    wrapped(moving, return_risk=True)[0].sum().backward()
    assert moving.grad.abs().sum() > 0
    sculpt.Normal.nll(wrapped.train()(x, return_risk=True), torch.zeros_like(mean)).mean().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
