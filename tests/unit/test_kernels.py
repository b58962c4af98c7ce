"""Each kernel against the loop, and both against one plain copy of the leaf per member."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from selfdoubt import kernels, vote
from selfdoubt.errors import ShapeError, WrapError
from selfdoubt.vote import VotingLeaf
from tests.ladder.rungs import looped, voter
from tests.zoo import causal, prompts


class Attends(nn.Module):
    """Self-attention with a mask over its keys."""

    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x):
        hidden = torch.zeros(x.shape[:2], dtype=torch.bool)
        hidden[:, -1] = True
        return self.attention(x, x, x, key_padding_mask=hidden)


class Recurs(nn.Module):
    """A recurrent layer that starts from a state it is given, and gives its last one."""

    def __init__(self, kind, layers):
        super().__init__()
        self.layer = kind(4, 3, num_layers=layers, batch_first=True)
        self.has_one_state = kind is nn.GRU

    def forward(self, x):
        h = x[:, 0, :3].expand(self.layer.num_layers, -1, -1).contiguous()
        y, state = self.layer(x, hx=h) if self.has_one_state else self.layer(x, (h, 2 * h))
        states = state if isinstance(state, tuple) else (state,)
        return y, *(s.transpose(0, 1) for s in states)


class ByName(nn.Module):
    """Calls its leaf with a keyword."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(input=x)


FLOATS, IDS = torch.randn(6, 4, 4), torch.randint(7, (6, 5))
IMAGES = torch.randn(6, 4, 7, 7)
FAST = {
    "linear": (nn.Linear(4, 3), FLOATS),
    "linear-flat": (nn.Linear(4, 3), FLOATS[:, 0]),
    "linear-deep": (nn.Linear(7, 2), IMAGES),
    "linear-no-bias": (nn.Linear(4, 3, bias=False), FLOATS),
    "embedding": (nn.Embedding(7, 4), IDS),
    "embedding-flat": (nn.Embedding(7, 4, padding_idx=0), IDS[:, 0]),
    "conv1d": (nn.Conv1d(4, 6, 3), FLOATS),
    "conv1d-all": (nn.Conv1d(4, 6, 2, stride=2, padding=3, dilation=2, groups=2), FLOATS),
    "conv2d": (nn.Conv2d(4, 6, 3), IMAGES),
    "conv2d-all": (nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), groups=4, bias=False), IMAGES),
    "conv2d-same": (nn.Conv2d(4, 2, 3, padding="same"), IMAGES),
    "hf-conv1d": (Conv1D(3, 4), FLOATS),
    "layernorm": (nn.LayerNorm(4), FLOATS),
    "layernorm-two-axes": (nn.LayerNorm((7, 7)), IMAGES),
    "layernorm-no-bias": (nn.LayerNorm(4, bias=False), FLOATS),
    "rmsnorm": (nn.RMSNorm(4), FLOATS),
}
SLOW = {
    "llama-rmsnorm": (LlamaRMSNorm(4), FLOATS),
    "groupnorm": (nn.GroupNorm(2, 4), FLOATS),
    "conv1d-circular": (nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), FLOATS),
    "conv3d": (nn.Conv3d(1, 2, 3), IMAGES[:, None]),
    "prelu": (nn.PReLU(4), FLOATS),
    "weight-norm": (weight_norm(nn.Linear(4, 3)), FLOATS),
    "attention": (Attends(batch_first=True), FLOATS),
    "lstm": (Recurs(nn.LSTM, 1), FLOATS),
    "lstm-as-many-layers-as-rows": (Recurs(nn.LSTM, 2), FLOATS),
    "gru": (Recurs(nn.GRU, 2), FLOATS),
    "lstm-bidirectional": (nn.Sequential(nn.LSTM(4, 3, batch_first=True, bidirectional=True)), FLOATS),
}
MEMBERS = 3


def wrapped_leaf(leaf, part=".", **options):
    base = nn.Sequential(leaf).double().eval()
    return base, vote.Wrapper(n_voters=MEMBERS, param_filter=part, weight_noise=0.7, alpha=0.6, **options)(base)


def rows(wrapped, x):
    with torch.no_grad():
        return wrapped.forward_rows(x.double() if x.is_floating_point() else x)[0]


def one_by_one(wrapped, base, x):
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        found = [voter(wrapped, base, m)(share) for m, share in enumerate(x.chunk(MEMBERS))]
    return found


