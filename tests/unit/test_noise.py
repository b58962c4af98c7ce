"""The search for the size of noise: against closed forms of a linear classifier, and its result on any module."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import selfdoubt
from selfdoubt import sample, sculpt, storage, vote
from selfdoubt.deviations import START_NOISE
from selfdoubt.errors import ConfigError, LoadError, NonFiniteError, WrapError
from selfdoubt.noise import NoiseLimits, NoiseTally, search_largest, set_noise
from selfdoubt.noise_fit import fit_noise, run_base, scale_to_outputs
from tests.ladder.rungs import full_deviations, voter
from tests.zoo import causal, cnn, mlp, prompts

AUTO = {
    "vote": vote.Wrapper(weight_noise="auto"),
    "vote-low-rank": vote.Wrapper(weight_noise="auto", rank=2),
    "normal": sample.Wrapper(distribution=sample.Normal("auto")),
    "bernoulli": sample.Wrapper(distribution=sample.Bernoulli("auto"), param_filter=".*"),
}


@given(st.floats(1e-3, 0.9), st.floats(1e-3, 1.0), st.integers(0, 12))
def test_the_largest_passing_value_is_found_within_the_last_step(limit, start, steps):
    largest = search_largest(lambda x: x <= limit, 1e-3, 1.0, start=start, steps=steps)
    assert largest <= limit < largest * 2 ** (2.0**-steps) * (1 + 1e-9)


@given(st.randoms(use_true_random=False), st.floats(0.01, 10.0), st.integers(0, 10))
def test_what_is_found_was_checked_and_passed_and_no_larger_value_that_was_checked_did(random, start, steps):
    results: dict[float, bool] = {}

    def check(value):  # not monotone at all
        return results.setdefault(value, random.random() < 0.5)

    largest = search_largest(check, 0.01, 10.0, start=start, steps=steps)
    passed = [value for value, good in results.items() if good]
    if largest is None:
        assert not passed
        assert min(results) == 0.01
    else:
        assert largest == max(passed)


@pytest.mark.parametrize(
    ("low", "start", "high", "steps"),
    [(0.0, 0.5, 1.0, 3), (2.0, 1.5, 1.0, 3), (1.0, 3.0, 2.0, 3), (1.0, 1.0, 2.0, -1), (1.0, 2.0, math.inf, 3)],
)
def test_an_empty_range_is_refused(low, start, high, steps):
    with pytest.raises(ConfigError, match="a search needs 0 < low <= start <= high and steps >= 0"):
        search_largest(lambda _: True, low, high, start=start, steps=steps)


def test_ends_of_the_range():
    assert search_largest(lambda _: True, 1e-3, 0.7, start=0.01) == 0.7
    assert search_largest(lambda _: False, 1e-3, 0.7, start=0.01) is None
    assert search_largest(lambda x: x <= 1e-3, 1e-3, 0.7, start=0.01, steps=0) == 1e-3


def flipping_sizes(wrapped, x):
    """The size at which each member's prediction leaves the base's, for a linear classifier: where two lines cross.

    The logits are ``y + size * d``, so class c overtakes the base's class k at ``(y_k - y_c) / (d_c - d_k)``.
    """
    leaf = wrapped.module[0]
    y = leaf.leaf(x).detach().numpy()
    k = y.argmax(-1)
    rows = np.arange(len(y))
    sizes = []
    for deviation in full_deviations(leaf)["weight"].detach():
        d = (x @ deviation.T).numpy()
        gap, speed = y[rows, k][:, None] - y, d - d[rows, k][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            sizes.append(np.where(speed > 0, gap / speed, np.inf).min(-1))
    return np.stack(sizes)


def linear_classifier():
    model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float64))
    return vote.Wrapper(n_voters=4, weight_noise=1.0, param_filter="weight", output="logits")(model)


def measured(wrapped, x, size):
    set_noise(wrapped, size)
    forecast = wrapped.forecast(x)
    tally = NoiseTally()
    tally.add_logits(wrapped.module[0].leaf(x), forecast.members)
    return tally.flips / tally.count


def test_flips_of_a_linear_classifier_against_the_closed_form():
    wrapped, x = linear_classifier(), torch.randn(300, 6, dtype=torch.float64)
    crossings = flipping_sizes(wrapped, x)
    sizes = np.geomspace(1e-3, 10, 25)
    with torch.no_grad():
        flips = [measured(wrapped, x, size) for size in sizes]
    assert flips == pytest.approx([(crossings < size).mean() for size in sizes])
    assert flips == sorted(flips)  # monotone: a prediction that has flipped never comes back
    assert flips[0] < 0.01 < 0.3 < flips[-1]


def test_the_search_stops_where_the_closed_form_says():
    wrapped, x = linear_classifier(), torch.randn(500, 6, dtype=torch.float64)
    crossings = np.sort(flipping_sizes(wrapped, x).ravel())
    limits = NoiseLimits(flip_rate=0.02, divergence=1e9)
    result = fit_noise(wrapped, [x[:200], x[200:]], limits=limits, low=1e-4, high=100.0, steps=20)
    # 2,000 predictions: the size at which the 41st flips is the first that fails.
    assert crossings[39] < result.alpha <= crossings[40]
    assert result.alpha == pytest.approx(crossings[40], rel=2e-5)
    assert result.flip_rate == 0.02
    assert all(trial.passed == (trial.alpha <= result.alpha) for trial in result.tried)
    assert wrapped.spec.alpha == wrapped.module[0].alpha == result.alpha


def test_divergence_is_the_mean_kl_from_the_base():
    from scipy import stats

    generator = torch.Generator().manual_seed(1)
    base = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    members = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    tally = NoiseTally()
    tally.add_logits(base[:3], members[:, :3])
    tally.add_logits(base[3:], members[:, 3:])
    expected = stats.entropy(base.softmax(-1), members.softmax(-1), axis=-1)
    trial = tally.judge(0.5, NoiseLimits())
    assert trial.divergence == pytest.approx(expected.mean())
    assert trial.flip_rate == pytest.approx((members.argmax(-1) != base.argmax(-1)).double().mean().item())
    assert not trial.passed


@pytest.mark.parametrize("name", AUTO)
def test_values_move_by_at_most_their_limit(name):
    base, x = mlp(), torch.randn(200, 4, dtype=torch.float64)
    wrapped = AUTO[name](base)
    result = fit_noise(wrapped, [x], limits=NoiseLimits(change=0.05))
    distances = wrapped.forecast(x).members - base(x)
    change = (distances.square().mean() / base(x).square().mean()).sqrt().item()
    assert change == pytest.approx(result.change, rel=1e-6)
    # Dropout drops whole features of a small network one by one: its changes are steps.
    assert (0.01 if name == "bernoulli" else 0.045) < change <= 0.05
    assert not wrapped.spec.seeks_noise


@pytest.mark.parametrize("name", AUTO)
def test_a_found_size_is_saved_and_loaded(tmp_path, name):
    base, x = mlp(), torch.randn(50, 4, dtype=torch.float64)
    wrapped = AUTO[name](base)
    fit_noise(wrapped, [x])
    again = selfdoubt.load(selfdoubt.save(wrapped, tmp_path), base)
    assert again.spec == wrapped.spec
    assert torch.equal(again.forecast(x).members, wrapped.forecast(x).members)


@pytest.mark.parametrize("name", AUTO)
def test_before_the_search_auto_is_a_small_size(tmp_path, name):
    small = {
        "vote": vote.Wrapper(weight_noise=START_NOISE),
        "vote-low-rank": vote.Wrapper(weight_noise=START_NOISE, rank=2),
        "normal": sample.Wrapper(distribution=sample.Normal(sample.START_STD)),
        "bernoulli": sample.Wrapper(distribution=sample.Bernoulli(sample.START_DROPOUT), param_filter=".*"),
    }
    base, x = mlp(), torch.randn(9, 4, dtype=torch.float64)
    wrapped = AUTO[name](base)
    assert torch.equal(wrapped.forecast(x).members, small[name](base).forecast(x).members)
    assert selfdoubt.load(selfdoubt.save(wrapped, tmp_path), base).spec == AUTO[name]


def relative_sizes(wrapped, base, run):
    """For each leaf, the root mean square of all voters' deviations relative to the leaf's output without its bias."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        base.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name in wrapped.leaf_names
    ]
    run(base)
    for hook in hooks:
        hook.remove()
    sizes = []
    for name in wrapped.leaf_names:
        x, leaf = seen[name], base.get_submodule(name)
        bias = getattr(leaf, "bias", None)
        y = leaf(x)
        without = y if bias is None else y - (bias[:, None, None] if y.ndim == 4 else bias)
        deltas = [
            voter(wrapped, base, m).get_submodule(name)(x) - y for m in range(wrapped.spec.n_voters)
        ]  # alpha is 1
        sizes.append((torch.stack(deltas).square().mean() / without.square().mean()).sqrt().item())
    return sizes


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("model", ["mlp", "cnn", "llama", "gpt2"])
def test_the_size_of_deviations_relative_to_outputs_is_the_one_that_was_asked_for(model, rank):
    base, x = {
        "mlp": (mlp(), torch.randn(30, 4, dtype=torch.float64)),
        "cnn": (cnn(), torch.randn(6, 3, 5, 5, dtype=torch.float64)),
    }.get(model) or (causal(model), torch.tensor(prompts(9, 9)))
    name = {"mlp": ".*", "cnn": "0|4", "llama": "proj|embed_tokens", "gpt2": "c_attn|wte|ln_1"}[model]
    wrapped = vote.Wrapper(n_voters=3, rank=rank, weight_noise=0.3, param_filter=name)(base)

    def run(plain):
        with torch.no_grad():
            plain(x)

    before = relative_sizes(wrapped, base, run)
    scale_to_outputs(wrapped, run, 0.07)
    assert relative_sizes(wrapped, base, run) == pytest.approx([0.07] * len(wrapped.leaf_names), rel=1e-4)
    assert before != pytest.approx([0.07] * len(before), rel=0.1)


