"""Laws of decisions from predictions and their risk, for any numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt import interpret
from selfdoubt.interpret import ConformalIntervals, ConformalSets
from tests.strategies import seeds

levels = st.floats(0.05, 0.95)
sizes = st.integers(1, 30)
stds = st.sampled_from([0.0, 0.3, 1.0, 2.5, 30.0])
methods = st.sampled_from(["lac", "aps"])
distributions = st.sampled_from(["normal", "laplace"])


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probabilities(rows: int, classes: int, seed: int) -> torch.Tensor:
    return (3 * normal(rows, classes, seed=seed)).softmax(-1)


def enough(n: int, level: float) -> bool:
    return math.ceil((n + 1) * level - 1e-9) <= n


@given(sizes, levels, seeds, st.booleans())
def test_of_n_rows_and_one_more_exactly_k_orders_cover_it(n, level, seed, scaled):
    """Exchangeability: of the n + 1 ways to leave one row out, k = ceil((n + 1) level) cover it, by counting."""
    y, target, risk = normal(n + 1, seed=seed), normal(n + 1, seed=seed + 1), normal(n + 1, seed=seed + 2).exp()
    if not enough(n, level):
        return
    covered = 0
    for i in range(n + 1):
        others = torch.arange(n + 1) != i
        scale = (risk[others], risk[i : i + 1]) if scaled else (None, None)
        intervals = ConformalIntervals.fit(y[others], target[others], scale[0], level=level)
        covered += int(intervals.predict(y[i : i + 1], scale[1]).contains(target[i : i + 1]))
    assert covered == math.ceil((n + 1) * level - 1e-9)


@given(sizes, levels, seeds, methods)
def test_of_n_rows_and_one_more_at_least_k_sets_hold_its_class(n, level, seed, method):
    probs = probabilities(n + 1, 4, seed)
    labels = torch.randint(4, (n + 1,), generator=torch.Generator().manual_seed(seed))
    if not enough(n, level):
        return
    held = 0
    for i in range(n + 1):
        others = torch.arange(n + 1) != i
        sets = ConformalSets.fit(probs[others], labels[others], level=level, method=method)
        held += int(sets.predict(probs[i])[labels[i]])
    assert held >= math.ceil((n + 1) * level - 1e-9)


@given(levels, levels, seeds)
def test_a_higher_level_has_wider_intervals_and_larger_sets(one, other, seed):
    low, high = sorted((one, other))
    y, target = normal(20, seed=seed), normal(20, seed=seed + 1)
    narrow, wide = (ConformalIntervals.fit(y, target, level=level).quantiles[0] for level in (low, high))
    assert narrow <= wide
    probs, labels = probabilities(20, 3, seed), torch.arange(20) % 3
    for method in ("lac", "aps"):
        few, many = (ConformalSets.fit(probs, labels, level=level, method=method) for level in (low, high))
        assert (few.predict(probs) <= many.predict(probs)).all()
    for distribution in ("normal", "laplace"):
        small, large = (
            interpret.parametric_interval(y, target.abs(), level=level, distribution=distribution)
            for level in (low, high)
        )
        assert (small.width <= large.width + 1e-12).all()


@given(seeds, seeds)
def test_the_order_of_calibration_rows_changes_nothing(seed, shuffle):
    order = torch.randperm(20, generator=torch.Generator().manual_seed(shuffle))
    y, target, risk = normal(20, seed=seed), normal(20, seed=seed + 1), normal(20, seed=seed + 2).exp()
    assert ConformalIntervals.fit(y[order], target[order], risk[order]) == ConformalIntervals.fit(y, target, risk)
    probs, labels = probabilities(20, 3, seed), torch.arange(20) % 3
    for method in ("lac", "aps"):
        ours = ConformalSets.fit(probs[order], labels[order], method=method)
        assert ours == ConformalSets.fit(probs, labels, method=method)


@given(seeds, st.sampled_from([0.5, 4.0, 1024.0]))
def test_units_do_not_matter(seed, unit):
    y, target, risk = normal(20, seed=seed), normal(20, seed=seed + 1), normal(20, seed=seed + 2).exp()
    plain, other = (ConformalIntervals.fit(c * y, c * target) for c in (1.0, unit))
    assert other.quantiles[0] == unit * plain.quantiles[0]
    for scale in (risk, unit * risk):  # a risk in any unit gives the same intervals
        interval = ConformalIntervals.fit(y, target, scale).predict(y, scale)
        torch.testing.assert_close(interval.high, ConformalIntervals.fit(y, target, risk).predict(y, risk).high)


@given(seeds, seeds, st.integers(3, 6), methods)
def test_the_order_of_classes_changes_nothing(seed, shuffle, classes, method):
    order = torch.randperm(classes, generator=torch.Generator().manual_seed(shuffle))
    probs = probabilities(20, classes, seed)
    sets = ConformalSets(method, 0.7, classes=classes, level=0.9, n=99)
    assert torch.equal(sets.predict(probs[:, order]), sets.predict(probs)[:, order])
    torch.testing.assert_close(interpret.error_probability(probs[:, order]), interpret.error_probability(probs))
    logits, std = probs[:4].log(), 2 * probabilities(4, classes, seed + 1)
    for how in ("exact", "mean_field"):
        p = interpret.average_noise(logits, std, method=how)
        torch.testing.assert_close(p.sum(-1), torch.ones(4).double())
        torch.testing.assert_close(interpret.average_noise(logits[:, order], std[:, order], method=how), p[:, order])
        torch.testing.assert_close(interpret.average_noise(logits + 3, std, method=how), p)


@given(seeds, stds, stds)
def test_more_noise_is_more_doubt(seed, one, other):
    low, high = sorted((one, other))
    logits = 3 * normal(5, 3, seed=seed)
    for call in (
        lambda std: interpret.error_probability(interpret.average_noise(logits, torch.full_like(logits, std))),
        lambda std: interpret.binary_error_probability(
            interpret.average_binary_noise(logits, torch.full_like(logits, std))
        ),
        lambda std: interpret.wrong_side_probability(logits, torch.full_like(logits, std), 0.5),
    ):
        assert (call(low) <= call(high) + 1e-6).all()


@given(seeds, stds, distributions)
def test_both_sides_of_a_threshold_are_all_there_is(seed, std, distribution):
    y = normal(9, seed=seed)
    spread = torch.full_like(y, std)
    above = interpret.probability_above(y, spread, 0.3, distribution=distribution)
    below = interpret.probability_above(-y, spread, -0.3, distribution=distribution)
    torch.testing.assert_close(above + below, torch.ones(9).double())
    wrong = interpret.wrong_side_probability(y, spread, 0.3, distribution=distribution)
    torch.testing.assert_close(wrong, torch.minimum(above, below))
    logistic = interpret.average_binary_noise(y, spread) + interpret.average_binary_noise(-y, spread)
    torch.testing.assert_close(logistic, torch.ones(9).double())


@given(seeds, st.integers(2, 5), st.floats(0.01, 0.9))
def test_with_costs_of_0_and_1_it_is_chows_rule(seed, classes, reject_cost):
    probs = probabilities(10, classes, seed)
    decision = interpret.decide(probs, reject_cost=reject_cost)
    rejects = 1 - probs.amax(-1) > reject_cost
    assert torch.equal(decision.rejected, rejects)
    assert torch.equal(decision.choice[~rejects], probs.argmax(-1)[~rejects])
    torch.testing.assert_close(decision.cost, (1 - probs.amax(-1)).clamp_max(reject_cost))


@given(seeds, st.integers(2, 4), st.integers(1, 4), st.sampled_from([0.5, 2.0, 64.0]))
def test_the_unit_of_costs_and_costs_that_no_choice_changes_do_not_matter(seed, classes, choices, unit):
    probs, costs = probabilities(10, classes, seed), normal(classes, choices, seed=seed + 1)
    plain = interpret.decide(probs, costs, reject_cost=0.2)
    other = interpret.decide(probs, unit * costs, reject_cost=unit * 0.2)
    assert torch.equal(other.choice, plain.choice)
    torch.testing.assert_close(other.cost, unit * plain.cost)
    fixed = normal(classes, 1, seed=seed + 2)
    moved, still = interpret.decide(probs, costs + fixed), interpret.decide(probs, costs)
    assert torch.equal(moved.choice, still.choice)
    torch.testing.assert_close(moved.cost, still.cost + (probs @ fixed)[:, 0])


@pytest.mark.parametrize("reject_cost", [0.1, 0.5])
@given(seed=seeds)
def test_a_dearer_rejection_is_rarer(reject_cost, seed):
    probs = probabilities(10, 3, seed)
    cheap, dear = (interpret.decide(probs, reject_cost=c) for c in (reject_cost, 1.5 * reject_cost))
    assert (dear.rejected <= cheap.rejected).all()
    assert (cheap.cost <= dear.cost + 1e-12).all()
