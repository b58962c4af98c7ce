"""Steps over a static cache give what steps over a dynamic one give: logits, scales, hidden states, probes, tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch.testing import assert_close

from selfdoubt import density, sample, sculpt, vote
from selfdoubt.errors import WrapError
from selfdoubt.lm.decode import decode
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.probes import find_probes
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.static.stepper import Buckets, StaticStepper
from selfdoubt.lm.stepper import HFStepper
from tests.zoo import FAMILIES, causal, prompts

# Float64 models: both ways compute the same sums, in another order; some norms and softmaxes are float32 inside.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
VOTE = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5)


def fitted(model):
    wrapped = density.Wrapper()(model)
    density.fit(wrapped, [torch.tensor(prompts(*[20] * 6))])
    return wrapped


WRAPPERS = {
    "none": lambda model: model,
    "vote": VOTE,
    "vote-base": replace(VOTE, answer_from="base"),
    "sample": sample.Wrapper(n_samples=2, distribution=sample.Bernoulli(0.3)),
    "sculpt": sculpt.Wrapper(rank=4),
    "vote-sculpt": lambda model: VOTE(sculpt.Wrapper(rank=4)(model)),
    "density": fitted,
    "vote-late": replace(VOTE, param_filter=r"\.1\..*(q_proj|v_proj|c_attn|query_key_value|qkv_proj)\.weight"),
    "vote-answer": replace(VOTE, start="answer"),
}
SMALL = Buckets(first_length=8, doubled_length=16)


def eager(model):
    return HFStepper(model, [0, 1], None, find_probes(model))


def static(model):
    return StaticStepper(eager(model), SMALL)


def lengths(family):
    return (5, 5, 5) if family == "gemma2" else (3, 9, 1)  # its left padding is NaN in float64, see test_families


def run(stepper, starts, steps=24):
    """Outputs of a batch that two sequences join after 3 steps, one of which leaves and one doubles later."""
    _, last = prefill(stepper, starts)
    outputs, count = [last], len(starts)
    for step in range(steps):
        if step == 3:
            guest = type(stepper)(*stepper_arguments(stepper))
            prefill(guest, prompts(6, 6, seed=9))
            stepper.join(guest)
            count += 2
        if step == 8:
            stepper.keep([4, 0, 2])
            count = 3
        if step == 10:
            stepper.keep([1, 0, 1, 2])
            count = 4
        outputs.append(stepper.step(torch.tensor([3 + (7 * step + 5 * row) % 50 for row in range(count)])))
    return outputs


def stepper_arguments(stepper):
    model = stepper._inner._model if isinstance(stepper, StaticStepper) else stepper._model
    inner = eager(model)
    return (inner, SMALL) if isinstance(stepper, StaticStepper) else (model, [0, 1], None, find_probes(model))


def same_output(ours, theirs):
    for name in ("logits", "scale", "states", "attention"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, **CLOSE)
    assert ours.signals.keys() == theirs.signals.keys()
    for name, signal in ours.signals.items():
        assert_close(signal, theirs.signals[name], **CLOSE)


FEW = [("llama", name) for name in WRAPPERS] + [(family, "vote-base") for family in FAMILIES if family != "llama"]
REST = [(family, name) for family in FAMILIES for name in WRAPPERS if (family, name) not in FEW]


@pytest.mark.parametrize(("family", "name"), [*FEW, *(pytest.param(*p, marks=pytest.mark.slow) for p in REST)])
def test_static_steps_against_dynamic_ones(family, name):
    model = WRAPPERS[name](causal(family))
    starts = prompts(*lengths(family))
    ours, theirs = static(model), eager(model)
    for a, b in zip(run(ours, starts), run(theirs, starts), strict=True):
        same_output(a, b)
    assert ours.size[1] >= 24 + min(lengths(family))
    if name == "density":
        assert "density" in b.signals


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "vote-base"), *(pytest.param(f, "none", marks=pytest.mark.slow) for f in FAMILIES if f != "llama")],
)
def test_static_decoding_chooses_the_same_tokens(family, name, temperature):
    model, starts = WRAPPERS[name](causal(family)), prompts(*lengths(family))
    sampling = Sampling(temperature, 0.9, 20, frozenset({7, 11, 30}), 2)
    events = []
    for stepper in (static(model), eager(model)):
        _, following = prefill(stepper, starts)
        events.append(list(decode(stepper, following, [len(s) for s in starts], sampling, [1, 2, 3])))
    ours, theirs = events
    assert [(e.sequence, e.finish, e.token and e.token.id) for e in ours] == [
        (e.sequence, e.finish, e.token and e.token.id) for e in theirs
    ]
    for a, b in zip(ours, theirs, strict=True):
        if a.token is not None:
            assert (a.token.logprob, a.token.total, a.token.epistemic) == pytest.approx(
                (b.token.logprob, b.token.total, b.token.epistemic), abs=1e-6
            )


def tiny(family, **changes):
    """A tiny float64 model of a family that the zoo lacks."""
    config = transformers.AutoConfig.for_model(
        family, vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3,
        **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_layers_with_and_without_windows_have_masks_of_their_own(kind):
    model = tiny(
        "gemma3_text", sliding_window=5, attn_implementation=kind,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    starts = prompts(7, 12) if kind == "sdpa" else prompts(7, 7)
    for a, b in zip(
        run(static(model), starts[:2] + starts[:1]), run(eager(model), starts[:2] + starts[:1]), strict=True
    ):
        same_output(a, b)


def test_the_cache_grows_and_shrinks():
    stepper = static(causal("llama"))
    prefill(stepper, prompts(3))
    assert stepper.size is None
    sizes: list[tuple[int, int] | None] = []
    for step in range(40):
        if step == 2:
            for _ in range(5):
                guest = static(causal("llama"))
                prefill(guest, prompts(4))
                stepper.join(guest)
        if step == 30:
            stepper.keep([0])
        stepper.step(torch.full((6 if 2 <= step < 30 else 1,), 5))
        if stepper.size not in sizes:
            sizes.append(stepper.size)
    assert sizes == [(1, 8), (8, 8), (8, 16), (8, 24), (8, 32), (8, 48), (1, 48)]


def test_a_sequence_fills_the_context():
    stepper, plain = static(causal("gpt2")), eager(causal("gpt2"))
    for s in (stepper, plain):
        prefill(s, prompts(3))
    for _ in range(61):
        a, b = (s.step(torch.tensor([5])) for s in (stepper, plain))
    assert_close(a.logits, b.logits, **CLOSE)
    assert stepper.size == (1, 64)


def test_a_slot_is_clean_after_a_sequence_that_was_not_a_number():
    stepper = static(causal("llama"))
    prefill(stepper, prompts(3, 20))
    stepper.step(torch.tensor([5, 5]))
    with torch.inference_mode():
        for layer in stepper._allocator.cache.kept:
            layer.keys[1], layer.values[1] = torch.nan, torch.nan
    bad = stepper.step(torch.tensor([5, 5])).logits
    assert bad[0, 0].isfinite().all()
    assert bad[0, 1].isnan().all()
    stepper.keep([0])
    guest, plain = static(causal("llama")), eager(causal("llama"))
    for s in (guest, plain):
        prefill(s, prompts(4, seed=3))
    stepper.join(guest)
    assert_close(stepper.step(torch.tensor([5, 6])).logits[:, 1], plain.step(torch.tensor([6])).logits[:, 0], **CLOSE)


def test_a_model_with_recurrent_layers_says_why_it_cannot():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(
        "qwen3_next", **sizes, vocab_size=61, intermediate_size=16, moe_intermediate_size=16, num_experts=2,
        num_experts_per_tok=1, shared_expert_intermediate_size=16, head_dim=4, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=4, linear_value_head_dim=4, pad_token_id=0,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    stepper = static(model)
    prefill(stepper, prompts(3))
    with pytest.raises(WrapError, match="cannot have a static cache: its cache has a Linear"):
        stepper.step(torch.tensor([5]))