def test_open_deviations_of_a_leaf_without_a_kernel_are_as_large_as_its_weights():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 20, batch_first=True, dtype=torch.float64)
            self.head = nn.Linear(20, 2, dtype=torch.float64)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    base = Recurrent()
    wrapped = vote.Wrapper(weight_noise="auto")(base)
    result = fit_noise(wrapped, [torch.randn(5, 4, 3, dtype=torch.float64)], limits=NoiseLimits(change=0.1))
    assert 0.05 < result.change <= 0.1
    spread = wrapped.module.rnn.deviations["weight_hh_l0"].std() / base.rnn.weight_hh_l0.std()
    assert spread.item() == pytest.approx(1.0, rel=0.2)


def test_opposite_voters_mean_the_base_to_first_order():
    base, x = mlp(), torch.randn(40, 4, dtype=torch.float64)
    for rank in (None, 2):
        wrapped = vote.Wrapper(n_voters=5, antithetic=True, rank=rank, weight_noise=1.0)(base)
        for leaf in (wrapped.module[0], wrapped.module[2]):
            for deviation in full_deviations(leaf).values():
                assert_close(deviation[1], -deviation[0])
                assert_close(deviation[3], -deviation[2])
                assert (deviation[4] + deviation[3]).abs().max() > 1e-3
        errors = []
        for alpha in (1e-2, 5e-3):
            set_noise(wrapped, alpha)
            pairs = wrapped.forecast(x).members[:4]
            errors.append((pairs.mean(0) - base(x)).abs().max().item())
            assert (pairs[0] - base(x)).abs().max() > 20 * errors[-1]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)  # second order


