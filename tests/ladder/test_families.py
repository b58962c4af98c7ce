"""Nine model families: one whole plain model per member = a loop per leaf = the batched kernel = cached steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from selfdoubt import sample, sculpt, vote
from selfdoubt.lm.decode import decode
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.stepper import HFStepper
from tests.ladder.rungs import looped, noisy, stepped, voter, whole
from tests.zoo import FAMILIES, causal, prompts

# Norms and softmax of these models run in float32 inside, so rows of different batches agree to its precision.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

VOTES = {
    "full": vote.Wrapper(n_voters=3),
    "low-rank": vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5, alpha=0.7),
    "everything": vote.Wrapper(n_voters=2, param_filter=".*", weight_noise=0.3),
    "everything-low-rank": vote.Wrapper(n_voters=2, param_filter=".*", rank=3, weight_noise=0.3),
}
SAMPLES = {
    "bernoulli": sample.Wrapper(n_samples=4, distribution=sample.Bernoulli(0.2)),
    "normal": sample.Wrapper(n_samples=3, distribution=sample.Normal(0.3)),
    "everything": sample.Wrapper(n_samples=2, param_filter=".*"),
}
MANY = {f"vote-{k}": w for k, w in VOTES.items()} | {f"sample-{k}": w for k, w in SAMPLES.items()}


def alone(wrapped, base, m):
    return (voter if isinstance(wrapped.spec, vote.Wrapper) else noisy)(wrapped, base, m)


def members(wrapped, ids):
    with torch.no_grad():
        return wrapped.forecast(input_ids=ids, use_cache=False)["logits"].members


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("family", FAMILIES)
def test_members_against_one_plain_model_each(family, name, batch):
    base, ids = causal(family), torch.tensor(prompts(*[9] * batch))
    wrapped = MANY[name](base)
    found = members(wrapped, ids)
    assert len(found) == wrapped.spec.members(training=False)
    for m, logits in enumerate(found):
        with torch.no_grad():
            assert_close(logits, alone(wrapped, base, m)(input_ids=ids).logits, **CLOSE)
    assert (found[0] - found[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", VOTES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_against_the_loop(family, name):
    wrapped, ids = VOTES[name](causal(family)), torch.tensor(prompts(8, 8))
    assert_close(members(wrapped, ids), members(looped(wrapped), ids), **CLOSE)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("name", ["vote-full", "vote-low-rank", "sample-bernoulli", "sample-normal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_against_one_plain_model_each(family, name, batch):
    base, start = causal(family), prompts(*[6] * batch)
    following = torch.tensor(prompts(*[5] * batch, seed=1))
    wrapped = MANY[name](base)
    for m, logits in enumerate(stepped(wrapped, start, following)):
        plain = alone(wrapped, base, m)
        for b in range(batch):
            assert_close(logits[b], whole(plain, start[b], following[b]), **CLOSE)


def _padded(family):
    # Where a whole row of a mask is hidden, its float64 softmax is NaN in the plain model too.
    reason = "gemma2 with left padding is NaN in float64 without any wrapper; it is tested in float32"
    return pytest.param(family, marks=pytest.mark.skip(reason=reason)) if family == "gemma2" else family


@pytest.mark.parametrize("name", ["vote-full", "vote-low-rank", "sample-bernoulli"])
@pytest.mark.parametrize("family", [_padded(f) for f in FAMILIES])
def test_left_padding_changes_nothing(family, name):
    base, start = causal(family), prompts(3, 9, 1, 6)
    following = torch.tensor(prompts(4, 4, 4, 4, seed=1))
    wrapped = MANY[name](base)
    together = stepped(wrapped, start, following)
    for b, prompt in enumerate(start):
        assert_close(together[:, b : b + 1], stepped(wrapped, [prompt], following[b : b + 1]), **CLOSE)


def test_left_padding_changes_nothing_for_gemma2_in_float32():
    base, start = causal("gemma2", torch.float32), prompts(3, 9, 1, 6)
    following = torch.tensor(prompts(4, 4, 4, 4, seed=1))
    wrapped = vote.Wrapper(n_voters=3, rank=2)(base)
    together = stepped(wrapped, start, following)
    for b, prompt in enumerate(start):
        assert_close(together[:, b : b + 1], stepped(wrapped, [prompt], following[b : b + 1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_sculpt_against_the_plain_model_and_its_hidden_states(family):
    base, ids = causal(family), torch.tensor(prompts(7, 7))
    wrapped = sculpt.Wrapper(rank=4)(base)
    head = wrapped.module.get_output_embeddings()
    for parameter in head.branch.parameters():
        parameter.data.normal_()
    seen = []
    hook = base.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain = base(input_ids=ids)
        y, risk = wrapped(input_ids=ids, return_risk=True)
        scale = F.softplus(head.branch(seen[0]))
    hook.remove()
    assert_close(y.logits, plain.logits, rtol=0, atol=0)
    assert_close(risk.logits, scale, rtol=0, atol=1e-12)

    following = torch.tensor(prompts(3, 3, seed=1))
    stepper = HFStepper(wrapped)
    prefill(stepper, ids.tolist())
    *_, last = (stepper.step(column) for column in following.T)
    with torch.no_grad():
        _, whole_risk = wrapped(input_ids=torch.cat([ids, following], 1), return_risk=True)
    assert_close(last.scale[0], whole_risk.logits[:, -1], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_unchanged_voter_is_bit_for_bit_the_base_model(family):
    base, ids = causal(family), torch.tensor(prompts(8, 8))
    wrapped = vote.Wrapper(n_voters=1, param_filter=".*", weight_noise=0.0)(base)
    with torch.no_grad():
        assert torch.equal(wrapped(input_ids=ids).logits, base(input_ids=ids).logits)


@pytest.mark.parametrize("voters", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_unchanged_voters_decode_the_ids_of_generate(family, voters):
    base, (prompt,) = causal(family), prompts(6)
    expected = base.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0, attention_mask=torch.ones(1, 6)
    )[0, 6:].tolist()
    stepper = HFStepper(vote.Wrapper(n_voters=voters, weight_noise=0.0)(base))
    _, following = prefill(stepper, [prompt])
    events = list(decode(stepper, following, [6], Sampling(max_tokens=12), [0]))
    assert [e.token.id for e in events] == expected
    assert [e.finish for e in events] == [None] * 11 + ["length"]
