"""Deviations added in place, without gradients, against the kernel that records them and against the loop."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from selfdoubt import vote
from selfdoubt.factors import FEW_ROWS
from tests.ladder.rungs import looped

#: Largest difference, relative to the largest output; in half precision each way rounds at other places.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
VOTERS = 3


class Attention(nn.Module):
    """Projections that read the same tensor, or with ``apart`` equal copies of it."""

    def __init__(self, *, apart: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 24, bias=bias)
        self.k_proj = nn.Linear(16, 8, bias=bias)
        self.v_proj = nn.Linear(16, 8, bias=bias)
        self.o_proj = nn.Linear(24, 16, bias=bias)
        self.apart = apart

    def forward(self, x):
        q, k, v = (p(x.clone() if self.apart else x) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj((q + torch.cat([k, v, k], -1)).tanh())


class InPlace(nn.Module):
    """Changes the tensor that its projections read between them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        x = x.clone()
        x += self.q_proj(x)
        x += self.k_proj(x)
        return x


class CountKernels(TorchDispatchMode):
    """Counts the operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def build(model=None, dtype=torch.float64, **options):
    torch.manual_seed(0)
    base = (Attention() if model is None else model).to(dtype).eval().requires_grad_(False)
    settings = {"param_filter": "weight", "rank": 3, "weight_noise": 0.7, "alpha": 0.6} | options
    return vote.Wrapper(n_voters=VOTERS, **settings)(nn.Sequential(base))


def slow(wrapped, x):
    """The kernel that records gradients."""
    with torch.enable_grad():
        return wrapped.forward_rows(x)[0].detach()


def fast(wrapped, x, **options):
    with torch.inference_mode():
        return wrapped.forward_rows(x, **options)[0].clone()


def assert_same(ours, theirs, dtype=torch.float64):
    assert ours.dtype == theirs.dtype
    tolerance = TOLERANCES[dtype] * theirs.abs().max().item()
    assert_close(ours, theirs, rtol=0, atol=tolerance)


def rows_of(wrapped, per_member, dtype=torch.float64):
    members = wrapped.spec.members(training=False)
    generator = torch.Generator().manual_seed(5)
    return torch.randn(members * per_member, 1, 16, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("per_member", [1, FEW_ROWS, 3 * FEW_ROWS])
@pytest.mark.parametrize("answer_from", ["mean", "base"])
@pytest.mark.parametrize("param_filter", ["weight", "."])
def test_in_place_against_the_recording_kernel_and_the_loop(dtype, per_member, answer_from, param_filter):
    wrapped = build(dtype=dtype, answer_from=answer_from, param_filter=param_filter)
    x = rows_of(wrapped, per_member, dtype)
    ours = fast(wrapped, x)
    assert_same(ours, slow(wrapped, x), dtype)
    assert_same(ours, fast(looped(wrapped), x), dtype)
    assert_same(fast(wrapped, x, same_weights=True), ours, dtype)
    with torch.no_grad():
        assert_same(wrapped.forward_rows(x)[0], ours, dtype)
    first = per_member if answer_from == "base" else 0
    # The base model's rows, to the bit, are those of the layers alone.
    for leaf in wrapped.modules():
        if isinstance(leaf, vote.VotingLeaf):
            leaf.deviations = nn.ParameterDict({name: torch.zeros_like(p) for name, p in leaf.deviations.items()})
    assert torch.equal(fast(wrapped, x)[:first], ours[:first])
    assert (fast(wrapped, x)[first:] - ours[first:]).abs().max() > 0.05


@pytest.mark.parametrize("leaf", [nn.Linear(16, 8), Conv1D(8, 16)], ids=["linear", "hf-conv1d"])
@pytest.mark.parametrize("rank", [None, 2])
def test_full_and_transposed_weights(leaf, rank):
    wrapped = build(copy.deepcopy(leaf), rank=rank, param_filter=".", answer_from="base")
    x = rows_of(wrapped, 4)
    assert_same(fast(wrapped, x), slow(wrapped, x))


@pytest.mark.parametrize("model", [Attention(apart=True), InPlace()], ids=["copies", "in-place"])
def test_inputs_that_are_not_the_same_are_not_shared(model):
    wrapped = build(model)
    x = rows_of(wrapped, 2)
    with torch.no_grad():
        assert_same(wrapped.forward_rows(x)[0], slow(wrapped, x))


def test_leaves_that_read_the_same_tensor_share_their_first_product():
    counts = {}
    for name, model in {"shared": Attention(bias=False), "apart": Attention(apart=True, bias=False)}.items():
        wrapped = build(model)
        x = rows_of(wrapped, 1)
        fast(wrapped, x)
        with CountKernels() as counter:
            fast(wrapped, x, same_weights=True)
        counts[name] = counter.counts
    assert (counts["shared"]["bmm"], counts["shared"]["baddbmm_"]) == (2, 4)  # q, k and v, then o
    assert (counts["apart"]["bmm"], counts["apart"]["baddbmm_"]) == (4, 4)
    assert "_to_copy" not in counts["shared"]
    assert "add" not in {name for name, n in counts["shared"].items() if n > 1}  # the one is the model's own


def change_by_optimizer(fused):
    def change(wrapped, x):
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
        wrapped.forward_rows(x)[0].square().sum().backward()
        optimizer.step()
        return wrapped

    return change


def change_by_state(wrapped, x):
    state = {name: 2 * p if "deviations" in name else p for name, p in wrapped.state_dict().items()}
    wrapped.load_state_dict(state)
    return wrapped


def change_by_data(wrapped, x):
    for name, parameter in wrapped.named_parameters():
        if "deviations" in name:
            parameter.data = parameter.data * 2
    return wrapped


def change_by_replacing(wrapped, x):
    leaf = wrapped.module[0].k_proj
    leaf.deviations["weight_a"] = nn.Parameter(leaf.deviations["weight_a"].detach() * 2)
    return wrapped


def change_copy(wrapped, x):
    return change_by_state(copy.deepcopy(wrapped), x)


def change_pickled(wrapped, x):
    return change_by_state(pickle.loads(pickle.dumps(wrapped)), x)


CHANGES = {
    "optimizer": change_by_optimizer(False), "fused optimizer": change_by_optimizer(True), "state": change_by_state,
    "data": change_by_data, "new parameter": change_by_replacing, "deepcopy": change_copy, "pickle": change_pickled,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_parameters_is_seen_even_where_none_is_announced(change, dtype):
    wrapped = build(dtype=dtype)
    x = rows_of(wrapped, 2, dtype)
    before = fast(wrapped, x)
    changed = CHANGES[change](wrapped, x)
    ours = fast(changed, x, same_weights=True)
    assert_same(ours, slow(changed, x), dtype)
    assert (ours - before).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_change_without_a_version_is_seen_by_the_next_run(dtype):
    wrapped = build(dtype=dtype)
    x = rows_of(wrapped, 2, dtype)
    before = fast(wrapped, x)
    addresses = {id(s.a): s.a.data_ptr() for s in wrapped.module[0].q_proj.group._stacks.values()}
    for name, parameter in wrapped.named_parameters():
        if "deviations" in name:
            parameter.data.mul_(2)
    ours = fast(wrapped, x)
    assert_same(ours, slow(wrapped, x), dtype)
    assert (ours - before).abs().max() > 0.05
    # What a captured graph would read stays in its place.
    stacks = wrapped.module[0].q_proj.group._stacks.values()
    assert {id(s.a): s.a.data_ptr() for s in stacks} == addresses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_type(dtype):
    wrapped = build()
    fast(wrapped, rows_of(wrapped, 2))
    wrapped.to(dtype)
    x = rows_of(wrapped, 2, dtype)
    assert_same(fast(wrapped, x, same_weights=True), slow(wrapped, x), dtype)


def test_a_copy_shares_nothing_with_its_original():
    wrapped = build()
    x = rows_of(wrapped, 2)
    before = fast(wrapped, x)
    other = copy.deepcopy(wrapped)
    assert other.module[0].q_proj.group is other.module[0].v_proj.group is not wrapped.module[0].q_proj.group
    change_by_state(other, x)
    assert (fast(other, x) - before).abs().max() > 0.05
    assert torch.equal(fast(wrapped, x, same_weights=True), before)


def test_names_of_parameters_are_as_before():
    wrapped = build()
    fast(wrapped, rows_of(wrapped, 2))
    names = [name for name in wrapped.state_dict() if "q_proj" in name]
    assert names == [
        f"module.0.q_proj.{rest}" for rest in ("leaf.weight", "leaf.bias", "deviations.weight_a", "deviations.weight_b")
    ]


def test_what_a_hook_keeps_of_the_frozen_layer_is_not_changed():
    wrapped, kept = build(), []
    layer = wrapped.module[0].q_proj.leaf
    layer.register_forward_hook(lambda module, args, y: kept.append((args[0], y)))
    x = rows_of(wrapped, 2)
    assert_same(fast(wrapped, x), slow(wrapped, x))
    with torch.no_grad():
        assert_same(kept[0][1], nn.functional.linear(kept[0][0], layer.weight, layer.bias))


def test_autocast_and_mixed_types_take_the_recording_kernel():
    wrapped = build(dtype=torch.float32)
    x = rows_of(wrapped, 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(wrapped, x), slow(wrapped, x))
    for name, parameter in wrapped.named_parameters():
        if "deviations" in name:
            parameter.data = parameter.data.double()
    assert_same(fast(wrapped, x), slow(wrapped, x), torch.float32)