def assert_same(found, expected):
    """Equal to the members' outputs one after another, in nested tuples too."""
    if isinstance(found, tuple):
        for i, part in enumerate(found):
            assert_same(part, [e[i] for e in expected])
    elif isinstance(found, torch.Tensor) and len(found) == 6:
        assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)
        assert (expected[0] - expected[1]).abs().max() > 1e-3
    elif isinstance(found, torch.Tensor):  # a recurrent layer's state, rows in dimension 1
        assert_close(found, torch.cat(expected, 1), rtol=0, atol=1e-12)
    else:
        assert found is expected[0] is None


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("part", ["weight", "bias", "."])
def test_kernel_against_loop_and_plain_copies(name, part):
    leaf, x = FAST[name]
    if part == "bias" and getattr(leaf, "bias", None) is None:
        pytest.skip("this leaf has no bias")
    base, wrapped = wrapped_leaf(leaf, part)
    assert wrapped.module[0].kernel is not None
    found = rows(wrapped, x)
    assert_close(found, rows(looped(wrapped), x), rtol=0, atol=1e-12)
    assert_same(found, one_by_one(wrapped, base, x))


@pytest.mark.parametrize("part", ["weight", "."])
@pytest.mark.parametrize("name", ["linear", "linear-flat", "embedding", "embedding-flat", "hf-conv1d", "conv2d"])
def test_low_rank_kernel_against_plain_copies_of_full_rank(name, part):
    leaf, x = FAST[name]
    base, wrapped = wrapped_leaf(leaf, part, rank=2)
    is_low_rank = "conv2d" not in name
    assert ("weight_a" in wrapped.module[0].deviations) == is_low_rank
    found = rows(wrapped, x)
    assert_close(found, rows(looped(wrapped), x), rtol=0, atol=1e-12)
    assert_same(found, one_by_one(wrapped, base, x))


@pytest.mark.parametrize("name", SLOW)
def test_a_leaf_without_a_kernel_runs_once_per_member(name):
    leaf, x = SLOW[name]
    base, wrapped = wrapped_leaf(leaf)
    assert all(m.kernel is None for m in wrapped.modules() if isinstance(m, VotingLeaf))
    assert_same(rows(wrapped, x), one_by_one(wrapped, base, x))


@pytest.mark.parametrize("name", ["llama-rmsnorm", "weight-norm", "lstm", "attention"])
def test_gradients_of_the_loop_reach_every_member(name):
    leaf, x = SLOW[name]
    _, wrapped = wrapped_leaf(leaf)
    y, _ = wrapped.forward_rows(x.double())
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    for parameter in (p for p in wrapped.parameters() if p.requires_grad):
        assert (parameter.grad.flatten(1).abs().amax(1) > 0).any()


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_fused_transformer_layer_does_not_step_over_replaced_leaves(norm_first):
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=norm_first)
    with warnings.catch_warnings():  # nested tensors, which nobody asked for, warn that they are a prototype
        warnings.simplefilter("ignore")
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for part in ("linear1", "self_attn", "norm", "."):
        base, wrapped = wrapped_leaf(encoder, part)
        assert_same(rows(wrapped, FLOATS), one_by_one(wrapped, base, FLOATS))
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_leaf_called_by_keyword():
    base, wrapped = wrapped_leaf(ByName())
    assert_same(rows(wrapped, FLOATS), one_by_one(wrapped, base, FLOATS))


class Positions(nn.Module):
    """Adds learnt positions, looked up once for all rows of a batch."""

    def __init__(self, axes):
        super().__init__()
        self.axes = axes
        self.positions = nn.Embedding(5, 4)
        self.project = nn.Linear(4, 4)

    def forward(self, x):
        ids = torch.arange(x.shape[1])
        return x + self.project(self.positions(ids[None] if self.axes == 2 else ids))


@pytest.mark.parametrize("axes", [1, 2])
def test_a_line_shared_by_all_rows_serves_every_member(axes):
    x = torch.randn(6, 4, 4)
    base, wrapped = wrapped_leaf(Positions(axes=axes))
    assert_same(rows(wrapped, x), one_by_one(wrapped, base, x))


@pytest.mark.parametrize("length", [3, 6, 12])
def test_positions_as_many_as_rows_are_no_rows(length):
    """The batch of 6 rows, or a multiple of it, is as long as the list of positions."""
    base = Positions(axes=1)
    base.positions = nn.Embedding(length, 4)
    base, wrapped = wrapped_leaf(base)
    x = torch.randn(6, length, 4)
    assert_same(rows(wrapped, x), one_by_one(wrapped, base, x))
    assert wrapped(x[:3], training=True).shape == (3, length, 4)


def test_ids_of_the_batch_that_count_up_are_rows():
    base, wrapped = wrapped_leaf(nn.Sequential(nn.Embedding(9, 4)))
    ids = torch.arange(6)
    assert_same(rows(wrapped, ids), one_by_one(wrapped, base, ids))
    assert wrapped(ids, training=True).shape == (6, 4)


