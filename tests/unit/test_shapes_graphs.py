"""``torch.compile``, ``torch.export`` and ONNX of wrapped models and of one voter, on real shapes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import onnxruntime
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import CaptureError
from selfdoubt.tree import iter_tensors
from tests.shapes import SHAPES, build, make_inputs

NOISY = r"^(?!.*self_attn)"
#: Rounding of float32 in networks of a few layers, whose products a graph may sum in another order.
NEAR = {"rtol": 1e-4, "atol": 1e-5}
#: torch captures no recurrent layers, wrapped or not.
RECURRENT = ("gru", "lstm", "series")
KINDS = {
    "vote": lambda s: vote.Wrapper(3, shared_inputs=s.shared),
    "low-rank vote": lambda s: vote.Wrapper(3, rank=2, answer_from="mean", shared_inputs=s.shared),
    "sample": lambda s: sample.Wrapper(3, param_filter=NOISY, shared_inputs=s.shared),
    "sculpt": lambda s: sculpt.Wrapper(param_filter=s.head),
}


def quick(*names, of=SHAPES):
    """All of them, of which only these are not slow."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in of]


def wrap(name, kind, **settings):
    return replace(KINDS[kind](SHAPES[name]), **settings)(build(name, torch.float32))


def predict(wrapped, name, batch=6, **options):
    args, kwargs = make_inputs(name, batch, torch.float32)
    with torch.no_grad():
        return list(iter_tensors(wrapped(*args, **kwargs, **options)))


def check_close(found, expected):
    pairs = list(zip(found, expected, strict=True))
    assert pairs
    for a, b in pairs:
        assert_close(a, b, **NEAR)


class Pair(nn.Module):
    """A wrapped model that always gives its risk as a second output, as a graph has one set of outputs."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *args, **kwargs):
        return tuple(self.wrapped.predict(*args, **kwargs))


@pytest.fixture(autouse=True)
def _no_graphs_of_others():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", quick("graph", "series"))
def test_a_compiled_call_is_the_eager_one_in_both_modes(name, kind):
    wrapped = wrap(name, kind)
    expected = predict(wrapped, name, return_risk=True)
    # All but the last rung: what a graph computes, without a compiler of C++.
    compiled = torch.compile(wrapped, backend="aot_eager", fullgraph=name not in RECURRENT)
    check_close(predict(compiled, name, return_risk=True), expected)
    check_close(predict(compiled, name), predict(wrapped, name))
    if kind == "low-rank vote":
        eager = copy.deepcopy(wrapped).train()
        for module in (*wrapped.modules(), *eager.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        args, kwargs = make_inputs(name, 6, torch.float32)
        compiled.train()
        for model in (compiled, eager):
            outputs = iter_tensors(model(*args, **kwargs))
            sum(y.square().mean() for y in outputs if y.is_floating_point()).backward()
        assert wrapped.is_trained
        for a, b in zip(wrapped.parameters(), eager.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                assert_close(a.grad, b.grad, **NEAR)


@pytest.mark.parametrize("kind", ["vote", "sculpt"])
@pytest.mark.parametrize("name", quick("graph", of=[n for n in SHAPES if n not in RECURRENT]))
def test_a_wrapper_that_compiles_its_model(name, kind):
    wrapped, eager = wrap(name, kind, compile=True), wrap(name, kind)
    check_close(predict(wrapped, name, return_risk=True), predict(eager, name, return_risk=True))
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):  # graphs stay behind
        assert set(twin.state_dict()) == set(eager.state_dict())
    check_close(predict(twin, name, batch=3), predict(eager, name, batch=3))


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_no_graph_and_say_so(name):
    with pytest.raises(CaptureError, match=r"^compile=True needs one graph, .* cannot be captured .*; use compile=False"):
        predict(wrap(name, "vote", compile=True), name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vote", "sample"])
@pytest.mark.parametrize("name", ["resnet", "gru", "bert"])
def test_graphs_of_machine_code(name, kind):
    wrapped = wrap(name, kind)
    compiled = torch.compile(wrapped)
    check_close(predict(compiled, name, return_risk=True), predict(wrapped, name, return_risk=True))


def build_plain(name, kind):
    """A model that is to be exported: one voter, or a sculpt with the scale as another output."""
    model = vote.merge_voter(wrap(name, "vote"), 1) if kind == "voter" else Pair(wrap(name, "sculpt"))
    return model.eval()


@pytest.mark.parametrize("kind", ["sculpt", "voter"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_exported_sculpt_and_an_exported_voter(name, kind):
    model = build_plain(name, kind)
    args, kwargs = make_inputs(name, 6, torch.float32)
    program = torch.export.export(model, args, kwargs)
    check_close(predict(program.module(), name), predict(model, name))


@pytest.mark.parametrize("kind", ["vote", "low-rank vote", "sample"])
@pytest.mark.parametrize("name", quick("graph", "detector", "gru"))
def test_an_exported_program_of_all_members(name, kind):
    wrapped = wrap(name, kind)
    args, kwargs = make_inputs(name, 6, torch.float32)
    program = torch.export.export(Pair(wrapped).eval(), args, kwargs)
    check_close(predict(program.module(), name), predict(wrapped, name, return_risk=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["sculpt", "voter"])
@pytest.mark.parametrize("name", quick("resnet", "gru"))
def test_onnx_of_a_sculpt_and_of_a_voter(name, kind, tmp_path):
    model = build_plain(name, kind)
    args, kwargs = make_inputs(name, 6, torch.float32)
    program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    values = [value.numpy() for value in (*args, *kwargs.values())]
    inputs = {given.name: value for given, value in zip(session.get_inputs(), values, strict=True)}
    expected = predict(model, name)
    check_close([torch.from_numpy(y) for y in session.run(None, inputs)], expected)
    if kind == "sculpt":  # the scale is an output
        assert len(session.get_outputs()) > len(predict(build(name, torch.float32), name))
