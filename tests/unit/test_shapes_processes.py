"""A plain PyTorch loop over two processes: DDP and FSDP2 of wrapped models against one process with all of the data."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from selfdoubt import sculpt, vote
from selfdoubt.tree import iter_tensors
from tests.shapes import SHAPES, build, make_inputs

ROWS, STEPS = 12, 3


def wrap(name, kind):
    shape = SHAPES[name]
    if kind == "vote":
        wrapped = vote.Wrapper(3, weight_noise=0.3, shared_inputs=shape.shared)(build(name))
    else:
        wrapped = sculpt.Wrapper(param_filter=shape.head)(build(name))
    for module in wrapped.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return wrapped


def batch(name, ranks):
    """Rows of these processes, of two."""
    (x, *more), kwargs = make_inputs(name, ROWS)
    half = ROWS // 2
    assert not kwargs
    return [(x[r * half : (r + 1) * half], *more) for r in ranks]


def loss(model, args, kind):
    if kind == "sculpt":
        y, scale = model(*args, return_risk=True)
        return sculpt.Normal.nll((y, scale), torch.zeros_like(y)).mean()
    return sum((y - 1).square().mean() for y in iter_tensors(model(*args)))


def train(model, name, kind, ranks):
    """Train as anybody would; the mean over ranks is the joined gradient."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for _ in range(STEPS):
        optimizer.zero_grad()
        for args in batch(name, ranks):
            (loss(model, args, kind) / len(ranks)).backward()
        optimizer.step()
    model.eval()


def start(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


def work_with_copies(rank, folder, name, kind):
    start(rank, folder)
    wrapped = wrap(name, kind)
    before = wrapped.is_trained, wrapped.answers_from_base
    train(DistributedDataParallel(wrapped), name, kind, [rank])
    after = wrapped.is_trained, wrapped.answers_from_base
    torch.save({"state": wrapped.state_dict(), "before": before, "after": after}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def work_with_shards(rank, folder, name, kind):
    start(rank, folder)
    wrapped = wrap(name, kind)
    mesh = init_device_mesh("cpu", (2,))
    for leaf in (m for m in wrapped.modules() if isinstance(m, nn.Linear)) if kind == "sculpt" else ():
        fully_shard(leaf, mesh=mesh)
    fully_shard(wrapped, mesh=mesh)
    register_fsdp_forward_method(wrapped, "forecast")
    before = wrapped.is_trained, wrapped.answers_from_base
    args = make_inputs(name, ROWS)[0]
    with torch.no_grad():
        first = wrapped(*args)
    wrapped.reshard()
    train(wrapped, name, kind, [rank])
    after = wrapped.is_trained, wrapped.answers_from_base
    options = StateDictOptions(full_state_dict=True, strict=True)
    state = get_model_state_dict(wrapped, options=options)
    set_model_state_dict(wrapped, dict(state), options=options)  # it shards what it is given
    with torch.no_grad():
        mean, risk = wrapped.predict(*args)
        spread = wrapped.forecast(*args).mean
    results = {"state": state, "before": before, "after": after, "first": first, "mean": mean, "risk": risk}
    torch.save(results | {"forecast": spread}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


CASES = [("resnet", "vote"), ("graph", "vote"), ("resnet", "sculpt")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_processes_with_copies_against_one(tmp_path, name, kind):
    start_processes(work_with_copies, args=(str(tmp_path), name, kind), nprocs=2, start_method="fork")
    alone = wrap(name, kind)
    train(alone, name, kind, [0, 1])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        # A sculpt has no members whose mean could answer; voters' answers from here on.
        assert found["before"] == (False, kind == "vote")
        assert found["after"] == (True, False)
        fresh = wrap(name, kind)
        fresh.load_state_dict(found["state"], strict=True)
        assert fresh.is_trained
        for (n, a), b in zip(fresh.named_parameters(), alone.parameters(), strict=True):
            assert_close(a, b, rtol=1e-9, atol=1e-11, msg=n)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_two_processes_with_shards_against_one(tmp_path, name, kind):
    start_processes(work_with_shards, args=(str(tmp_path), name, kind), nprocs=2, start_method="fork")
    alone = wrap(name, kind)
    args = make_inputs(name, ROWS)[0]
    first = alone(*args)
    train(alone, name, kind, [0, 1])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["before"] == (False, kind == "vote")
        assert found["after"] == (True, False)
        assert_close(found["first"], first)
        fresh = wrap(name, kind)
        fresh.load_state_dict(found["state"], strict=True)
        for (n, a), b in zip(fresh.named_parameters(), alone.parameters(), strict=True):
            assert_close(a, b, rtol=1e-9, atol=1e-11, msg=n)
        mean, risk = fresh.predict(*args)
        assert_close(found["mean"], mean)
        assert_close(found["forecast"], mean)
        assert_close(found["risk"], risk)
