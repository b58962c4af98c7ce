"""Sequences that join and leave a running batch say what they say alone, with the same scores."""

from __future__ import annotations

import pytest
import torch

from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import WrapError
from selfdoubt.lm.decode import DecodeBatch, TokenSequence, decode
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.stepper import HFStepper
from tests.zoo import FAMILIES, causal, prompts

WRAPPERS = {
    "none": lambda model: model,
    "vote": vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5),
    "sample": sample.Wrapper(n_samples=2, distribution=sample.Bernoulli(0.3)),
    "sculpt": sculpt.Wrapper(rank=4),
}
CLOSE = 1e-6  # Gemma's norms compute in float32
#: (joins before this token of the batch, length of the prompt, tokens wanted, temperature)
GUESTS = [
    (0, 3, 14, 0.0),
    (0, 3, 2, 1.0),
    (2, 19, 5, 0.0),
    (3, 1, 20, 0.8),
    (3, 7, 9, 0.0),
    (11, 30, 6, 1.3),
    (23, 2, 4, 0.0),
]


def sampling(guest):
    _, _, tokens, temperature = guest
    return Sampling(max_tokens=tokens, temperature=temperature, top_p=0.9)


def alone(model, prompt, guest, seed):
    stepper = HFStepper(model)
    _, following = prefill(stepper, [prompt])
    return [event.token for event in decode(stepper, following, [len(prompt)], sampling(guest), [seed])]


def opened(model, names, starts):
    stepper = HFStepper(model)
    _, following = prefill(stepper, [starts[n] for n in names])
    return DecodeBatch(stepper, following, [TokenSequence(n, sampling(GUESTS[n]), n, 10**6) for n in names])


def together(model, starts, *, one_by_one, leaves=None):
    """Tokens of each guest; ``leaves`` goes away after two of its own."""
    found: dict[int, list[int]] = {name: [] for name in range(len(GUESTS))}
    batch, step = None, 0
    while batch is None or batch.sequences or step <= GUESTS[-1][0]:
        here = [n for n, guest in enumerate(GUESTS) if guest[0] == step]
        for names in [[n] for n in here] if one_by_one else [here] if here else []:
            new = opened(model, names, starts)
            if batch is None or not batch.sequences:
                batch = new
            else:
                batch.join(new)
        if batch.sequences:
            for event in batch.choose():
                found[event.sequence].append(event.token)
            batch.step({leaves} if leaves is not None and len(found[leaves]) == 2 else set())
        step += 1
    return found


def same(found, expected):
    assert [t.id for t in found] == [t.id for t in expected]
    for a, b in zip(found, expected, strict=True):
        numbers = [[x for x in token if isinstance(x, float)] for token in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], abs=CLOSE)


FEW = [("llama", name) for name in WRAPPERS] + [(family, "vote") for family in FAMILIES if family != "llama"]
REST = [(family, name) for family in FAMILIES for name in WRAPPERS if (family, name) not in FEW]


@pytest.mark.parametrize(("family", "name"), [*FEW, *(pytest.param(*p, marks=pytest.mark.slow) for p in REST)])
def test_guests_come_and_go(family, name):
    model, starts = WRAPPERS[name](causal(family)), prompts(*(guest[1] for guest in GUESTS))
    found = together(model.eval(), starts, one_by_one=True, leaves=4)
    for n, guest in enumerate(GUESTS):
        expected = alone(model, starts[n], guest, n)
        same(found[n], expected[:2] if n == 4 else expected)


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f != "gemma2"]
)  # padded together, it is NaN without any wrapper
def test_guests_may_be_read_together(family):
    model, starts = WRAPPERS["vote"](causal(family)), prompts(*(guest[1] for guest in GUESTS))
    found = together(model, starts, one_by_one=False)
    for n, guest in enumerate(GUESTS):
        same(found[n], alone(model, starts[n], guest, n))


def test_the_cache_is_no_longer_than_its_longest_sequence():
    starts = prompts(*(guest[1] for guest in GUESTS))
    model = causal("llama")
    batch = opened(model, [5], starts)
    batch.join(opened(model, [1], starts))
    cache = batch._stepper._cache
    assert (cache.get_seq_length(), batch._stepper._mask.shape) == (30, (2, 30))
    batch.drop({5})
    assert cache.get_seq_length() == 3
    assert cache.layers[0].keys.shape[:1] + cache.layers[0].keys.shape[2:3] == (1, 3)
    assert batch._stepper._mask is None


def test_a_batch_that_everybody_left_is_empty():
    starts = prompts(*(guest[1] for guest in GUESTS))
    batch = opened(causal("llama"), [0, 1], starts)
    batch.drop({0, 1})
    assert batch.sequences == []


def test_what_keeps_a_recurrent_state_cannot_be_joined():
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(
        "qwen3_next", **sizes, vocab_size=61, intermediate_size=16, moe_intermediate_size=16, num_experts=2,
        num_experts_per_tok=1, shared_expert_intermediate_size=16, head_dim=4, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=4, linear_value_head_dim=4, pad_token_id=0,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    starts = prompts(*(guest[1] for guest in GUESTS))
    batch = opened(model, [0], starts)
    with torch.no_grad(), pytest.raises(WrapError, match=r"LinearAttention\w+ cannot be joined"):
        batch.join(opened(model, [2], starts))
