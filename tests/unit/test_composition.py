import copy
import pickle
import threading

import pytest
import torch
from scipy import stats
from torch import nn
from torch.testing import assert_close

from selfdoubt import Prediction, density, sample, sculpt, vote
from selfdoubt.errors import NonFiniteError, WrapError
from selfdoubt.members import count_members, count_rows
from selfdoubt.random_numbers import uniforms
from tests.zoo import cnn, mlp

#: Probability of a false alarm of each stochastic test.
FALSE_ALARM = 1e-10


def inputs(n=5, seed=0):
    return torch.randn(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def product(answer_from="mean", base=None):
    inner = sample.Wrapper(n_samples=4, distribution=sample.Normal(0.3), param_filter=".")(
        mlp() if base is None else base
    )
    return vote.Wrapper(n_voters=3, weight_noise=0.5, answer_from=answer_from)(inner)


@pytest.mark.parametrize("answer_from", ["mean", "base"])
def test_samples_inside_voters_against_one_voter_at_a_time(answer_from):
    base = mlp()
    wrapped = product(answer_from, base)
    assert (count_members(wrapped), count_rows(wrapped)) == (12, 12 + (answer_from == "base"))
    x = inputs()
    forecast = wrapped.forecast(x)
    noises = [m for m in wrapped.modules() if isinstance(m, sample.NoisyLeaf)]
    for member in range(12):
        alone = copy.deepcopy(base)
        hidden = x
        for i, noisy in zip((0, 2), noises, strict=True):
            uniform = uniforms(noisy.key, 12, hidden.shape[1], hidden.device)
            noise = noisy.distribution.noise(noisy.parameter, uniform, soft=False)[member].to(hidden.dtype)
            deviations, leaf = noisy.leaf.deviations, alone[i]
            leaf.weight.data += deviations["weight"][member // 4]
            leaf.bias.data += deviations["bias"][member // 4]
            hidden = leaf(hidden * noise)
            hidden = torch.tanh(hidden) if i == 0 else hidden
        assert_close(forecast.members[member], hidden)
    if answer_from == "base":
        assert torch.equal(wrapped(x), base(x))
    else:
        assert_close(wrapped(x), forecast.members.mean(0))


@pytest.mark.parametrize(
    "model", [cnn, lambda: nn.Sequential(nn.GRU(4, 6, batch_first=True)).double()], ids=["cnn", "gru"]
)
def test_leaves_without_a_kernel_take_samples_and_a_base_row(model):
    base = model()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64) if model is cnn else torch.randn(2, 3, 4, dtype=torch.float64)
    inner = sample.Wrapper(n_samples=2, distribution=sample.Normal(1e-9))(base)
    wrapped = vote.Wrapper(n_voters=3, answer_from="base")(inner)
    voters = vote.Wrapper(n_voters=3, answer_from="base")(base)
    pairs = zip(_tensors(wrapped.forecast(x)), _tensors(voters.forecast(x)), strict=True)
    for both, alone in pairs:
        assert_close(both.members, alone.members.repeat_interleave(2, 0), atol=1e-7, rtol=0)
        assert torch.equal(both.base, alone.base)


def _tensors(tree):
    return [f for f in (tree if isinstance(tree, tuple) else [tree]) if hasattr(f, "members")]


def test_all_kinds_at_once_by_name():
    inner = density.Wrapper()(sculpt.Wrapper(initial_scale=0.25)(mlp()))
    wrapped = vote.Wrapper(n_voters=3, answer_from="mean", weight_noise=0.5, param_filter="leaf.weight")(inner)
    assert wrapped.forecast(inputs()).density is None  # not fitted
    density.fit(wrapped, [inputs(50, seed) for seed in range(3)])
    forecast = wrapped.forecast(inputs())
    assert_close(forecast.total.square(), forecast.aleatoric.square() + forecast.epistemic.square())
    assert_close(forecast.scale, torch.full((5, 3), 0.25, dtype=torch.float64))
    assert torch.equal(forecast.aleatoric, forecast.scale)
    assert forecast.density.shape == (5,)
    assert wrapped.forecast(inputs() + 30).density.min() > forecast.density.max()


def test_the_variance_of_linear_voters_around_samples_against_its_closed_form():
    """With y = sum_i (w_i + d_i) z_i x_i the variance is sum_i x_i^2 ((w_i^2 + s^2)(1 + n^2) - w_i^2)."""
    voters, samples, noise, size = 40, 500, 0.4, 0.3
    layer = nn.Linear(6, 1, bias=False).double()
    inner = sample.Wrapper(n_samples=samples, distribution=sample.Normal(noise))(nn.Sequential(layer))
    wrapped = vote.Wrapper(n_voters=voters, weight_noise=size, answer_from="mean")(inner)
    x = torch.linspace(-1, 2, 6, dtype=torch.float64)[None]
    weight = layer.weight[0].detach()
    s2 = (size * weight.std(correction=0)) ** 2
    within = (x[0] ** 2 * weight.square() * noise**2).sum() + (x[0] ** 2 * s2 * noise**2).sum()
    between = (x[0] ** 2 * s2).sum()
    members = wrapped.forecast(x).members[:, 0, 0].detach().view(voters, samples)
    # Means of voters: between plus within / samples, over 40 draws; a chi-squared with 39 degrees of freedom.
    means = members.mean(1).var(correction=1) * (voters - 1) / (between + within / samples)
    low, high = stats.chi2(voters - 1).interval(1 - FALSE_ALARM)
    assert low < float(means) < high
    # Variances within a voter: sums of normal products are nearly normal; ten standard errors.
    inside = members.var(1, correction=1).mean()
    assert abs(float(inside / within) - 1) < 10 * (2 / (voters * samples)) ** 0.5 + 10 * (2 * s2.item() / voters) ** 0.5


def test_a_prediction_has_both_parts_in_any_mode():
    wrapped = vote.Wrapper()(mlp()).train()
    prediction = wrapped.predict(inputs())  # five rows do not divide by three voters
    assert isinstance(prediction, Prediction)
    wrapped.eval()
    mean, risk = wrapped(inputs(), return_risk=True)
    assert torch.equal(prediction.mean, mean)
    assert torch.equal(prediction.risk, risk)


@pytest.mark.parametrize("spec", [vote.Wrapper(), sample.Wrapper(), vote.Wrapper(rank=2), vote.Wrapper(finetune=False)])
def test_a_fresh_wrapper_predicts_as_the_model_does(spec):
    base = mlp().train()
    wrapped = spec(base)
    assert not wrapped.training
    assert base.training
    assert torch.equal(wrapped(inputs()), base.eval()(inputs()))
    assert wrapped.predict(inputs()).risk.min() > 0


@pytest.mark.parametrize("spec", [vote.Wrapper(), sample.Wrapper()])
def test_the_mean_answers_after_training(tmp_path, spec):
    wrapped, x = spec(mlp()), inputs(6)
    with torch.no_grad():
        wrapped(x, training=True)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(x, training=True).square().sum().backward()
    assert wrapped.answers_from_base  # nothing has learnt from the gradients yet
    optimizer.step()
    assert not wrapped.answers_from_base
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(twin(x), wrapped(x))
        assert not twin.answers_from_base
    assert_close(wrapped(x), wrapped.forecast(x).members.mean(0))


def test_loaded_weights_are_trained_ones_if_they_differ():
    wrapped, other = vote.Wrapper()(mlp()), vote.Wrapper()(mlp())
    other.load_state_dict(wrapped.state_dict())
    assert other.answers_from_base == (mlp()[0].weight[0, 0] == mlp()[0].weight[0, 0])
    state = {name: value + 1 for name, value in wrapped.state_dict().items()}
    other.load_state_dict(state)
    assert not other.answers_from_base


def test_an_optimizer_step_trains_whatever_the_mode_was():
    wrapped = vote.Wrapper(answer_from="mean")(mlp())
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad])
    wrapped(inputs()).square().sum().backward()
    assert not wrapped.is_trained
    optimizer.step()
    assert wrapped.is_trained


