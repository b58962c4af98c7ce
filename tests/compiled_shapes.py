"""Checks compiled calls of wrapped shapes against eager ones: ``python -m tests.compiled_shapes BACKEND NAME,NAME``.

A process of its own, since pytest has signatures checked, which is nothing that a graph can hold.
"""

from __future__ import annotations

import copy
import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from selfdoubt import Wrapped, sample, sculpt, vote
from selfdoubt.tree import iter_tensors
from tests.shapes import SHAPES, build, make_inputs

#: The projections of ``nn.MultiheadAttention`` take no noise one by one.
NOISY = r"^(?!.*self_attn)"
#: torch captures no recurrent layers, wrapped or not.
RECURRENT = ("gru", "lstm", "series")
KINDS: dict[str, Any] = {
    "vote": lambda s: vote.Wrapper(3, shared_inputs=s.shared),
    "ranks": lambda s: vote.Wrapper(3, rank=2, answer_from="mean", shared_inputs=s.shared),
    "sample": lambda s: sample.Wrapper(3, param_filter=NOISY, shared_inputs=s.shared),
    "sculpt": lambda s: sculpt.Wrapper(param_filter=s.head),
}


def wrap(name: str, kind: str, **settings: Any) -> Wrapped:
    """Return a shape in float32, wrapped in this way."""
    wrapped: Wrapped = replace(KINDS[kind](SHAPES[name]), **settings)(build(name, torch.float32))
    return wrapped


def predict(model: nn.Module, name: str, batch: int = 6, **options: Any) -> list[Tensor]:
    """Return all tensors of a model's output."""
    args, kwargs = make_inputs(name, batch, torch.float32)
    with torch.no_grad():
        return list(iter_tensors(model(*args, **kwargs, **options)))


def check_close(outputs: list[Tensor], expected: list[Tensor]) -> None:
    """Check two lists of outputs up to the rounding of float32, whose sums a graph may take in another order."""
    assert outputs
    for output, other in zip(outputs, expected, strict=True):
        assert_close(output, other, rtol=1e-4, atol=1e-5)


def _train(model: nn.Module, name: str) -> None:
    args, kwargs = make_inputs(name, 6, torch.float32)
    outputs = iter_tensors(model.train()(*args, **kwargs))
    loss: Any = sum(y.square().mean() for y in outputs if y.is_floating_point())
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3).step()


def check(name: str, kind: str, backend: str) -> None:
    """Check a compiled model in both modes, and a wrapper that compiles its model, against the eager one."""
    torch._dynamo.reset()
    wrapped = wrap(name, kind)
    eager = copy.deepcopy(wrapped)
    expected = predict(eager, name, return_risk=True)
    compiled: Any = torch.compile(wrapped, backend=backend, fullgraph=name not in RECURRENT)
    check_close(predict(compiled, name, return_risk=True), expected)
    check_close(predict(compiled, name), predict(eager, name))
    if kind in ("vote", "ranks") and backend == "aot_eager":
        for module in (*wrapped.modules(), *eager.modules()):  # the noise of a graph is another one
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
        _train(compiled, name)
        _train(eager, name)
        assert wrapped.is_trained
        for one, other in zip(wrapped.parameters(), eager.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5)
    if name not in RECURRENT and kind in ("vote", "sculpt") and backend == "inductor":
        whole = wrap(name, kind, compile=True)
        check_close(predict(whole, name, return_risk=True), expected)
        assert set(whole.state_dict()) == set(eager.state_dict())


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for shape in sys.argv[2].split(","):
        for setting in KINDS:
            check(shape, setting, sys.argv[1])
            print(f"{shape}:{setting}", flush=True)
