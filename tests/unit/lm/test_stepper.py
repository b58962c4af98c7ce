"""A growing cache: pieces of a prompt, sequences that leave, and prompts that do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.modeling_outputs import CausalLMOutputWithPast

from selfdoubt import sculpt, vote
from selfdoubt.errors import PromptError, WrapError
from selfdoubt.lm import stepper as module
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.step_output import Stepper
from selfdoubt.lm.stepper import HFStepper
from tests.ladder.rungs import stepped
from tests.zoo import CONTEXT, causal, prompts

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SOME = ["llama", "mistral", "gpt2", "opt"]


def wrapped(family="llama"):
    return vote.Wrapper(n_voters=3, weight_noise=0.5, rank=2)(causal(family))


def test_it_is_a_stepper():
    assert isinstance(HFStepper(wrapped()), Stepper)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("lengths", [(9,), (9, 4, 6)])
def test_a_prompt_in_pieces_is_the_prompt_in_one(monkeypatch, family, lengths):
    start, following = prompts(*lengths), torch.tensor(prompts(*[3] * len(lengths), seed=1))
    whole = stepped(wrapped(family), start, following)
    scored, _ = prefill(HFStepper(wrapped(family)), start)
    monkeypatch.setattr(module, "_CHUNK", 2 * 61 * 3 * len(lengths))  # two columns at a time
    assert len(list(HFStepper(wrapped(family)).start(start))) == 5
    assert_close(stepped(wrapped(family), start, following), whole, **CLOSE)
    again, _ = prefill(HFStepper(wrapped(family)), start)
    for tokens, others in zip(again, scored, strict=True):
        assert [t.logprob for t in tokens[1:]] == pytest.approx([t.logprob for t in others[1:]], abs=1e-5)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("lengths", [(6, 6, 6, 6), (3, 8, 5, 6)])
def test_sequences_that_leave_do_not_move_the_others(family, lengths):
    start, following = prompts(*lengths), torch.tensor(prompts(4, 4, 4, 4, seed=1))
    expected = stepped(wrapped(family), start, following)
    stepper = HFStepper(wrapped(family))
    prefill(stepper, start)
    stepper.step(following[:, 0])
    stepper.keep([1, 3])
    found = stepper.step(following[[1, 3], 1]).logits
    assert_close(found, expected[:, [1, 3], 2], **CLOSE)
    stepper.keep([1])
    assert_close(stepper.step(following[[3], 2]).logits, expected[:, [3], 3], **CLOSE)


def test_a_plain_model_is_one_member():
    start, following = prompts(5, 5), torch.tensor(prompts(2, 2, seed=1))
    plain = stepped(causal("llama"), start, following)
    same = stepped(vote.Wrapper(n_voters=1, weight_noise=0.0)(causal("llama")), start, following)
    assert len(plain) == 1
    assert torch.equal(plain, same)


def test_a_stepper_may_start_again():
    stepper = HFStepper(wrapped())
    _, first = prefill(stepper, prompts(5, 7))
    stepper.step(torch.tensor([3, 4]))
    _, again = prefill(stepper, prompts(5, 7))
    assert torch.equal(first.logits, again.logits)


def test_scales_of_a_sculpt_come_along():
    model = vote.Wrapper(n_voters=2)(sculpt.Wrapper(distribution=sculpt.Laplace)(causal("llama")))
    _, following = prefill(HFStepper(model), prompts(5))
    # Untrained, the scale b is 0.1 everywhere; voters deviate from it a little.
    assert following.scale.shape == following.logits.shape == (2, 1, 61)
    assert_close(following.scale.mean().item(), 0.1 * 2**0.5, rtol=0.3, atol=0)


def test_an_empty_prompt():
    with pytest.raises(PromptError, match=r"^a prompt needs at least one token, got an empty one$"):
        prefill(HFStepper(wrapped()), [[3], []])


def test_a_prompt_that_does_not_fit():
    stepper = HFStepper(wrapped())
    assert stepper.context == CONTEXT
    prefill(stepper, prompts(CONTEXT - 1))
    with pytest.raises(PromptError, match=f"^the prompt has {CONTEXT} tokens, .* at most {CONTEXT} .* shorten it$"):
        prefill(stepper, prompts(CONTEXT))


def test_a_model_without_a_cache():
    class NoCache(nn.Module):
        config = causal("llama").config

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(61, 61)

        def forward(self, input_ids, **_):
            return CausalLMOutputWithPast(logits=self.embed(input_ids))

    with pytest.raises(WrapError, match=r"^NoCache keeps no key-value cache"):
        prefill(HFStepper(NoCache()), prompts(3))