OPTIMIZERS = {
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "spec", [vote.Wrapper(), sample.Wrapper(), vote.Wrapper(rank=2)], ids=["vote", "sample", "rank"]
)
def test_a_step_of_any_optimizer_trains(spec, optimizer):
    wrapped = spec(mlp()).train()
    step = OPTIMIZERS[optimizer]([p for p in wrapped.parameters() if p.requires_grad])
    wrapped(inputs(6)).square().sum().backward()
    assert wrapped.eval().answers_from_base  # a look between the gradients and the step
    step.step()
    assert not wrapped.answers_from_base


@pytest.mark.parametrize("spec", [vote.Wrapper(), sample.Wrapper()], ids=["vote", "sample"])
def test_writes_past_torch_s_counts_train_and_equal_values_do_not(spec):
    wrapped = spec(mlp())
    wrapped(inputs(6), training=True).square().sum().backward()
    learning = [p for p in wrapped.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in learning:
            p.copy_(p.clone())
    assert wrapped.answers_from_base
    for p in learning:
        p.data.sub_(0.1 * p.grad)
    assert not wrapped.answers_from_base


def test_only_what_makes_the_members_trains_them():
    scale = vote.Wrapper()(sculpt.Wrapper()(mlp()))
    with torch.no_grad():
        next(p for name, p in scale.named_parameters() if ".branch." in name and p.requires_grad).add_(1)
    assert scale.answers_from_base  # a scale has learnt, and no voter
    samples = sample.Wrapper()(mlp())
    with torch.no_grad():
        next(samples.parameters()).add_(1)
    assert samples.answers_from_base  # the model has learnt without noise
    samples(inputs(), training=True)
    with torch.no_grad():
        next(samples.parameters()).add_(1)
    assert not samples.answers_from_base


def test_threads_take_turns():
    wrapped, x = vote.Wrapper(n_voters=3, answer_from="mean")(mlp()), inputs(6)
    expected = wrapped(x, return_risk=True), wrapped(x, training=True)
    failures = []

    def call(training):
        for _ in range(50):
            y = wrapped(x, training=training, return_risk=not training)
            pairs = zip(y, expected[0], strict=True) if not training else [(y, expected[1])]
            if not all(torch.allclose(a, b) for a, b in pairs):
                failures.append(training)

    threads = [threading.Thread(target=call, args=(training,)) for training in (True, False, True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_model_that_calls_its_own_wrapper_is_an_error():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.outer = []

        def forward(self, x):
            return self.layer(x) + (self.outer[0](x) if self.outer else 0)

    wrapped = vote.Wrapper(answer_from="mean")(Calls())
    wrapped.module.outer.append(wrapped)
    with pytest.raises(WrapError, match="called inside its own call"):
        wrapped(torch.ones(3, 4))
    wrapped.module.outer.clear()
    assert wrapped(torch.ones(3, 4)).shape == (3, 4)  # the error leaves no trace


@pytest.mark.parametrize(
    "spec",
    [vote.Wrapper(), vote.Wrapper(answer_from="mean"), sample.Wrapper(), sculpt.Wrapper(), density.Wrapper()],
    ids=["base", "mean", "sample", "sculpt", "density"],
)
def test_a_prediction_that_is_not_a_number_has_no_risk(spec):
    wrapped = spec(mlp())
    if isinstance(spec, density.Wrapper):
        density.fit(wrapped, [inputs(64)])
    x = inputs()
    x[[2, 4], 0] = float("nan")
    assert wrapped(x)[2].isnan().all()  # as the model itself
    with pytest.raises(NonFiniteError, match=rf"^\d+ of \d+ .* are NaN, in row 2 and 1 more of {len(x)}: they have no"):
        wrapped.predict(x)


def test_one_member_has_no_other_to_disagree_with():
    wrapped = density.Wrapper()(mlp())
    density.fit(wrapped, [inputs(64)])
    forecast = wrapped.forecast(inputs())
    assert (forecast.total, forecast.aleatoric, forecast.epistemic, forecast.scale) == (None,) * 4
    assert forecast.density.shape == (len(inputs()),)
    forecast = sculpt.Wrapper()(mlp()).forecast(inputs())
    assert forecast.epistemic is None
    assert torch.equal(forecast.total, forecast.scale)
    assert torch.equal(forecast.aleatoric, forecast.scale)
    alone = vote.Wrapper(1, output="logits", answer_from="mean")(mlp()).forecast(inputs())
    assert alone.epistemic is None
    assert_close(alone.total, alone.aleatoric)


def test_classes_that_cannot_be_have_no_risk():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x).index_fill(1, torch.tensor([1]), float("-inf"))

    for answer_from in ("base", "mean"):
        risk = vote.Wrapper(answer_from=answer_from)(Masked()).predict(torch.ones(2, 4)).risk
        assert risk.isfinite().all()
        assert (risk[:, 1] == 0).all()
        assert (risk[:, [0, 2]] > 0).all()


def test_a_density_around_members_goes_beneath_them():
    wrapped = density.Wrapper()(vote.Wrapper(n_voters=3)(mlp()))
    density.fit(wrapped, [inputs(50)])
    assert isinstance(wrapped.spec, vote.Wrapper)
    assert wrapped.forecast(inputs()).density.shape == (5,)
