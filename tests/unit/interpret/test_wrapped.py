"""From the outputs of wrapped models to decisions: every wrapper's prediction and forecast fit the functions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from selfdoubt import density, interpret, sample, sculpt, vote
from selfdoubt.interpret import ConformalIntervals, ConformalSets


def build_net(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, outputs)).double()


x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSIFIERS = {
    "vote": lambda net: vote.Wrapper(n_voters=3, output="logits", answer_from="mean")(net),
    "vote of the base": lambda net: vote.Wrapper(n_voters=3, output="logits", answer_from="base")(net),
    "sample": lambda net: sample.Wrapper(n_samples=3, output="logits", answer_from="mean")(net),
    "vote around a sculpt": lambda net: vote.Wrapper(n_voters=3, output="logits", answer_from="mean")(
        sculpt.Wrapper()(net)
    ),
}
REGRESSIONS = {
    "vote": lambda net: vote.Wrapper(n_voters=3)(net),
    "sample": lambda net: sample.Wrapper(n_samples=3)(net),
    "sculpt": lambda net: sculpt.Wrapper()(net),
    "vote around a sculpt": lambda net: vote.Wrapper(n_voters=3)(sculpt.Wrapper()(net)),
    "vote around a density": lambda net: vote.Wrapper(n_voters=3)(density.Wrapper()(net)),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_gives_probabilities_decisions_and_sets(name):
    wrapped = CLASSIFIERS[name](build_net(3))
    forecast = wrapped.forecast(x)
    probs = interpret.class_probabilities(forecast)
    answers = forecast.mean[None] if name == "vote of the base" else forecast.members
    if "sculpt" in name:
        noise = (forecast.scale_std * torch.randn(4000, *answers.shape).double() + answers).softmax(-1).mean((0, 1))
        # A mean of 12,000 numbers in [0, 1]: 90 of them are within 0.05 but for a chance of 180 exp(-60) (Hoeffding).
        assert (probs - noise).abs().max() < 0.05
    else:
        torch.testing.assert_close(probs, answers.softmax(-1).mean(0))
        y, _ = wrapped.predict(x)
        torch.testing.assert_close(interpret.error_probability(y.softmax(-1)), 1 - probs.amax(-1))
    decision = interpret.decide(probs, reject_cost=0.5)
    assert torch.equal(decision.rejected, interpret.error_probability(probs) > 0.5)
    sets = ConformalSets.fit(probs, probs.argmax(-1))
    assert sets.predict(probs).gather(-1, probs.argmax(-1, keepdim=True)).all()


@pytest.mark.parametrize("name", REGRESSIONS)
def test_a_regression_gives_intervals(name):
    wrapped = REGRESSIONS[name](build_net(2))
    mean, risk = wrapped.predict(x)
    target = mean.detach() + torch.randn(30, 2, dtype=torch.float64)
    intervals = ConformalIntervals.fit(mean, target, risk, level=0.8)
    covered = intervals.predict(mean, risk).contains(target)
    assert covered.sum(0).tolist() == [25, 25]  # ceil(31 * 0.8) scores are not above the quantile
    forecast = wrapped.forecast(x)
    low, high = interpret.parametric_interval(forecast.mean, forecast.total)
    assert (low < high).all()
    assert (interpret.wrong_side_probability(forecast.mean, forecast.total, 0.0) <= 0.5).all()


def draw(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(n, 2, generator=generator)
    noise = (0.2 + 2 * inputs[:, 1:]) * torch.randn(n, 1, generator=generator)
    return inputs, 4 * inputs[:, :1] + noise


def test_intervals_of_a_trained_sculpt_cover_90_percent_and_follow_the_noise():
    inputs, target = draw(400, 1000)
    wrapped = sculpt.Wrapper()(nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))).train()
    optimizer = torch.optim.Adam(wrapped.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        sculpt.Normal.nll(wrapped(inputs, return_risk=True), target).mean().backward()
        optimizer.step()
    coverages = []
    for seed in range(50):
        calibration, truth = draw(199, 2 * seed)
        intervals = ConformalIntervals.fit(wrapped.predict(calibration).mean, truth, wrapped.predict(calibration).risk)
        new, new_truth = draw(500, 2 * seed + 1)
        interval = intervals.predict(*wrapped.predict(new))
        coverages.append(interval.contains(new_truth).double().mean().item())
    # For any model, however well trained: a mean of 50 with a standard deviation of 0.0036. False alarm below 1e-14.
    assert 0.87 < sum(coverages) / 50 < 0.93
    width = interval.width[:, 0]
    assert width[new[:, 1] > 0.8].mean() > 2 * width[new[:, 1] < 0.2].mean()