class Masked(nn.Module):
    """Attends backwards, by a mask of all rows or of each head of each row."""

    def __init__(self, each):
        super().__init__()
        self.attention, self.each = nn.MultiheadAttention(4, 2, batch_first=True), each

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        mask = mask.expand(2 * len(x), -1, -1) if self.each else mask
        return self.attention(x, x, x, attn_mask=mask)[0]


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("length", [5, 6, 12])
def test_an_attention_mask_is_no_row(length, each):
    base, wrapped = wrapped_leaf(Masked(each))
    x = torch.randn(6, length, 4)
    assert_same(rows(wrapped, x), one_by_one(wrapped, base, x))


def test_lines_that_cannot_be_rows_are_refused():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.project(torch.ones(4, 4))

    _, wrapped = wrapped_leaf(Table())
    with pytest.raises(ShapeError, match=r"^0.project got 4 lines .* 6 rows; .*with param_filter="):
        rows(wrapped, torch.randn(6, 4, 4))


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.layer(pack_padded_sequence(x, [4] * len(x), batch_first=True))[1][0][-1]


class Scores(nn.Module):
    """A leaf that gives a number for the whole batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return (x * self.weight).mean()


@pytest.mark.parametrize(("leaf", "words"), [(Packs(), "packed sequence"), (Scores(), r"shape \(\) for 2 rows")])
def test_a_leaf_whose_rows_cannot_be_told_is_refused(leaf, words):
    _, wrapped = wrapped_leaf(leaf)
    with pytest.raises(WrapError, match=words):
        rows(wrapped, FLOATS)


@pytest.mark.parametrize(
    "leaf",
    [nn.LSTM(4, 3), nn.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2), nn.TransformerDecoderLayer(4, 2)],
)
def test_time_in_dimension_0_is_refused(leaf):
    with pytest.raises(WrapError, match=r"^0.* batch_first=False, .* build it with batch_first=True$"):
        wrapped_leaf(leaf)


def test_one_expert_of_a_mixture_is_refused():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2)])})
    with pytest.raises(WrapError, match=r"^experts\.0 is one expert .* param_filter="):
        vote.Wrapper()(model)


def test_a_subclass_may_compute_something_else():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base, wrapped = wrapped_leaf(Twice(4, 3))
    assert wrapped.module[0].kernel is None
    assert_same(rows(wrapped, FLOATS), one_by_one(wrapped, base, FLOATS))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks by the old name
@pytest.mark.parametrize("rank", [None, 2])
def test_adapter_layers_keep_their_adapter(rank):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    base = peft.get_peft_model(copy.deepcopy(causal("llama")), config).eval()
    wrapped = vote.Wrapper(n_voters=3, rank=rank, param_filter="q_proj|v_proj")(base)
    ids = torch.tensor(prompts(6, 6))
    with torch.no_grad():
        found = wrapped.forecast(input_ids=ids)["logits"].members
        for m, logits in enumerate(found):
            alone = copy.deepcopy(base)
            for name in wrapped.leaf_names:
                leaf = wrapped.module.get_submodule(name)
                delta = leaf.deviations["weight"][m] if rank is None else (
                    leaf.deviations["weight_b"][m].T @ leaf.deviations["weight_a"][m]
                )  # fmt: skip
                alone.get_submodule(name).base_layer.weight += delta
            assert_close(logits, alone(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def _quantized(kind):
    bnb = pytest.importorskip("bitsandbytes")
    layer = (
        bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
        if kind == "4bit"
        else bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    )
    return nn.Sequential(layer.to("cpu")).eval()


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_low_rank_voters_beside_packed_weights(kind):
    base, x = _quantized(kind), torch.randn(6, 64)
    wrapped = vote.Wrapper(n_voters=3, rank=4, param_filter="weight")(base)
    factors = wrapped.module[0].deviations
    with torch.no_grad():
        found, plain = wrapped.forward_rows(x)[0], base(x)
    delta = x.view(3, 2, 64) @ factors["weight_a"].transpose(1, 2) @ factors["weight_b"]
    assert_close(found, plain + delta.flatten(0, 1), rtol=1e-5, atol=1e-5)
    # weight_noise is relative to the weights, which can only be seen through the layer.
    weight_std = nn.Linear(64, 32).weight.std()
    assert 0.5 < (factors["weight_a"].transpose(1, 2) @ factors["weight_b"]).std() / (0.2 * weight_std) < 2


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_full_rank_beside_packed_weights_names_the_low_rank_way(kind):
    with pytest.raises(WrapError, match=r"^0 holds packed .*n_voters=5, rank=16"):
        vote.Wrapper(n_voters=5)(_quantized(kind))


def test_only_exactly_known_types_have_a_kernel():
    assert kernels.find_kernel(nn.Linear(1, 1)) is kernels.linear
    assert kernels.find_kernel(nn.Embedding(1, 1, max_norm=1.0)) is None
    assert kernels.find_kernel(LlamaRMSNorm(1)) is None
