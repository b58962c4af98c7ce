"""Laws that hold for any numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import selfdoubt
from selfdoubt import risk, sample, sculpt, vote
from selfdoubt.forecast import Forecast
from selfdoubt.rows import expand, unfold
from selfdoubt.tree import iter_tensors, tree_map
from tests.strategies import logits, members, seeds, trees
from tests.zoo import mlp

SCORES = (risk.total, risk.aleatoric, risk.epistemic)


def batch(seed, n=6):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(logits())
def test_total_is_aleatoric_plus_epistemic(x):
    assert_close(risk.total(x), risk.aleatoric(x) + risk.epistemic(x), rtol=0, atol=1e-9)


@given(logits())
def test_doubt_stays_within_its_bounds(x):
    n_members, _, classes = x.shape
    total, aleatoric, epistemic = (f(x) for f in SCORES)
    tiny = 1e-9
    for score, most in ((total, classes), (aleatoric, classes), (epistemic, min(n_members, classes))):
        assert (score >= -tiny).all()
        assert (score <= math.log(most) + tiny).all()
    chosen = x.mean(0).argmax(-1)
    scores = risk.token_scores(x, chosen)
    assert (scores.logprob <= tiny).all()
    assert ((scores.disagreement >= 0) & (scores.disagreement <= 1)).all()
    assert ((scores.spread >= 0) & (scores.spread <= 0.5 + tiny)).all()


@given(logits(min_members=2), st.randoms())
def test_permuting_members_changes_nothing(x, random):
    order = random.sample(range(len(x)), len(x))
    for function in (*SCORES, risk.mix, lambda y: Forecast(y).std, lambda y: Forecast(y).mean):
        assert_close(function(x[order]), function(x), rtol=1e-9, atol=1e-9)


@given(logits(), st.floats(-100, 100))
def test_a_constant_added_to_a_members_logits_changes_no_doubt(x, constant):
    shifted = x.clone()
    shifted[0] += constant
    for function in SCORES:
        assert_close(function(shifted), function(x), rtol=1e-7, atol=1e-7)


@given(logits())
def test_members_that_agree_have_no_epistemic_doubt(x):
    same = x[:1].expand(4, -1, -1)
    assert risk.epistemic(same).max() < 1e-12
    assert risk.token_scores(same, same[0].argmax(-1)).disagreement.max() == 0
    assert_close(risk.mix(same), x[0], rtol=1e-9, atol=1e-9)


@given(logits())
def test_repeating_every_member_changes_nothing(x):
    for function in SCORES:
        assert_close(function(torch.cat([x, x])), function(x), rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9))
def test_percentiles_are_shares_and_grow_with_the_risk(reference, values):
    found = [risk.percentile(v, sorted(reference)) for v in sorted(values)]
    assert all(0 <= p <= 1 for p in found)
    assert found == sorted(found)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_the_percentiles_of_the_reference_itself_average_to_a_half(reference):
    found = [risk.percentile(v, sorted(reference)) for v in reference]
    assert sum(found) / len(found) == pytest.approx(0.5)


@given(trees())
def test_trees_round_trip(tree):
    assert same(tree_map(lambda x: x, tree), tree)
    doubled = tree_map(lambda x: 2 * x if isinstance(x, torch.Tensor) else x, tree)
    assert all(torch.equal(d, 2 * t) for d, t in zip(iter_tensors(doubled), iter_tensors(tree), strict=True))
    assert same(tree_map(lambda x, y: y, tree, doubled), doubled)
    assert len(list(iter_tensors(tree_map(lambda x, y: y, tree, None)))) == 0


def same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(seeds, members)
def test_unfolding_undoes_expanding(seed, n):
    x = batch(seed)
    assert torch.equal(unfold(expand(x, n), n), x.expand(n, *x.shape))


@given(seeds, st.sampled_from([None, 1, 3]))
def test_unchanged_voters_are_bit_for_bit_the_base_model(seed, rank):
    base, x = mlp(), batch(seed)
    one = vote.Wrapper(n_voters=1, weight_noise=0.0, rank=rank)(base)
    assert torch.equal(one(x), base(x))
    many = vote.Wrapper(n_voters=4, weight_noise=0.0, rank=rank)(base).forecast(x).members
    assert_close(many, base(x).expand_as(many), rtol=0, atol=1e-14)


@given(seeds, members)
def test_one_row_is_what_it_is_in_a_batch(seed, n):
    x = batch(seed, 3)
    for spec in (vote.Wrapper(n_voters=n, seed=seed), sample.Wrapper(n_samples=n, seed=seed), sculpt.Wrapper()):
        wrapped = spec(mlp())
        for whole, first, rest in zip(*(wrapped(p, return_risk=True) for p in (x, x[:1], x[1:])), strict=True):
            assert_close(whole, torch.cat([first, rest]), rtol=0, atol=1e-12)


@given(seeds)
def test_the_mean_and_the_spread_are_those_of_the_members(seed):
    for spec in (vote.Wrapper(seed=seed, answer_from="mean"), sample.Wrapper(seed=seed, answer_from="mean")):
        wrapped, x = spec(mlp()), batch(seed)
        y, spread = wrapped(x, return_risk=True)
        found = wrapped.forecast(x).members
        assert_close(y, found.mean(0))
        assert_close(spread, found.std(0, correction=0))


@given(seeds)
def test_same_seed_same_members_other_seed_others(seed):
    base, x = mlp(), batch(0)
    for kind in (vote.Wrapper, sample.Wrapper):
        first, again, other = (kind(seed=s)(base).forecast(x).members for s in (seed, seed, seed + 1))
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)


@given(seeds, st.integers(2, 5))
def test_a_voters_rows_move_only_its_own_deviations(seed, n):
    wrapped = vote.Wrapper(n_voters=n, seed=seed)(mlp())
    m = seed % n
    y = wrapped(batch(seed, 2 * n), training=True)
    y[2 * m : 2 * m + 2].square().sum().backward()
    for parameter in (p for p in wrapped.parameters() if p.requires_grad):
        others = [i for i in range(n) if i != m]
        assert torch.count_nonzero(parameter.grad[others]) == 0
        assert torch.count_nonzero(parameter.grad[m]) > 0


@given(seeds, st.sampled_from(["0", "2.weight", "bias"]))
def test_unmatched_parameters_are_bit_for_bit_the_base_models(seed, pattern):
    base = mlp()
    before = {n: p.clone() for n, p in base.named_parameters()}
    wrapped = vote.Wrapper(param_filter=pattern, seed=seed)(base)
    optimizer = torch.optim.SGD(filter(lambda p: p.requires_grad, wrapped.parameters()), lr=0.1)
    wrapped(batch(seed), training=True).square().sum().backward()
    optimizer.step()
    found = {n.removeprefix("module.").replace(".leaf.", "."): p for n, p in wrapped.named_parameters()}
    for name, value in before.items():
        assert torch.equal(found[name], value)
        assert torch.equal(base.get_parameter(name), value)


@given(seeds, st.sampled_from(["vote", "sample", "sculpt", "both"]))
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, seed, name):
    kinds = {"vote": [vote], "sample": [sample], "sculpt": [sculpt], "both": [sculpt, vote]}
    base = wrapped = mlp()
    for kind in kinds[name]:
        wrapped = kind.Wrapper(seed=seed)(wrapped)
    folder = selfdoubt.save(wrapped, tmp_path_factory.mktemp("saved"))
    again, x = selfdoubt.load(folder, base), batch(seed)
    for found, expected in zip(again(x, return_risk=True), wrapped(x, return_risk=True), strict=True):
        assert torch.equal(found, expected)


@given(logits(min_members=3), st.randoms())
def test_permuting_members_around_a_base_changes_nothing(x, random):
    order = random.sample(range(1, len(x)), len(x) - 1)
    mixed = torch.cat([x[:1], x[order]])
    chosen = x[0].argmax(-1)
    for ours, theirs in zip(
        risk.token_scores(x, chosen, has_base=True), risk.token_scores(mixed, chosen, has_base=True), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    one, other = (Forecast(rows[1:], kind="logits", base=rows[0]) for rows in (x, mixed))
    for name in ("mean", "std", "total", "aleatoric", "epistemic"):
        assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-9)
    assert torch.equal(one.mean, x[0])


@given(seeds, st.sampled_from([None, 1, 3]))
def test_a_voter_of_zero_beside_the_base_is_the_base_without_risk(seed, rank):
    base, x = mlp(), batch(seed)
    wrapped = vote.Wrapper(n_voters=1, weight_noise=0.0, rank=rank, answer_from="base")(base)
    y, spread = wrapped(x, return_risk=True)
    assert_close(y, base(x), rtol=0, atol=1e-14)
    assert_close(spread, torch.zeros_like(y), rtol=0, atol=1e-14)


@given(seeds, st.integers(1, 5))
def test_the_base_answers_and_the_spread_is_around_it(seed, n):
    base, x = mlp(), batch(seed)
    for spec in (vote.Wrapper(n_voters=n, seed=seed), sample.Wrapper(n_samples=n, seed=seed)):
        wrapped = replace(spec, answer_from="base")(base)
        y, spread = wrapped(x, return_risk=True, training=False)
        found = spec(base).forecast(x).members
        assert torch.equal(y, base(expand(x, n + 1))[: len(x)])
        assert_close(spread, (found - base(x)).square().mean(0).sqrt())
