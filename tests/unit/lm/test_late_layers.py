"""Disagreement of late layers: against scipy and a slow reference, and where it is absent."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.spatial import distance
from torch import nn
from torch.testing import assert_close

from selfdoubt import vote
from selfdoubt.lm import late_layers
from selfdoubt.lm.late_layers import find_late_layers, jensen_shannon
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.wrapping import innermost
from tests.zoo import causal, prompts


def random_logp(*shape, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3).log_softmax(-1)


def test_jensen_shannon_against_scipy():
    first, second = random_logp(5, 7), random_logp(5, 7, seed=1)
    expected = [distance.jensenshannon(p, q) ** 2 for p, q in zip(first.exp(), second.exp(), strict=True)]
    assert_close(jensen_shannon(first, second), torch.tensor(expected, dtype=torch.float64))
    assert jensen_shannon(first, first).abs().max() < 1e-12


def slow(model, ids):
    """The signal at the last position, from all hidden states of one whole reading."""
    output = model(torch.tensor([ids]), output_hidden_states=True)
    inner = getattr(model.base_model, "decoder", model.base_model)
    norm = next(m for n, m in inner.named_children() if "norm" in type(m).__name__.lower())
    # Two layers: the first is the late one.
    late = model.get_output_embeddings()(norm(output.hidden_states[1]))[0, -1]
    final = output.logits[0, -1]
    top = final.topk(min(32, len(final))).indices
    return distance.jensenshannon(final[top].softmax(-1), late[top].softmax(-1)) ** 2


def probe_of(model):
    probe = find_late_layers(innermost(model))
    assert probe is not None
    return probe


@pytest.fixture
def first_layer(monkeypatch):
    monkeypatch.setattr(late_layers, "DEPTHS", (0.0,))


@pytest.mark.parametrize("chunk", [1, 2**22])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi3", "gpt2", "gpt_neox", "opt"])
def test_the_signal_against_all_hidden_states(family, chunk, first_layer, monkeypatch):
    monkeypatch.setattr(late_layers, "_CHUNK", chunk)
    model, starts, texts = causal(family), prompts(6, 4), prompts(3, 3, seed=1)
    stepper = HFStepper(model, probes=[probe_of(model)])
    with torch.inference_mode():
        _, now = prefill(stepper, starts)
        ((_, piece),) = stepper.extend(texts)
        for row, (start, text) in enumerate(zip(starts, texts, strict=True)):
            values = [now.signals["layer_disagreement"][0, row], *piece.signals["layer_disagreement"][0, row]]
            expected = [slow(model, [*start, *text[:n]]) for n in range(4)]
            assert max(expected) > 1e-3
            assert [v.item() for v in values] == pytest.approx(expected, abs=1e-6)


def test_members_are_averaged_before_they_are_compared(first_layer):
    model = causal("llama")
    same = vote.Wrapper(n_voters=2, weight_noise=0.0, rank=2)(model)
    differ = vote.Wrapper(n_voters=2, weight_noise=1.0, rank=2)(model)
    values = []
    for m in (model, same, differ):
        _, now = prefill(HFStepper(m, probes=[probe_of(causal("llama") if m is model else m.module)]), prompts(5))
        values.append(now.signals["layer_disagreement"].item())
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert abs(values[0] - values[2]) > 1e-5


@pytest.mark.parametrize("what", ["cap", "head"])
def test_it_is_absent_where_a_head_does_more(what, first_layer):
    model = copy.deepcopy(causal("llama"))
    if what == "cap":
        model.lm_head.register_forward_hook(lambda _m, _i, output: 2 * torch.tanh(output / 2))
        _, now = prefill(HFStepper(model, probes=[probe_of(model)]), prompts(5))
        assert "layer_disagreement" not in now.signals
    else:
        model.set_output_embeddings(nn.Sequential(model.lm_head))
        assert find_late_layers(model) is None
