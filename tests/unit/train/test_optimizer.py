"""The optimiser of a run against torch's plain AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from selfdoubt.train.config import TrainConfig
from selfdoubt.train.optimizer import build_optimizer


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 5), (7,), (2, 2, 2))]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fused_steps_against_plain_adamw(weight_decay):
    config = TrainConfig(data="", out="", lr=1e-2, weight_decay=weight_decay)
    ours, theirs = parameters(), parameters()
    first = build_optimizer(config, ours)
    second = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=weight_decay, foreach=False, fused=False)
    assert first.param_groups[0]["fused"]
    for step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.sin(p.detach() * (step + 1))
            q.grad = torch.sin(q.detach() * (step + 1))
        first.step()
        second.step()
    assert_close(list(ours), list(theirs), rtol=1e-5, atol=1e-6)


def test_parameters_that_no_fused_kernel_takes_are_stepped_all_the_same():
    """Complex numbers have no fused kernel."""
    p = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = build_optimizer(TrainConfig(data="", out="", lr=1e-2), [p])
    assert not optimizer.param_groups[0]["fused"]
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.real.detach().max() < 1
