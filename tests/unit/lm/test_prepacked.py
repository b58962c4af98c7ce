"""Prepacked linear layers: the usual products, never those of an older weight, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.testing import assert_close

from selfdoubt import vote
from selfdoubt.lm import prepacked
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.prepacked import (
    MOST_ROWS,
    PrepackedProduct,
    can_prepack,
    count_copied_bytes,
    find_products,
    set_prepacking,
    use_products,
)
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.wrapping import innermost
from tests.zoo import causal, prompts

pytestmark = pytest.mark.skipif(
    not can_prepack(nn.Linear(4, 4)), reason="the oneDNN of this machine has no prepacked products"
)
DTYPES = [torch.float32] + [torch.bfloat16] * can_prepack(nn.Linear(4, 4, dtype=torch.bfloat16))
#: Largest relative error of a product of 24 numbers in either order.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def build_product(layer):
    return PrepackedProduct(layer.weight, layer.bias)


def multiply(layer, x):
    with torch.no_grad():
        return build_product(layer)(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 24), (3, 1, 24), (2, 3, 5, 24), (32, 24)])
def test_products_against_linear(shape, dtype, has_bias):
    layer, x = nn.Linear(24, 7, has_bias, dtype=dtype), torch.randn(*shape, dtype=dtype)
    y, expected = multiply(layer, x), F.linear(x, layer.weight, layer.bias).detach()
    assert y.dtype == dtype
    assert_close(y, expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_strides(dtype):
    layer, x = nn.Linear(24, 7, dtype=dtype), torch.randn(2, 9, 24, dtype=dtype)
    wide = torch.randn(24, 5, dtype=dtype)
    for each in (x[:, -1:], x[:, ::2], x[0, -1], x[:1].expand(4, 9, 24), wide.T, x.transpose(0, 1)):
        assert_close(multiply(layer, each), layer(each).detach(), rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_row_and_many_rows_take_the_usual_product(dtype):
    layer = nn.Linear(24, 7, dtype=dtype)
    product = build_product(layer)
    for rows, has_copy in ((0, False), (MOST_ROWS[dtype] + 1, False), (MOST_ROWS[dtype], True)):
        with torch.no_grad():
            assert product(torch.randn(rows, 24, dtype=dtype)).shape == (rows, 7)
        assert product.prepacked.has_copy == has_copy


def test_gradients_and_other_types_take_the_usual_product():
    layer = nn.Linear(24, 7)
    product = build_product(layer)
    y = product(torch.randn(3, 24))
    y.sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert product(torch.randn(3, 24)).dtype == torch.bfloat16
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        product(torch.randn(3, 24, dtype=torch.float64))
    assert not product.prepacked.has_copy


def test_nan_and_infinity_stay():
    layer, x = nn.Linear(24, 7), torch.randn(3, 24)
    x[1, 5], x[2, 3] = torch.nan, torch.inf
    y = multiply(layer, x)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()


CHANGES = {
    "in place": lambda layer: layer.weight.add_(1),
    "through data": lambda layer: layer.weight.data.add_(1),
    "by another tensor": lambda layer: setattr(layer.weight, "data", layer.weight.data + 1),
    "by another parameter": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight + 1)),
    "by a file": lambda layer: layer.load_state_dict({"weight": layer.weight + 1, "bias": layer.bias}),
    "one number through data": lambda layer: layer.weight.data[3, 5].add_(1),
    "columns through data": lambda layer: layer.weight.data[:, 1:].zero_(),
    "to NaN": lambda layer: layer.weight.data.fill_(torch.nan),
    "the bias": lambda layer: layer.bias.add_(1),
    "another bias": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias + 1)),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_weight_is_copied_again(how):
    model, x = nn.Sequential(nn.Linear(24, 7)), torch.randn(3, 24)
    with torch.no_grad():
        with use_products(find_products(model)):
            before = model(x)
        CHANGES[how](model[0])
        with use_products(find_products(model)):
            after = model(x)
        assert not torch.equal(before, after)
        assert_close(after, model(x), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_steps_of_an_optimizer_are_seen(options):
    """Of a weight in bfloat16 a small step changes few numbers, and fused optimizers change no version."""
    dtype = DTYPES[-1]
    first, second = (nn.Linear(64, 64, bias=False, dtype=dtype) for _ in range(2))
    second.weight = first.weight  # tied
    model, x = nn.Sequential(first, second), torch.randn(3, 64, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0, **options)
    changed = []
    for _ in range(3):
        with torch.no_grad(), use_products(find_products(model)):
            model(x)
        assert count_copied_bytes(model) == first.weight.nbytes
        before = first.weight.detach().clone()
        model(x).float().square().sum().backward()
        optimizer.step()
        changed.append(float((before != first.weight).float().mean()))
        find_products(model)
        assert count_copied_bytes(model) == 0
    assert min(changed) > 0
    assert dtype == torch.float32 or max(changed) < 0.1


def test_a_bias_that_onednn_reads_otherwise_has_no_product():
    biases = [
        torch.randn(7, 2)[:, 0], torch.zeros(1).expand(7), torch.randn(1), torch.randn(1, 7), torch.randn(7).double(),
    ]  # fmt: skip
    for bias in biases:
        layer = nn.Linear(24, 7)
        layer.bias = nn.Parameter(bias)
        assert not find_products(nn.Sequential(layer))


def test_copies_of_a_model_while_it_runs():
    model, x = nn.Sequential(nn.Linear(24, 7)), torch.randn(3, 24)
    with torch.no_grad(), use_products(find_products(model)):
        expected = model(x)
        twin = copy.deepcopy(model)
        with use_products(find_products(model)):  # another thread's
            assert torch.equal(model(x), expected)
    with torch.no_grad():
        twin[0].weight.zero_()
        with use_products(find_products(twin)):
            assert torch.equal(twin(x), twin[0].bias.expand(3, 7))
        assert torch.equal(twin(x), twin[0].bias.expand(3, 7))
    assert not any("forward" in vars(layer) for layer in (model[0], twin[0]))


def test_layers_are_as_before_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4))

    def fail():
        with use_products(find_products(model)):
            assert "forward" in vars(model[0])
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert "forward" not in vars(model[0])


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of a flag that is set next to that of oneDNN
def test_only_plain_layers_are_prepacked():
    class Special(nn.Linear):
        pass

    with torch.inference_mode():
        frozen = nn.Linear(4, 4)  # has no version
    pruned = nn.Linear(4, 4)
    prune.random_unstructured(pruned, "weight", 0.5)
    strided = nn.Linear(4, 8)
    strided.weight = nn.Parameter(torch.randn(4, 8).T)
    own = nn.Linear(4, 4)
    vars(own)["forward"] = F.relu
    double, without_memory = nn.Linear(4, 4, dtype=torch.float64), nn.Linear(4, 4, device="meta")
    rest = [Special(4, 4), double, without_memory, frozen, pruned, strided, own]
    model = nn.Sequential(nn.Linear(4, 4), *rest)
    assert list(find_products(model)) == [model[0]]
    assert not find_products(vote.Wrapper(n_voters=3, compile=True)(nn.Sequential(nn.Linear(4, 4))))
    assert not find_products(torch.compile(nn.Sequential(nn.Linear(4, 4)), backend="eager"))
    in_place = nn.Linear(4, 4)
    in_place.compile(backend="eager")
    assert not find_products(nn.Sequential(in_place, nn.Linear(4, 4)))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not find_products(model)


def test_memory_decides_once_and_the_caller_before_it(monkeypatch, caplog):
    model = nn.Sequential(nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False))
    monkeypatch.setattr(prepacked, "read_cpu_memory", lambda: (10**9, 4 * 80_000 - 1))
    with caplog.at_level("INFO", "selfdoubt"):
        assert not find_products(model)
    assert "prepack=True" in caplog.text
    monkeypatch.setattr(prepacked, "read_cpu_memory", lambda: (10**9, 4 * 80_000))
    assert not find_products(model)  # was decided
    set_prepacking(model, None)
    assert len(find_products(model)) == 2
    set_prepacking(model, choice=False)
    assert not find_products(model)
    monkeypatch.setattr(prepacked, "read_cpu_memory", lambda: (10**9, 0))
    set_prepacking(model, choice=True)
    assert len(find_products(model)) == 2


def test_copies_go_with_their_model():
    model = nn.Sequential(nn.Linear(24, 7))
    (product,) = find_products(model).values()
    with torch.no_grad():
        product(torch.randn(3, 24))
    assert count_copied_bytes(model) == 24 * 7 * 4
    alive = weakref.ref(product), weakref.ref(product.prepacked)
    del product, model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_models_of_one_weight_share_its_copy():
    base = copy.deepcopy(causal("llama", torch.float32))
    wrapped = vote.Wrapper(n_voters=3, rank=2)(base)
    for model in (base, wrapped):
        stepper = HFStepper(model)
        prefill(stepper, prompts(4))
        stepper.step(torch.tensor([1]))
    plain = find_products(base)
    assert plain
    assert {id(p.prepacked) for p in plain.values()} == {id(p.prepacked) for p in find_products(wrapped).values()}
    assert (
        count_copied_bytes(base)
        == count_copied_bytes(wrapped)
        == sum(p.prepacked.weight.nbytes for p in plain.values())
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [1, 3])
def test_steps_against_the_usual_products(members, dtype):
    base = copy.deepcopy(causal("llama")).to(dtype)
    model = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.05)(base) if members == 3 else base
    starts = prompts(4, 6, 5)

    def read():
        stepper = HFStepper(model)
        _, first = prefill(stepper, starts)
        return [first.logits, *(stepper.step(torch.tensor(ids)).logits for ids in prompts(3, 3))]

    set_prepacking(model, choice=False)
    expected = read()
    assert count_copied_bytes(model) == 0
    set_prepacking(model, choice=True)
    for y, logits in zip(read(), expected, strict=True):  # of three sequences, and three members each
        assert_close(y, logits, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    layers = [m for m in innermost(model).modules() if type(m) is nn.Linear]
    assert count_copied_bytes(model) == sum(m.weight.nbytes for m in layers)
    assert not any("forward" in vars(module) for module in model.modules())
