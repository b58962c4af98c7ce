"""Deviations of voters: how large they start, what they train on, and settings out of range."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import ConfigError
from tests.ladder.rungs import full_deviations
from tests.zoo import causal, mlp, prompts


def deviation(leaf, **options):
    wrapped = vote.Wrapper(n_voters=4, param_filter="weight", **options)(nn.Sequential(leaf))
    return full_deviations(wrapped.module[0])["weight"].detach()


@pytest.mark.parametrize("rank", [None, 1, 8])
@pytest.mark.parametrize(
    "leaf", [nn.Linear(200, 100), nn.Embedding(200, 100), Conv1D(200, 100)], ids=["linear", "embedding", "hf-conv1d"]
)
def test_weight_noise_is_relative_to_the_weights(leaf, rank):
    # At rank 1 the standard deviation of 4 products of 300 normals varies by about 10 %.
    found = deviation(leaf, rank=rank, weight_noise=0.25).std() / leaf.weight.std()
    assert found.item() == pytest.approx(0.25, rel=0.4 if rank == 1 else 0.1)


def test_a_constant_weight_is_its_own_yardstick():
    assert deviation(nn.LayerNorm(4000), weight_noise=0.25).std().item() == pytest.approx(0.25, rel=0.1)


def test_a_bias_deviates_on_the_scale_of_its_weight():
    leaf = nn.Linear(50, 4000)
    wrapped = vote.Wrapper(param_filter="bias", weight_noise=0.5)(nn.Sequential(leaf))
    found = wrapped.module[0].deviations["bias"].std() / leaf.weight.std()
    assert found.item() == pytest.approx(0.5, rel=0.1)


def test_alpha_scales_deviations():
    base, x = mlp(), torch.randn(2, 4, dtype=torch.float64)
    single = vote.Wrapper(param_filter="2.weight", alpha=1.0)(base)
    double = vote.Wrapper(param_filter="2.weight", alpha=2.0)(base)
    change = single.forecast(x).members - base(x)
    assert_close(double.forecast(x).members - base(x), 2 * change)


def test_voters_and_leaves_start_apart():
    wrapped = vote.Wrapper(n_voters=3, param_filter="weight")(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9)))
    assert isinstance(wrapped.module, nn.Sequential)
    flat = torch.cat([leaf.deviations["weight"].flatten(1) for leaf in wrapped.module]).detach()
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.6  # 81 numbers each: six standard errors are 0.67


def test_same_seed_same_voters_other_seed_others():
    base = mlp()

    def start(seed):
        return vote.Wrapper(seed=seed)(base).module[0].deviations["weight"]

    torch.manual_seed(1)
    first = start(3)
    torch.manual_seed(2)
    assert torch.equal(first, start(3))
    assert not torch.allclose(first, start(4))


def test_wrapping_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    model = mlp()
    for finetune in (True, False):
        torch.manual_seed(5)
        vote.Wrapper(finetune=finetune)(model)
        assert torch.equal(torch.rand(1), expected)


def test_without_finetuning_weights_are_drawn_anew_and_the_rest_trains():
    base = mlp(4, 400, 3)
    wrapped = vote.Wrapper(n_voters=3, param_filter="^0", finetune=False, alpha=0.5)(base)
    leaf = wrapped.module[0]
    weights = leaf.leaf.weight + leaf.alpha * leaf.deviations["weight"]
    bound = 1 / math.sqrt(4)  # nn.Linear draws uniformly within it
    assert weights.abs().max() <= bound + 1e-12
    assert weights.abs().max() > 0.99 * bound
    flat = torch.cat([weights.flatten(1), base[0].weight.flatten()[None]]).detach()
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.2  # 1600 numbers: eight standard errors
    assert all(p.requires_grad for n, p in wrapped.named_parameters() if n.startswith("module.2"))


def test_a_leaf_without_an_initialisation_of_its_own_is_redrawn_as_large_as_it_was():
    leaf = Conv1D(50, 40)
    wrapped = vote.Wrapper(param_filter="weight", finetune=False)(nn.Sequential(leaf))
    weights = wrapped.module[0].leaf.weight + wrapped.module[0].deviations["weight"]
    assert weights.std().item() == pytest.approx(leaf.weight.std().item(), rel=0.1)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_voter_gets_no_gradient_from_other_voters_rows(rank, checkpointed):
    wrapped = vote.Wrapper(n_voters=3, rank=rank)(mlp())
    x = torch.randn(6, 4, dtype=torch.float64)

    def forward(x):
        return wrapped(x, training=True)

    y = checkpoint(forward, x, use_reentrant=False) if checkpointed else forward(x)
    y[2:4].sum().backward()  # rows of the second voter
    for name, parameter in wrapped.named_parameters():
        if "deviations" in name:
            assert torch.equal(parameter.grad[[0, 2]], torch.zeros_like(parameter.grad[[0, 2]]))
            assert parameter.grad[1].abs().max() > 0
        else:
            assert parameter.grad is None


def test_checkpointed_gradients_are_the_ordinary_ones():
    x, gradients = torch.randn(6, 4, dtype=torch.float64), []
    for run in (lambda f: f(x), lambda f: checkpoint(f, x, use_reentrant=False)):
        wrapped = vote.Wrapper()(mlp_seeded())
        run(lambda x, w=wrapped: w(x, training=True)).square().sum().backward()
        gradients.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")  # its new name is not in all versions
@pytest.mark.parametrize("spec", [vote.Wrapper(n_voters=2, rank=2), sample.Wrapper(), sculpt.Wrapper()])
def test_gradient_checkpointing_of_a_language_model_changes_no_gradient(spec):
    ids, found = torch.tensor(prompts(6, 6)), []
    for checkpointed in (False, True):
        base = copy.deepcopy(causal("llama")).requires_grad_()
        if checkpointed:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped = spec(base).train()
        torch.manual_seed(0)
        out = wrapped(input_ids=ids, use_cache=False, return_risk=isinstance(spec, sculpt.Wrapper))
        logits = sculpt.Normal.sample(out).logits if isinstance(out, tuple) else out.logits
        logits.square().mean().backward()
        found.append({n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad})
    assert all(g is not None for g in found[0].values())
    assert_close(found[1], found[0])


def mlp_seeded():
    torch.manual_seed(3)
    return mlp()


def test_training_voters_fits_each_to_its_share():
    base, x = mlp(1, 16, 1), torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None]
    wrapped = vote.Wrapper(n_voters=3, weight_noise=1.0)(base)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], lr=0.02)
    target = torch.sin(3 * x)
    before = (wrapped(x) - target).square().mean()
    order = torch.Generator().manual_seed(0)
    for _ in range(150):
        batch = torch.randperm(60, generator=order)
        optimizer.zero_grad()
        (wrapped(x[batch], training=True) - target[batch]).square().mean().backward()
        optimizer.step()
    errors = (wrapped.forecast(x).members - target).square().mean((1, 2))
    assert (errors < before / 5).all()
    far, near = wrapped(torch.tensor([[6.0], [0.3]], dtype=torch.float64), return_risk=True)[1]
    assert far > 5 * near  # disagreement grows away from the data


def test_autocast_runs_deviations_in_the_low_type():
    wrapped = vote.Wrapper(rank=2)(mlp(4, 8, 3, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wrapped(torch.randn(2, 4))
    assert y.dtype == torch.bfloat16


def test_a_low_precision_model_keeps_its_type():
    wrapped = vote.Wrapper()(mlp(dtype=torch.bfloat16))
    assert wrapped(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_other_name_is_the_same_wrapper():
    eager = vote.EagerWrapper(param_filter="0|2", n_voters=3, finetune=True, verbose=0, weight_noise=0.2, alpha=1)
    assert isinstance(eager, vote.Wrapper)
    x = torch.randn(2, 4, dtype=torch.float64)
    base = mlp()
    assert torch.equal(eager(base)(x), vote.Wrapper(param_filter="0|2")(base)(x))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_voters": 0}, r"n_voters must be a whole number from 1 to 1000000, got 0; try n_voters=3"),
        ({"n_voters": 10**9}, r"n_voters must be a whole number .*, got 1000000000; try n_voters=3"),
        ({"rank": 0}, r"rank must be None or a whole number from 1 to 65536, got 0; try rank=None"),
        ({"weight_noise": -0.1}, r"weight_noise .* got -0\.1"),
        ({"weight_noise": math.nan}, r"weight_noise .* got nan"),
        ({"weight_noise": math.inf}, r"weight_noise .* got inf"),
        ({"alpha": 0.0}, r"alpha must not be 0: voters could not differ"),
        ({"alpha": 1e308}, r"alpha must be a finite number at least -1e\+06 and at most 1e\+06, got 1e\+308"),
        ({"param_filter": "("}, r"param_filter must be None or a regular expression, got '\(': missing"),
        ({"verbose": 3}, r"verbose must be a whole number from 0 to 2, got 3; try verbose=0"),
        ({"seed": 2**60}, r"seed must be a whole number from .*, got 1152921504606846976; try seed=0"),
        ({"alpha": math.inf}, r"alpha .* got inf"),
        ({"finetune": False, "rank": 4}, r"finetune=False .* got rank=4; leave rank=None"),
    ],
)
def test_settings_out_of_range(settings, words):
    with pytest.raises(ConfigError, match=f"^{words}[^\n]*$"):
        vote.Wrapper(**settings)


def test_settings_are_data():
    assert vote.Wrapper(n_voters=2) == vote.Wrapper(n_voters=2) != vote.Wrapper(n_voters=3)
    assert repr(vote.Wrapper(n_voters=2)).startswith("Wrapper(n_voters=2, ")
    with pytest.raises(AttributeError):
        vote.Wrapper().n_voters = 4


@pytest.mark.parametrize("param_filter", [".*", "weight"])
@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_in_training_each_row_and_gradient_is_that_of_its_voter_at_evaluation(param_filter, alpha):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 2, stride=2, bias=False), nn.Flatten(),
        nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2),
    ).double()  # fmt: skip
    wrapper = vote.Wrapper(n_voters=3, param_filter=param_filter, alpha=alpha, weight_noise=0.7, answer_from="mean")
    wrapped, x = wrapper(model), torch.randn(6, 2, 4, 4, dtype=torch.float64)
    names = sorted(name for name, p in wrapped.named_parameters() if p.requires_grad)
    members = wrapped.forecast(x).members
    expected = torch.cat([members[m, 2 * m : 2 * m + 2] for m in range(3)])  # evaluation takes another way
    y = wrapped.train()(x)
    torch.testing.assert_close(y, expected)
    for output in (y, expected):
        for name in names:
            wrapped.get_parameter(name).grad = None
        output.square().sum().backward()
        gradients = [wrapped.get_parameter(name).grad.clone() for name in names]
        if output is y:
            ours = gradients
    torch.testing.assert_close(ours, gradients)


def test_small_deviations_of_narrow_weights_still_count_in_training():
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).bfloat16()
    wrapped, x = vote.Wrapper(n_voters=2, weight_noise=1e-4)(model).train(), torch.ones(2, 8, dtype=torch.bfloat16)
    wrapped(x).sum().backward()
    before = wrapped(x).float()
    with torch.no_grad():
        wrapped.module[0].deviations["weight"] *= 100
    assert not torch.equal(wrapped(x).float(), before)
    assert wrapped.module[0].deviations["weight"].grad is not None