def test_first_voters_of_pairs_are_those_without_pairs():
    base = mlp()
    alone, paired = (vote.Wrapper(n_voters=4, antithetic=a)(base).module[0].deviations["weight"] for a in (False, True))
    assert torch.equal(alone[::2], paired[::2])


@pytest.mark.parametrize("settings", [{"antithetic": True}, {"weight_noise": "auto"}])
def test_weights_that_are_drawn_again_have_neither_opposites_nor_a_size(settings):
    with pytest.raises(ConfigError, match="finetune=False re-draws whole weights, which have neither opposites"):
        vote.Wrapper(finetune=False, **settings)


@pytest.mark.parametrize("value", ["large", -1.0, None, True])
def test_other_sizes_are_refused(value):
    with pytest.raises(LoadError, match=r"weight_noise must be a finite number at least 0 .*, or 'auto', found"):
        storage.from_json({"method": "vote", "weight_noise": value})
    with pytest.raises(LoadError, match=r"std must be a finite number above 0 .*, or 'auto', found"):
        storage.from_json({"method": "sample", "distribution": {"name": "Normal", "std": value}})


def test_the_base_runs_alone_and_members_come_back():
    base, x = mlp(), torch.randn(7, 4, dtype=torch.float64)
    for spec in (vote.Wrapper(), sample.Wrapper(), vote.Wrapper(answer_from="base")):
        wrapped = spec(base)
        before = wrapped.forecast(x).members
        with run_base(wrapped) as plain:
            assert torch.equal(plain(x), base(x))
            assert torch.equal(plain(x[:3]), base(x[:3]))
        assert torch.equal(wrapped.forecast(x).members, before)
    both = vote.Wrapper()(sculpt.Wrapper()(base))
    with run_base(both) as plain:
        assert torch.equal(plain(x), base(x))
    assert not both.module.call.scales


