"""Voters that read the answer only, against a plain model's cache that one plain model per voter goes on with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from selfdoubt import vote
from selfdoubt.lm.decode import DecodeBatch, TokenSequence, decode
from selfdoubt.lm.late_fork import LateFork
from selfdoubt.lm.prefill import prefill, run_to_end, teacher_force_in_chunks
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.stepper import HFStepper
from tests.ladder.rungs import voter
from tests.ladder.test_families import CLOSE
from tests.ladder.test_late_fork import LAST
from tests.zoo import FAMILIES, causal, prompts

SPECS = {
    "low-rank": vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5, start="answer"),
    "full": vote.Wrapper(n_voters=2, weight_noise=0.3, start="answer"),
    "base": vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5, start="answer", answer_from="base"),
    "late": vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5, start="answer", param_filter=LAST),
}


def one_by_one(wrapped, base, prompt, following):
    """Logits ``(members, 1 + steps, classes)``: the plain model reads the prompt but its last token, and each voter's
    own whole model goes on with a copy of its cache."""
    models = [base] if wrapped.spec.has_base else []
    models += [voter(wrapped, base, m) for m in range(wrapped.spec.n_voters)]
    found = []
    with torch.no_grad():
        for model in models:
            past = transformers.DynamicCache(config=base.config)
            if len(prompt) > 1:
                past = base(input_ids=torch.tensor([prompt[:-1]]), past_key_values=past, use_cache=True).past_key_values
            rest = torch.tensor([[prompt[-1], *following]])
            # One token after the other, as a sliding window's cache needs.
            steps = []
            for column in rest.T:
                output = model(input_ids=column[None], past_key_values=past, use_cache=True)
                past = output.past_key_values
                steps.append(output.logits[:, -1])
            found.append(torch.cat(steps))
    return torch.stack(found)


def stepped(stepper, starts, following):
    _, last = prefill(stepper, starts)
    return torch.stack([last.logits, *(stepper.step(ids).logits for ids in following.T)], 2)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_cache_and_then_one_model_per_voter(family, name):
    base, wrapped = causal(family), SPECS[name](causal(family))
    lengths = (7, 7, 7) if family == "gemma2" else (9, 1, 4)  # with left padding it is NaN by itself
    starts, following = prompts(*lengths), torch.tensor(prompts(4, 4, 4, seed=1))
    stepper = HFStepper(wrapped)
    assert isinstance(stepper._fork, LateFork) == (name == "late")
    ours = stepped(stepper, starts, following)
    for row, prompt in enumerate(starts):
        assert_close(ours[:, row], one_by_one(wrapped, base, prompt, following[row].tolist()), **CLOSE)
    assert (ours[0] - ours[-1]).abs().max() > 1e-3
    read_all = stepped(HFStepper(wrapped, start="prompt"), starts, following)
    assert (ours[-1, 0] - read_all[-1, 0]).abs().max() > 1e-3


def test_the_question_is_read_once_and_has_no_members():
    base, wrapped = causal("llama"), SPECS["low-rank"](causal("llama"))
    rows = []
    wrapped.module.model.layers[0].register_forward_pre_hook(lambda m, args: rows.append(tuple(args[0].shape[:2])))
    scored, last = prefill(HFStepper(wrapped), prompts(6, 9))
    assert rows == [(2, 8), (6, 1)]
    assert last.logits.shape[:2] == (3, 2)
    plain, _ = prefill(HFStepper(base), prompts(6, 9))
    for ours, theirs in zip(scored, plain, strict=True):
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert (a.logprob, a.total) == pytest.approx((b.logprob, b.total), abs=1e-9)
            assert (a.epistemic, a.spread, a.divergence) == (0, 0, None)


@pytest.mark.parametrize("name", ["low-rank", "late", "base"])
def test_teacher_forcing_is_generation(name):
    wrapped = SPECS[name](causal("llama"))
    stepper = HFStepper(wrapped)
    _, following = prefill(stepper, prompts(6))
    said = [event.token for event in decode(stepper, following, [6], Sampling(max_tokens=9), [0])]
    assert max(token.epistemic for token in said) > 1e-4
    assert said[0].epistemic > 1e-5  # the first token is predicted where the members read the prompt's last
    again = HFStepper(wrapped)
    _, following = prefill(again, prompts(6))
    scored = run_to_end(teacher_force_in_chunks(again, following, [[token.id for token in said]], 0))[0]
    for a, b in zip(scored, said, strict=True):
        numbers = [[x for x in token if isinstance(x, float)] for token in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-6)


@pytest.mark.parametrize("name", ["low-rank", "late"])
def test_guests_join_and_leave(name):
    wrapped, (first, second) = SPECS[name](causal("llama")), prompts(11, 3)

    def open_batch(number, prompt):
        stepper = HFStepper(wrapped)
        _, following = prefill(stepper, [prompt])
        return DecodeBatch(stepper, following, [TokenSequence(number, Sampling(max_tokens=6), 0, 100)])

    alone = []
    for number, prompt in enumerate((first, second)):
        batch, tokens = open_batch(number, prompt), []
        while batch.sequences:
            tokens += [event.token for event in batch.choose()]
            batch.step()
        alone.append(tokens)
    found: list[list[Any]] = [[], []]
    batch = open_batch(0, first)
    for step in range(8):
        if step == 2:
            batch.join(open_batch(1, second))
        for event in batch.choose() if batch.sequences else ():
            found[event.sequence].append(event.token)
        batch.step()
    for ours, theirs in zip(found, alone, strict=True):
        assert [t.id for t in ours] == [t.id for t in theirs]
        assert [t.epistemic for t in ours] == pytest.approx([t.epistemic for t in theirs], abs=1e-6)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("name", ["low-rank", "full", "base"])
def test_training_sees_what_generation_sees(name, family, grad):
    wrapped = SPECS[name](causal(family))
    members = wrapped.spec.members(training=False)
    (prompt, answer), following = prompts(6, 4), None
    following = torch.tensor([answer])
    ours = stepped(HFStepper(wrapped), [prompt], following)
    ids = torch.tensor([[*prompt, *answer]]).expand(members, -1)
    active = torch.zeros_like(ids, dtype=torch.bool)
    active[:, len(prompt) - 1 :] = True
    with torch.set_grad_enabled(grad):
        whole, _ = wrapped.forward_rows(input_ids=ids, use_cache=False, active=active)
    assert_close(whole.logits[:, None, len(prompt) - 1 :].detach(), ours, **CLOSE)
    if grad:
        whole.logits[:, : len(prompt) - 1].square().sum().backward()
        for name_, parameter in wrapped.named_parameters():
            assert parameter.grad is None or not parameter.grad.any(), name_


def test_a_leaf_without_a_kernel_is_active_at_some_positions():
    spec = replace(SPECS["full"], param_filter="input_layernorm|q_proj")  # Llama's norm runs in the loop
    wrapped = spec(causal("llama"))
    (prompt, answer) = prompts(5, 3)
    ours = stepped(HFStepper(wrapped), [prompt], torch.tensor([answer]))
    ids = torch.tensor([[*prompt, *answer]]).expand(2, -1)
    active = torch.arange(8)[None].expand(2, -1) >= 4
    with torch.no_grad():
        whole, _ = wrapped.forward_rows(input_ids=ids, use_cache=False, active=active)
    assert_close(whole.logits[:, None, 4:], ours, **CLOSE)
