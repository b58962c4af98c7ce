"""The last rung: the wrapped forward as one compiled graph gives what the eager one gives.

It runs without the checks of shapes that pytest adds, which cannot be captured in a graph.
"""

from __future__ import annotations

import pytest

from tests.plain import run

SETUP = """
import torch, selfdoubt
from torch import nn
from dataclasses import replace
from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import CaptureError
torch.manual_seed(0)
WRAPPERS = {
    "vote": vote.Wrapper(n_voters=3), "low": vote.Wrapper(n_voters=3, rank=2),
    "sample": sample.Wrapper(n_samples=4), "sculpt": sculpt.Wrapper(), "vote around a sculpt": vote.Wrapper(),
}
def check(base, name, *batches, field=None):
    # Two modules around the same weights: the compiled one must not find a graph of the other.
    eager, compiled = (replace(WRAPPERS[name], compile=t)(base) for t in (False, True))
    compiled.load_state_dict(eager.state_dict())
    for x in batches:
        with torch.no_grad():
            a, b = eager(x, return_risk=True), compiled(x, return_risk=True)
        for one, other in zip(a, b):
            if field:
                one, other = one[field], other[field]
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    innermost = compiled.module if isinstance(compiled.module, selfdoubt.Wrapped) else compiled
    assert innermost._graph is not None
"""


@pytest.mark.parametrize(
    "name",
    ["vote", *(pytest.param(n, marks=pytest.mark.slow) for n in ("low", "sample", "sculpt", "vote around a sculpt"))],
)
def test_a_compiled_perceptron_against_the_eager_one(name):
    code = """
base = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double().eval()
if "around" in NAME:
    base = WRAPPERS["sculpt"](base)
check(base, NAME, *(torch.randn(n, 4, dtype=torch.float64) for n in (2, 5)))
"""
    run(f"{SETUP}\nNAME = {name!r}\n{code}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["low", "sample", "sculpt"])
def test_a_compiled_language_model_against_the_eager_one(name):
    code = """
import tests.zoo
check(tests.zoo.causal("llama"), NAME, torch.tensor(tests.zoo.prompts(6, 6)), field="logits")
"""
    run(f"{SETUP}\nNAME = {name!r}\n{code}")


def test_a_model_that_cannot_be_captured_names_the_line():
    code = """
class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
    def forward(self, x):
        y = self.layer(x)
        return y if y.sum() > 0 else -y
try:
    vote.Wrapper(compile=True)(Branches().eval())(torch.randn(2, 4))
except CaptureError as error:
    assert "\\n" not in str(error), error
    assert "compile=False" in str(error), error
    print(error)
"""
    assert "one graph" in run(SETUP + code)
