"""Linear layers on few rows: the products and the answers of the usual way, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from selfdoubt import vote
from selfdoubt.lm import few_rows
from selfdoubt.lm.few_rows import find_linears, multiply_few_rows, use_few_rows
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.wrapping import innermost
from tests.zoo import causal, prompts


@pytest.mark.parametrize("shape", [(1, 8), (2, 8), (3, 8), (3, 1, 8), (1, 3, 8), (2, 3, 8), (8,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_against_linear(shape, dtype, has_bias):
    x, weight = torch.randn(*shape, dtype=dtype), torch.randn(5, 8, dtype=dtype)
    bias = torch.randn(5, dtype=dtype) if has_bias else None
    y, expected = multiply_few_rows(x, weight, bias), F.linear(x, weight, bias)
    assert y.dtype == dtype
    assert_close(y, expected)


def float32_model():
    return copy.deepcopy(causal("llama")).float()


@pytest.mark.parametrize("members", [1, 3])
def test_steps_of_three_rows_against_the_usual_product(members, monkeypatch):
    base = float32_model()
    model = vote.Wrapper(n_voters=3, weight_noise=0.05)(base) if members == 3 else base
    starts = prompts(*(4, 6, 5)[: 3 // members])
    calls = []

    def read():
        stepper = HFStepper(model)
        _, first = prefill(stepper, starts)
        return [first.logits, *(stepper.step(torch.tensor(ids)).logits for ids in prompts(3 // members, 3 // members))]

    monkeypatch.setattr(few_rows, "_ROWS", 0)
    expected = read()
    monkeypatch.setattr(few_rows, "_ROWS", 3)
    known = multiply_few_rows

    def counted(*inputs):
        calls.append(inputs)
        return known(*inputs)

    monkeypatch.setattr(few_rows, "multiply_few_rows", counted)
    for y, logits in zip(read(), expected, strict=True):
        assert_close(y, logits, rtol=1e-5, atol=1e-5)
    assert len(calls) >= 2 * len(find_linears(innermost(model))) - 2  # two steps
    assert not any("forward" in vars(module) for module in model.modules())


def test_layers_are_as_before_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4))

    def fail():
        with use_few_rows(find_linears(model), 3):
            assert "forward" in vars(model[0])
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert "forward" not in vars(model[0])


def test_only_plain_layers_in_float32_are_changed():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Special(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16))
    assert find_linears(model) == [model[0]]
    assert not find_linears(vote.Wrapper(n_voters=3, compile=True)(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))))