def test_nothing_to_search():
    with pytest.raises(WrapError, match="only voters and samples have noise whose size can be searched"):
        fit_noise(sculpt.Wrapper()(mlp()), [torch.randn(3, 4, dtype=torch.float64)])
    with pytest.raises(ConfigError, match="deviations of zero have no size to scale"):
        scale_to_outputs(vote.Wrapper(weight_noise=0.0)(mlp()), lambda base: base(torch.ones(2, 4).double()))
    with pytest.raises(ConfigError, match=r"flip_rate must be above 0, got 0; try flip_rate=0\.01"):
        NoiseLimits(flip_rate=0)


def test_a_model_that_no_size_leaves_as_it_is_gets_the_smallest():
    wrapped = vote.Wrapper(weight_noise="auto")(mlp())
    with pytest.raises(ConfigError, match=r"even noise of size 0\.5 changes the answers .* use a wider dtype"):
        fit_noise(wrapped, [torch.randn(9, 4, dtype=torch.float64)], low=0.5)
    assert isinstance(wrapped.spec, vote.Wrapper)
    assert wrapped.spec.alpha == wrapped.module[0].alpha == 0.5


def test_outputs_that_are_not_finite_are_an_error():
    wrapped = vote.Wrapper()(mlp())
    with pytest.raises(NonFiniteError, match="an output of the model is NaN or infinite"):
        fit_noise(wrapped, [torch.full((2, 4), math.nan, dtype=torch.float64)])


def test_batches_may_be_tensors_tuples_and_mappings():
    base = causal("llama")
    ids = torch.tensor(prompts(6, 6))
    spec = vote.Wrapper(n_voters=2, weight_noise="auto", rank=2)
    options = {"limits": NoiseLimits(flip_rate=0.2, divergence=0.05), "steps": 3}
    results = [
        fit_noise(spec(base), [batch], **options) for batch in (ids, (ids,), {"input_ids": ids, "use_cache": False})
    ]
    assert results[0].alpha == results[1].alpha == results[2].alpha
    assert results[0].divergence > 0


def test_a_fixed_size_is_searched_without_scaling_deviations():
    wrapped = vote.Wrapper(weight_noise=0.2)(mlp())
    before = {n: p.clone() for n, p in wrapped.named_parameters()}
    result = fit_noise(wrapped, [torch.randn(50, 4, dtype=torch.float64)])
    assert all(torch.equal(p, before[n]) for n, p in wrapped.named_parameters())
    assert wrapped.spec == replace(vote.Wrapper(weight_noise=0.2), alpha=result.alpha)
