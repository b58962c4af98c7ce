"""Attention of a position on itself: against the weights of eager attention, in every way of running a model."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from selfdoubt import vote
from selfdoubt.lm.attention import AttentionProbe, find_attention, middle_third
from selfdoubt.lm.hidden_states import find_decoder_layers
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.probes import find_probes
from selfdoubt.lm.step_output import Probe
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.wrapping import innermost
from tests.zoo import causal, prompts

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
READ = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"]


@pytest.fixture
def implementation():
    """Switch a shared model's attention for one test."""
    changed = []

    def switch(model, name):
        changed.append((model, model.config._attn_implementation))
        model.set_attn_implementation(name)
        return model

    yield switch
    for model, name in reversed(changed):
        model.set_attn_implementation(name)


def probe_of(model):
    stack = find_decoder_layers(innermost(model))
    return AttentionProbe([find_attention(stack[i]) for i in middle_third(len(stack))])


def weights(model, ids):
    """The diagonal of each layer's weights, (t, layers, heads), from all the weights of one whole reading."""
    output = model(torch.tensor([ids]), output_attentions=True)
    layers = [output.attentions[i][0] for i in middle_third(len(output.attentions))]
    return torch.stack([w.diagonal(dim1=-2, dim2=-1).T for w in layers], 1).float()


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("family", READ)
def test_in_steps_and_in_extended_texts_against_all_the_weights(family, kind, implementation):
    model, starts, texts = causal(family, torch.float32), prompts(9, 4, 6), prompts(5, 5, 5, seed=1)
    with torch.inference_mode():
        implementation(model, "eager")
        expected = [weights(model, [*a, *b]) for a, b in zip(starts, texts, strict=True)]
        implementation(model, kind)
        stepper = HFStepper(model, probes=[probe_of(model)])
        _, now = prefill(stepper, starts)
        for t in range(6):
            for row, start in enumerate(starts):
                assert_close(now.attention[0, row], expected[row][len(start) - 1 + t], **CLOSE)
            if t < 5:
                now = stepper.step(torch.tensor([text[t] for text in texts]))
        longer = HFStepper(model, probes=[probe_of(model)])
        prefill(longer, starts)
        shorter = [texts[0], texts[1][:2], texts[2][:4]]
        ((_, piece),) = longer.extend(shorter)
        for row, (start, text) in enumerate(zip(starts, shorter, strict=True)):
            end = len(start) + len(text)
            assert_close(piece.attention[0, row, : len(text)], expected[row][len(start) : end], **CLOSE)


@pytest.mark.parametrize("family", READ)
@pytest.mark.parametrize("lengths", [(7,), (7, 3)])
def test_the_model_s_output_is_the_same_to_the_bit(family, lengths):
    model, starts = causal(family), prompts(*lengths)
    plain, probed = HFStepper(model), HFStepper(model, probes=find_probes(model))
    configs = [find_attention(layer).config for layer in find_decoder_layers(model)]
    for (_, a), (_, b) in zip(plain.start(starts), probed.start(starts), strict=True):
        assert torch.equal(a.logits, b.logits)
    ids = torch.tensor([5] * len(lengths))
    assert torch.equal(plain.step(ids).logits, probed.step(ids).logits)
    ((_, a),), ((_, b),) = plain.extend(starts), probed.extend(starts)
    assert torch.equal(a.logits, b.logits)
    assert all(find_attention(layer).config is c for layer, c in zip(find_decoder_layers(model), configs, strict=True))
    assert model.config._attn_implementation == "sdpa"


def test_members_are_averaged():
    wrapped, starts = vote.Wrapper(n_voters=2, weight_noise=0.5, rank=2)(causal("llama")), prompts(6, 4)
    stepper = HFStepper(wrapped, probes=[probe_of(wrapped)])
    prefill(stepper, starts)
    together = stepper.step(torch.tensor([3, 4])).attention
    rows = []
    original = AttentionProbe.read

    class EachMember(AttentionProbe):
        def read(self, output):
            rows.append(original(self, output._each(lambda x: x.flatten(0, 1)[None])).attention)
            return output

    again = HFStepper(wrapped, probes=[EachMember(probe_of(wrapped)._modules)])
    prefill(again, starts)
    again.step(torch.tensor([3, 4]))
    each = rows[-1][0, :, 0].unflatten(0, (2, 2))
    assert not torch.equal(each[0], each[1])
    assert_close(together[0], each.mean(0), **CLOSE)


def test_attention_that_cannot_be_read_is_absent(implementation):
    model = causal("gemma2", torch.float32)  # a soft cap, which sdpa does not have
    implementation(model, "eager")
    stepper = HFStepper(model, probes=find_probes(model))
    _, now = prefill(stepper, prompts(5))
    assert now.attention is not None
    implementation(model, "flex_attention")
    probe = probe_of(model)
    with probe.capture(1):
        pass
    assert probe.read(now._each(lambda x: x[:, :, None])).attention.shape == (1, 1, 1, *now.attention.shape[2:])


def test_a_failed_run_leaves_the_model_as_it_was():
    model = causal("llama")
    probe = probe_of(model)
    configs = [module.config for module in probe._modules]
    with pytest.raises(IndexError), probe.capture(1):  # an id that the model does not know
        model(torch.tensor([[10**6]]))
    with probe.capture(1):
        assert not any(module.config is c for module, c in zip(probe._modules, configs, strict=True))
    assert all(module.config is c for module, c in zip(probe._modules, configs, strict=True))


def test_probes_are_probes():
    probes = find_probes(causal("llama"))
    assert probes
    assert all(isinstance(probe, Probe) for probe in probes)
    assert not find_probes(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("layers", "expected"), [(1, [0]), (2, [0, 1]), (3, [1, 2]), (12, [4, 5, 6, 7, 8])])
def test_the_middle_third(layers, expected):
    assert list(middle_third(layers)) == expected
