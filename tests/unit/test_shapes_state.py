"""State of wrapped models on real shapes: copies, files, types, devices, memory formats, modes and threads."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from selfdoubt import density, sample, sculpt, vote
from selfdoubt.errors import WrapError
from selfdoubt.tree import iter_tensors
from tests.shapes import SHAPES, build, make_inputs

NOISY = r"^(?!.*self_attn)"
SPECS = {
    "vote": lambda s: vote.Wrapper(3, weight_noise=0.3, rank=2, shared_inputs=s.shared, answer_from="mean"),
    "sample": lambda s: sample.Wrapper(3, sample.Normal(0.2), NOISY, shared_inputs=s.shared, answer_from="mean"),
    "sculpt": lambda s: sculpt.Wrapper(param_filter=s.head),
}


def wrap(name, kind, dtype=torch.float64):
    shape = SHAPES[name]
    if kind == "voters of sculpt":
        return SPECS["vote"](shape)(sculpt.Wrapper(param_filter=shape.head)(build(name, dtype)))
    return SPECS[kind](shape)(build(name, dtype))


def predict(wrapped, name, dtype=torch.float64, batch=6):
    args, kwargs = make_inputs(name, batch, dtype)
    with torch.no_grad():
        return list(iter_tensors(tuple(wrapped.predict(*args, **kwargs))))


def train_a_step(wrapped, name, dtype=torch.float64):
    args, kwargs = make_inputs(name, 6, dtype)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    outputs = iter_tensors(wrapped.train()(*args, **kwargs))
    sum(y.square().mean() for y in outputs if y.is_floating_point()).backward()
    optimizer.step()
    wrapped.eval()


def are_same(one, other):
    pairs = list(zip(one, other, strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", [*SPECS, "voters of sculpt"])
@pytest.mark.parametrize("name", SHAPES)
def test_trained_copies_and_files_answer_alike(name, kind):
    wrapped = wrap(name, kind)
    fresh = predict(wrapped, name)
    train_a_step(wrapped, name)
    expected = predict(wrapped, name)
    assert not are_same(fresh, expected)
    stream = io.BytesIO()
    torch.save(wrapped, stream)
    stream.seek(0)
    twins = [copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped)), torch.load(stream, weights_only=False)]
    stream = io.BytesIO()
    torch.save(wrapped.state_dict(), stream)
    stream.seek(0)
    loaded = wrap(name, kind)
    loaded.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    for twin in (*twins, loaded):
        assert are_same(predict(twin, name), expected)
        assert twin.is_trained == wrapped.is_trained
    twins[0].load_state_dict(wrap(name, kind).state_dict(), strict=True)  # a copy moves alone
    assert are_same(predict(wrapped, name), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", SHAPES)
def test_other_types_of_numbers(name, kind, dtype):
    wrapped = wrap(name, kind)
    expected = predict(wrapped, name)
    half = copy.deepcopy(wrapped).to(dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    found = predict(half, name, dtype)
    size = torch.finfo(dtype).eps ** 0.5  # networks of few layers lose less than half of the digits
    for a, b in zip(found, expected, strict=True):
        if b.is_floating_point():
            assert a.isfinite().all()
            assert (a.double() - b).norm() <= 2 * size * (1 + b.norm())


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", SHAPES)
def test_a_wrapped_model_without_memory_and_back(name, kind):
    wrapped = wrap(name, kind)
    empty = copy.deepcopy(wrapped).to("meta")
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    args, kwargs = make_inputs(name)
    shapes = [x.shape for x in iter_tensors(wrapped(*args, **kwargs))]
    there = [a.to("meta") for a in args], {k: v.to("meta") for k, v in kwargs.items()}
    if name != "encoder":  # torch asks a mask whether all is masked
        assert [x.shape for x in iter_tensors(empty(*there[0], **there[1]))] == shapes
    back = empty.to_empty(device="cpu")
    back.load_state_dict(wrapped.state_dict(), strict=True)
    assert are_same(predict(back, name), predict(wrapped, name))


@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_channels_last(name):
    wrapped = wrap(name, "vote")
    expected = predict(wrapped, name)
    (x,), _ = make_inputs(name)
    wrapped.to(memory_format=torch.channels_last)
    with torch.no_grad():
        found = wrapped.predict(x.to(memory_format=torch.channels_last))
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [*SPECS, "voters of sculpt"])
@pytest.mark.parametrize("name", SHAPES)
def test_autocast_in_training(name, kind):
    wrapped = wrap(name, kind, torch.float32).train()
    args, kwargs = make_inputs(name, 6, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = list(iter_tensors(wrapped(*args, **kwargs)))
    sum(y.float().square().mean() for y in outputs if y.is_floating_point()).backward()
    gradients = [p.grad for p in wrapped.parameters() if p.requires_grad and p.grad is not None]
    assert gradients
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)
    assert sum(float(g.norm()) for g in gradients) > 0


@pytest.mark.parametrize("kind", [*SPECS, "voters of sculpt"])
@pytest.mark.parametrize("name", SHAPES)
def test_modes_reach_all_layers_but_the_norms_of_frozen_batches(name, kind):
    wrapped = wrap(name, kind)
    assert not any(m.training for m in wrapped.modules())
    frozen = wrapped.spec.freezes()
    wrapped.train()
    norms = [m for m in wrapped.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(norms) == SHAPES[name].has_norms_of_batches
    for m in wrapped.modules():
        assert m.training == (not (frozen and any(m is norm for norm in norms)))
    wrapped.eval()
    first, second = predict(wrapped, name), predict(wrapped, name)  # Dropout is off
    assert are_same(first, second)


def test_norms_of_batches_of_voters_drawn_again_are_refused_in_training():
    wrapped = vote.Wrapper(3, finetune=False)(build("resnet")).train()
    args, _ = make_inputs("resnet")
    with pytest.raises(WrapError, match=r"^BatchNorm in training mode .* 3 members; call \.eval\(\)"):
        wrapped(*args)
    for module in wrapped.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert wrapped(*args).shape == (6, 4)


@pytest.mark.parametrize("name", ["resnet", "lstm"])
def test_many_threads_predict_and_train(name):
    wrapped = wrap(name, "vote")
    args, kwargs = make_inputs(name)
    small, _ = make_inputs(name, 3)
    deterministic = [m for m in wrapped.modules() if isinstance(m, nn.Dropout)]
    for module in deterministic:
        module.p = 0.0
    calls = {
        "predict": lambda: wrapped.predict(*args, **kwargs),
        "small": lambda: wrapped.predict(*small),
        "train": lambda: (wrapped(*args, training=True),),
        "forecast": lambda: (wrapped.forecast(*args).members,),
    }
    expected = {what: call() for what, call in calls.items()}
    failures: list[object] = []

    def work(what):
        for _ in range(8):
            try:
                pairs = zip(calls[what](), expected[what], strict=True)
                failures.extend(what for a, b in pairs if not torch.equal(a, b))
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(what,)) for what in [*calls] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_fitted_density_travels_with_the_state():
    wrapped, other = (density.Wrapper()(build("resnet")) for _ in range(2))
    args, _ = make_inputs("resnet", 40)
    density.fit(wrapped, [args])
    other.load_state_dict(wrapped.state_dict(), strict=True)
    assert are_same(predict(other, "resnet"), predict(wrapped, "resnet"))
    assert are_same(predict(pickle.loads(pickle.dumps(wrapped)), "resnet"), predict(wrapped, "resnet"))
