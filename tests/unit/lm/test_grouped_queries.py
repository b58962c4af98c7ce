"""Attention of heads that share keys, as queries of one head, against PyTorch's own; and nothing outside of a block."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from selfdoubt.lm import grouped_queries
from selfdoubt.lm.grouped_queries import attend_grouped, group_queries
from tests.zoo import causal


def inputs(dtype=torch.float64, heads=6, key_heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, heads, 1, 8), (3, key_heads, 11, 8), (3, key_heads, 11, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("key_heads", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "shared"])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_against_heads_apart(key_heads, kind, scale):
    q, k, v = inputs(key_heads=key_heads)
    visible = torch.arange(11) >= torch.tensor([0, 4, 10])[:, None, None, None]
    additive = torch.zeros(3, 1, 1, 11, dtype=q.dtype).masked_fill(~visible, -torch.inf)
    mask = {"none": None, "bool": visible, "additive": additive, "shared": visible[1:2]}[kind]
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    assert_close(attend_grouped(q, k, v, mask, scale), expected)


@torch.no_grad()
def test_a_model_s_steps_take_it_within_a_block_and_in_this_thread_only(monkeypatch):
    model = causal("llama")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    calls = []
    known = attend_grouped

    def note(query, *given):
        calls.append(len(query))
        return known(query, *given)

    monkeypatch.setattr(grouped_queries, "attend_grouped", note)

    def step():
        cache = model(torch.tensor([[5, 6, 7], [8, 9, 5]]), use_cache=True).past_key_values
        return model(torch.tensor([[4], [3]]), past_key_values=cache).logits

    expected = step()
    with group_queries():
        assert_close(step(), expected)
        assert calls == [2] * model.config.num_hidden_layers  # the prompt has more queries than one
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
        with torch.enable_grad():
            step()
    step()
    assert calls == [2] * model.config.num_hidden_layers
