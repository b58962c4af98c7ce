"""Noise: its distribution, its independence, and what trains.

Samples are functions of fixed keys and the tests' own draws are seeded, so a test either always passes or always fails;
the probabilities say how likely right code would fail had another seed been written down.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

import selfdoubt
from selfdoubt import sample
from selfdoubt.errors import ConfigError, WrapError
from selfdoubt.random_numbers import uniforms
from tests.zoo import causal, mlp, prompts

CPU = torch.device("cpu")
FALSE_ALARM = 1e-10


def linear(distribution, n_samples, features=8, **options):
    model = nn.Sequential(nn.Linear(features, 1, bias=False, dtype=torch.float64)).eval()
    return sample.Wrapper(n_samples=n_samples, distribution=distribution, **options)(model)


@pytest.mark.parametrize("key", [0, 1, -1, 2**62, 123456789])
def test_uniforms_are_uniform(key):
    draws = uniforms(key, 50, 400, CPU)
    assert 0 <= draws.min() < draws.max() < 1
    for values in (draws.flatten(), draws[0], draws[:, 0], draws[-1]):
        assert stats.kstest(values.numpy(), "uniform").pvalue > FALSE_ALARM


def test_uniforms_are_independent_between_members_features_and_keys():
    draws = torch.stack([uniforms(key, 20, 1000, CPU) for key in (0, 1, 2, 2**40)]).double() - 0.5

    def correlation(a, b):
        return (a.flatten() * b.flatten()).mean().item() * 12 * math.sqrt(a.numel())

    pairs = {
        "members": (draws[:, 1:], draws[:, :-1]),
        "features": (draws[:, :, 1:], draws[:, :, :-1]),
        "keys": (draws[1:], draws[:-1]),
        "keys-shifted": (draws[1:3, :, :-1], draws[:2, :, 1:]),
        "member-and-feature": (draws[:, 1:, 1:], draws[:, :-1, :-1]),
        "low-bits": ((draws * 4096) % 1 - 0.5, draws),
    }
    bound = stats.norm.isf(FALSE_ALARM / 2)  # 6.5 standard errors
    for name, (a, b) in pairs.items():
        assert abs(correlation(a, b)) < bound, name
    for i, j in itertools.combinations(range(20), 2):
        assert abs(correlation(draws[0, i], draws[0, j])) < bound + 1


def test_uniforms_depend_on_nothing_but_key_member_and_feature():
    small, large = uniforms(7, 3, 10, CPU), uniforms(7, 9, 99, CPU)
    assert torch.equal(small, large[:3, :10])
    assert not torch.equal(small, uniforms(8, 3, 10, CPU))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_variance_of_a_linear_layer_against_its_closed_form(p):
    # Var = p / (1 - p) * sum (w_i x_i)^2
    n, features = 20_000, 8
    wrapped = linear(sample.Bernoulli(p), n, features)
    x = torch.linspace(-1, 2, features, dtype=torch.float64)[None]
    parts = (wrapped.module[0].leaf.weight * x)[0].detach()
    mean, variance = parts.sum(), p / (1 - p) * parts.square().sum()
    forecast = wrapped.forecast(x)
    found = forecast.members[:, 0, 0].detach()
    # Fourth central moment of a sum of independent terms, for the standard error of a variance.
    q = 1 - p
    fourth_of_one = (q * (1 / q - 1) ** 4 + p) * parts.pow(4)
    second_of_one = p / q * parts.square()
    fourth = fourth_of_one.sum() + 3 * (second_of_one.sum() ** 2 - second_of_one.square().sum())
    bound = stats.norm.isf(FALSE_ALARM / 2)
    assert abs(found.mean() - mean) < bound * (variance / n).sqrt()
    assert abs(found.var() - variance) < bound * ((fourth - variance**2) / n).sqrt()
    assert_close(forecast.std[0, 0], (found - mean).square().mean().sqrt())  # around the base


@pytest.mark.parametrize("std", [0.1, 0.5])
def test_normal_noise_against_its_closed_form(std):
    n, features = 20_000, 8
    wrapped = linear(sample.Normal(std), n, features)
    x = torch.linspace(-1, 2, features, dtype=torch.float64)[None]
    parts = (wrapped.module[0].leaf.weight * x)[0].detach()
    found = wrapped.forecast(x).members[:, 0, 0].detach()
    expected = stats.norm(parts.sum().item(), std * parts.square().sum().sqrt().item())
    assert stats.kstest(found.numpy(), expected.cdf).pvalue > FALSE_ALARM


def test_noise_in_training_is_fresh_for_every_row_and_call():
    wrapped = linear(sample.Bernoulli(0.5), 3, features=64)
    x = torch.ones(2, 64, dtype=torch.float64)
    first, second = wrapped(x, training=True), wrapped(x, training=True)
    assert first[0] != first[1]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    again = wrapped(x, training=True)
    torch.manual_seed(0)
    assert torch.equal(wrapped(x, training=True), again)


@pytest.mark.parametrize("n_samples", [1, 4])
def test_noise_at_evaluation_is_a_function_of_the_seed(n_samples):
    x = torch.randn(5, 8, dtype=torch.float64)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 1, dtype=torch.float64)).eval()
    first, same, other = (sample.Wrapper(n_samples=n_samples, seed=s)(model).forecast(x).members for s in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_noise_is_kept_for_all_tokens_and_rows():
    wrapped = linear(sample.Bernoulli(0.5), 4)
    x = torch.randn(8, dtype=torch.float64)
    members = wrapped.forecast(x.expand(3, 5, 8)).members
    assert_close(members, members[:, :1, :1].expand_as(members))


def test_leaves_have_noise_of_their_own():
    wrapped = sample.Wrapper(n_samples=2, distribution=sample.Bernoulli(0.5), param_filter=".*")(mlp(32, 32, 32))
    first, second = wrapped.module[0], wrapped.module[2]
    wrapped.predict(torch.ones(1, 32, dtype=torch.float64))
    x = torch.ones(2, 32)
    assert not torch.equal(first._noise(x), second._noise(x))


def dirac():
    layer = nn.Conv2d(16, 16, 1, bias=False)
    nn.init.dirac_(layer.weight)
    return layer


@pytest.mark.parametrize("layer", [dirac(), nn.BatchNorm2d(16, eps=0.0), nn.PReLU(16)], ids=["conv", "norm", "prelu"])
def test_images_lose_whole_channels(layer):
    model = nn.Sequential(layer).eval()
    members = sample.Wrapper(n_samples=3, distribution=sample.Bernoulli(0.5))(model).forecast(torch.ones(2, 16, 3, 3))
    channels = members.members.flatten(3)
    assert torch.equal(channels.amin(-1), channels.amax(-1))
    assert set(channels.unique().tolist()) == {0.0, 2.0}


def test_embeddings_get_noise_on_their_output():
    model = nn.Sequential(nn.Embedding(5, 16)).eval()
    nn.init.ones_(model[0].weight)
    wrapped = sample.Wrapper(n_samples=3, distribution=sample.Bernoulli(0.5))(model)
    members = wrapped.forecast(torch.tensor([[0, 1], [2, 3]])).members
    assert set(members.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(members[:, :1, :1].expand_as(members), members)


@pytest.mark.parametrize(("distribution", "start"), [("Bernoulli", 0.3), ("Normal", 0.4)])
def test_trainable_noise_gets_gradients_and_fixed_noise_has_no_parameter(distribution, start):
    kind = getattr(sample, distribution)
    fixed = linear(kind(start), 2)
    assert [n for n, _ in fixed.named_parameters()] == ["module.0.leaf.weight"]
    wrapped = linear(kind(start, trainable=True), 2)
    x = torch.randn(16, 8, dtype=torch.float64)
    wrapped(x, training=True).square().mean().backward()
    parameter = wrapped.module[0].parameter
    assert parameter.grad.abs() > 0
    initial = parameter.sigmoid() if distribution == "Bernoulli" else parameter.exp()
    assert initial.item() == pytest.approx(start)


@pytest.mark.parametrize(("distribution", "start"), [("Bernoulli", 0.5), ("Normal", 0.5)])
def test_trainable_noise_shrinks_where_it_hurts(distribution, start):
    wrapped = linear(getattr(sample, distribution)(start, trainable=True), 2)
    noise = wrapped.module[0].parameter
    optimizer = torch.optim.Adam([noise], lr=0.1)
    x, before = torch.randn(64, 8, dtype=torch.float64), noise.item()
    target = wrapped.module[0].leaf(x).detach()
    for _ in range(30):
        optimizer.zero_grad()
        (wrapped(x, training=True) - target).square().mean().backward()
        optimizer.step()
    assert noise.item() < before - 1


def test_soft_noise_is_close_to_hard_noise():
    parameter = torch.tensor(sample.Bernoulli(0.3).initial())
    uniform = torch.linspace(0, 1, 10_001)[None, :-1]
    soft = sample.Bernoulli.noise(parameter, uniform, soft=True)
    hard = sample.Bernoulli.noise(parameter, uniform, soft=False)
    assert (soft - hard).abs().mean() < 0.05
    assert soft.mean().item() == pytest.approx(1, abs=0.02)
    assert hard.mean().item() == pytest.approx(1, abs=1e-3)


def test_a_language_model_keeps_one_network_per_member_for_all_tokens():
    wrapped = sample.Wrapper(n_samples=3)(causal("llama"))
    long = torch.tensor(prompts(9))
    with torch.no_grad():
        whole = wrapped.forecast(input_ids=long)["logits"].members
        part = wrapped.forecast(input_ids=long[:, :4])["logits"].members
    assert_close(whole[:, :, :4], part, rtol=1e-5, atol=1e-5)


def test_attention_of_torch_is_refused():
    layer = nn.TransformerEncoderLayer(4, 2, batch_first=True)
    with pytest.raises(WrapError, match=r"^0\.self_attn is nn\.MultiheadAttention, .*param_filter$"):
        sample.Wrapper(param_filter=".*")(nn.Sequential(layer))
    for param_filter in ("linear", None):
        wrapped = sample.Wrapper(param_filter=param_filter)(nn.Sequential(layer))
        assert wrapped.leaf_names == ["0.linear1", "0.linear2"]


def test_by_default_the_first_layer_norms_and_embeddings_have_no_noise():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 4)
    )
    assert sample.Wrapper()(network).leaf_names == ["2", "5"]
    assert sample.Wrapper(param_filter=".*")(network).leaf_names == ["0", "1", "2", "4", "5"]
    assert sample.Wrapper()(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))).leaf_names == ["1"]
    assert sample.Wrapper()(nn.Sequential(nn.Linear(4, 2))).leaf_names == ["0"]  # there is no other


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: sample.Wrapper(n_samples=0), r"n_samples must be .* from 1 to 1000000, got 0; try n_samples=5"),
        (
            lambda: sample.Bernoulli(0.0),
            r"p must be a finite number above 0 and below 1, or 'auto', got 0\.0; try p=0\.1",
        ),
        (lambda: sample.Bernoulli(1.0), r".* got 1\.0; try"),
        (lambda: sample.Bernoulli(math.nan), r".* got nan; try"),
        (lambda: sample.Normal(0.0), r"std must be a finite number above 0 .*, got 0\.0; try std=0\.1"),
        (lambda: sample.Normal(math.inf), r".* got inf; try"),
    ],
)
def test_settings_out_of_range(make, words):
    with pytest.raises(ConfigError, match=f"^{words}[^\n]*$"):
        make()


def test_the_default_noise_is_one_that_pretrained_weights_bear():
    assert sample.Wrapper().distribution == sample.Normal(0.1)
    assert sample.Normal() == sample.Normal(0.1)


def test_samples_that_were_saved_with_the_former_default_keep_their_noise(tmp_path):
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.ones(3, 4)
    former = sample.Wrapper(distribution=sample.Bernoulli(0.1), answer_from="mean")(copy.deepcopy(base))
    folder = selfdoubt.save(former, tmp_path / "adapter")
    again = selfdoubt.load(folder, base)
    assert isinstance(again.spec, sample.Wrapper)
    assert again.spec.distribution == sample.Bernoulli(0.1)
    assert_close(again(x), former(x), rtol=0, atol=0)
