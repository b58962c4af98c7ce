"""A base row: equal to the bit to the plain model with as many rows, and other members as they are without it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from selfdoubt import sample, sculpt, vote
from selfdoubt.lm.decode import decode
from selfdoubt.lm.prefill import prefill, run_to_end, teacher_force_in_chunks
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.rows import expand, unfold
from tests.ladder.rungs import looped, stepped
from tests.ladder.test_families import CLOSE, MANY, members
from tests.zoo import FAMILIES, causal, prompts

BASED = {name: replace(wrapper, answer_from="base") for name, wrapper in MANY.items()}


def plain_members(base, ids, following, count):
    """Logits of the plain model at prompts and cached steps, with ``count`` rows for each sequence."""
    rows = HFStepper(base)
    repeated = expand(torch.tensor(ids), count).tolist()
    _, last = prefill(rows, repeated)
    logits = [last.logits, *(rows.step(expand(column, count)).logits for column in following.T)]
    return unfold(torch.stack(logits, 2)[0], count)


@pytest.mark.parametrize("name", BASED)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_row_is_the_plain_model_to_the_bit(family, name):
    base, start = causal(family), prompts(7, 7)
    following = torch.tensor(prompts(4, 4, seed=1))
    wrapped = BASED[name](base)
    count = wrapped.spec.members(training=False)
    assert count == MANY[name].members(training=False) + 1
    with torch.no_grad():
        forecast = wrapped.forecast(input_ids=torch.tensor(start), use_cache=False)["logits"]
        plain = base(input_ids=expand(torch.tensor(start), count), use_cache=False).logits
    assert torch.equal(forecast.base, plain[: len(start)])
    assert torch.equal(forecast.mean, forecast.base)
    steps = stepped(wrapped, start, following)
    assert torch.equal(steps[0], plain_members(base, start, following, count)[0])
    assert (steps[0] - steps[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", BASED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_row_leaves_the_members_as_they_are(family, name):
    base, ids = causal(family), torch.tensor(prompts(8, 8))
    assert_close(members(BASED[name](base), ids), members(MANY[name](base), ids), **CLOSE)


@pytest.mark.parametrize("name", ["vote-full", "vote-everything-low-rank"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_with_a_base_row_against_the_loop(family, name):
    wrapped, ids = BASED[name](causal(family)), torch.tensor(prompts(8, 8))
    slow = looped(wrapped)
    with torch.no_grad():
        ours, theirs = (w.forecast(input_ids=ids, use_cache=False)["logits"] for w in (wrapped, slow))
    assert_close(ours.members, theirs.members, **CLOSE)
    assert_close(ours.base, theirs.base, **CLOSE)


@pytest.mark.parametrize("name", ["vote-low-rank", "sample-bernoulli"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_row_decodes_the_ids_of_generate(family, name):
    base, (prompt,) = causal(family), prompts(6)
    expected = base.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, 6)
    )[0, 6:].tolist()
    stepper = HFStepper(BASED[name](base))
    _, following = prefill(stepper, [prompt])
    events = list(decode(stepper, following, [6], Sampling(max_tokens=12), [0]))
    assert [e.token.id for e in events] == expected
    assert all(e.token.divergence > 0 for e in events)


@pytest.mark.parametrize("name", ["vote-low-rank", "sample-bernoulli"])
def test_scores_of_a_text_with_a_base_row_are_the_plain_models_and_the_members(name):
    base, (prompt, text) = causal("llama"), prompts(6, 5)

    def scored(model):
        stepper = HFStepper(model)
        _, following = prefill(stepper, [prompt])
        return run_to_end(teacher_force_in_chunks(stepper, following, [text], 0))[0]

    triples = zip(scored(BASED[name](base)), scored(base), scored(MANY[name](base)), strict=True)
    for ours, plain, mean in triples:
        assert (ours.logprob, ours.total) == pytest.approx((plain.logprob, plain.total), rel=1e-5)
        names = ("aleatoric", "epistemic", "disagreement", "spread")
        assert [getattr(ours, n) for n in names] == pytest.approx([getattr(mean, n) for n in names], rel=1e-4, abs=1e-9)
        assert plain.divergence is None
        assert mean.divergence is None


def test_hidden_states_and_scales_are_those_of_the_base():
    inner = sculpt.Wrapper(rank=4)(causal("llama"))
    for parameter in inner.module.get_output_embeddings().branch.parameters():
        parameter.data.normal_()
    wrapped, (prompt,) = BASED["vote-full"](inner), prompts(6)
    ours, plain = HFStepper(wrapped, [1]), HFStepper(inner, [1])
    (_, here), (_, there) = prefill(ours, [prompt]), prefill(plain, [prompt])
    assert len(here.logits) == 4
    assert_close(here.states, there.states, **CLOSE)
    assert_close(here.scale, there.scale, **CLOSE)
    mean = HFStepper(copy.deepcopy(MANY["vote-full"](inner)), [1])
    assert (prefill(mean, [prompt])[1].states - here.states).abs().max() > 1e-3
    with torch.no_grad():
        f = wrapped.forecast(input_ids=torch.tensor([prompt]), use_cache=False)["logits"]
        scale = inner(input_ids=torch.tensor([prompt]), use_cache=False, return_risk=True)[1].logits
    around = (f.members - f.base).square().mean(0)
    assert_close(f.std, (around + scale.square()).sqrt(), **CLOSE)


def test_a_base_row_is_not_there_in_training():
    base, ids = causal("llama"), torch.tensor(prompts(5, 5, 5, 5, 5, 5))
    for name in ("vote-full", "sample-bernoulli"):
        wrapped, without = BASED[name](base), MANY[name](base)
        assert wrapped.spec.members(training=True) == without.spec.members(training=True)
        torch.manual_seed(3)
        ours = wrapped(input_ids=ids, training=True).logits
        torch.manual_seed(3)
        assert torch.equal(ours, without(input_ids=ids, training=True).logits)


def test_samples_are_the_same_with_and_without_a_base_row_for_embeddings():
    base = causal("llama")
    spec = sample.Wrapper(n_samples=2, param_filter="embed_tokens")
    ids = torch.tensor(prompts(5, 5))
    assert_close(members(replace(spec, answer_from="base")(base), ids), members(spec(base), ids), **CLOSE)


def test_a_single_voter_disagrees_with_the_base():
    wrapped = vote.Wrapper(n_voters=1, answer_from="base")(causal("llama"))
    ids = torch.tensor(prompts(5))
    with torch.no_grad():
        _, risk = wrapped(input_ids=ids, use_cache=False, return_risk=True)
        forecast = wrapped.forecast(input_ids=ids, use_cache=False)["logits"]
    assert_close(risk.logits, (forecast.members[0] - forecast.base).abs())
    assert risk.logits.max() > 1e-3
