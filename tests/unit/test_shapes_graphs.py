"""``torch.compile``, ``torch.export`` and ONNX of wrapped models and of one voter, on real shapes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from selfdoubt import vote
from selfdoubt.errors import CaptureError
from tests.compiled_shapes import KINDS as CHECKED
from tests.compiled_shapes import RECURRENT, check_close, predict, wrap
from tests.shapes import SHAPES, build, make_inputs

ROOT = Path(__file__).parents[2]
FLAT = "ignore:The tensor attributes .*_flat_weights:UserWarning"  # recurrent layers, wrapped or not


def quick(*names, of=SHAPES):
    """All of them, of which only these are not slow."""
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in of]


class Pair(nn.Module):
    """A wrapped model that always gives its risk as a second output, as a graph has one set of outputs."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *args, **kwargs):
        return tuple(self.wrapped.predict(*args, **kwargs))


def run_compiled(*arguments):
    """Run the checks of ``tests.compiled_shapes``; checks of shapes in signatures, which pytest adds, are no graphs."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.compiled_shapes", *arguments], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.split() == [f"{name}:{kind}" for name in arguments[1].split(",") for kind in CHECKED]


@pytest.mark.parametrize("names", quick("graphs", of=["graphs", ",".join(SHAPES)]))
def test_a_compiled_call_is_the_eager_one_in_both_modes(names):
    run_compiled("aot_eager", names)


@pytest.mark.slow
def test_graphs_of_machine_code():
    run_compiled("inductor", "resnet,gru,bert")


@pytest.mark.parametrize("kind", ["vote", "sculpt"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_are_no_graph_and_say_so(name, kind):
    wrapped = wrap(name, kind, compile=True)
    with pytest.raises(CaptureError, match=r"^compile=True needs one graph, .* cannot be captured .*compile=False"):
        predict(wrapped, name)
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):  # graphs stay behind
        assert set(twin.state_dict()) == set(wrap(name, kind).state_dict())


def build_plain(name, kind):
    """A model that is to be exported: one voter, or a sculpt with the scale as another output."""
    model = vote.merge_voter(wrap(name, "vote"), 1) if kind == "voter" else Pair(wrap(name, "sculpt"))
    return model.eval()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x + 1 if x.sum().item() > 0 else x)


def test_a_model_that_branches_on_a_value_cannot_be_one_graph():
    with pytest.raises(CaptureError, match=r"^compile=True needs one graph, .* cannot be captured .*compile=False"):
        vote.Wrapper(compile=True)(Branches())(torch.ones(3, 4))


@pytest.mark.filterwarnings(FLAT)
@pytest.mark.parametrize("kind", ["sculpt", "voter"])
@pytest.mark.parametrize("name", SHAPES)
def test_an_exported_sculpt_and_an_exported_voter(name, kind):
    model = build_plain(name, kind)
    args, kwargs = make_inputs(name, 6, torch.float32)
    program = torch.export.export(model, args, kwargs)
    check_close(predict(program.module(), name), predict(model, name))


@pytest.mark.filterwarnings(FLAT)
@pytest.mark.parametrize("kind", ["vote", "ranks", "sample"])
@pytest.mark.parametrize("name", quick("graph", "detector", "gru"))
def test_an_exported_program_of_all_members(name, kind):
    wrapped = wrap(name, kind)
    args, kwargs = make_inputs(name, 6, torch.float32)
    program = torch.export.export(Pair(wrapped).eval(), args, kwargs)
    check_close(predict(program.module(), name), predict(wrapped, name, return_risk=True))


@pytest.mark.filterwarnings(FLAT, "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["sculpt", "voter"])
@pytest.mark.parametrize("name", quick("resnet", "gru", of=[n for n in SHAPES if n != "detector"]))
def test_onnx_of_a_sculpt_and_of_a_voter(name, kind, tmp_path):
    model = build_plain(name, kind)  # an ONNX file has tensors alone, and the detector gives a number too
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
