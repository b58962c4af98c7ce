"""Inputs and outputs that have no batch in dimension 0, or hide it: each is right, or one clear line."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing import assert_close

from selfdoubt import sample, sculpt, vote
from selfdoubt.errors import ConfigError, SelfdoubtError, ShapeError, WrapError
from tests.ladder.rungs import voter
from tests.shapes import EDGES, Bert, Concatenated, Graphs, Messages, Recurrent, build, make_inputs

VOTE = vote.Wrapper(3, weight_noise=0.5)


def raises(error, match):
    return pytest.raises(error, match=match)


def check_one_line(caught):
    assert isinstance(caught.value, SelfdoubtError)
    assert "\n" not in str(caught.value)


def test_an_edge_list_must_be_named():
    (x, edges), _ = make_inputs("graph")
    for training in (True, False):
        wrapped = VOTE(build("graph"))
        with raises(
            ShapeError, r"^the input edge_index has shape \(2, 5\) .* shared_inputs=\('edge_index',\)"
        ) as caught:
            wrapped(x, edges, training=training, return_risk=not training)
        check_one_line(caught)
    with raises(ShapeError, r"^the input edge_index "):
        VOTE(build("graph")).predict(x, edge_index=edges)
    assert VOTE(build("graph"))(x, edges).shape == (6, 2)  # the base alone takes all that the model takes
    assert sculpt.Wrapper()(build("graph"))(x, edges, return_risk=True)[1].shape == (6, 2)


def test_concatenated_nodes_have_no_batch_and_a_batch_of_graphs_has():
    base = Concatenated().double().eval()
    nodes, edges = torch.randn(24, 3, dtype=torch.float64), torch.cat([EDGES + 4 * g for g in range(6)], 1)
    with raises(ShapeError, r"nodes of several graphs in one line have no batch axis: see Graphs in docs/gotchas\.md$"):
        VOTE(base).predict(nodes, edges)
    wrapped = VOTE(Graphs(base))
    x, lists = nodes.unflatten(0, (6, 4)), EDGES.repeat(6, 1, 1)
    forecast = wrapped.forecast(x, lists)
    for m in range(3):
        alone = voter(wrapped, Graphs(base), m).network
        assert_close(forecast.members[m].flatten(0, 1), alone(nodes, edges))
    assert_close(wrapped(x, lists).flatten(0, 1), base(nodes, edges))
    noisy = sample.Wrapper(3, sample.Normal(0.3))(Graphs(base))
    assert_close(noisy.forecast(x, lists).members[:, :2], noisy.forecast(x[:2], lists[:2]).members)


@pytest.mark.parametrize("edges", [EDGES + 10, torch.cat([EDGES, EDGES[:1]]), EDGES.double()])
def test_edges_that_the_model_cannot_read_are_the_models_own_error(edges):
    (x, _), _ = make_inputs("graph")
    base = build("graph")
    with pytest.raises((IndexError, ValueError, RuntimeError)) as plain:
        base(x, edges)
    with pytest.raises((IndexError, ValueError, RuntimeError)) as wrapped:
        vote.Wrapper(3, shared_inputs=("edge_index",))(base).predict(x, edges)
    assert type(wrapped.value) is type(plain.value)


class Packs(nn.Module):
    """Packs inside, which any batch can be."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 4)
        self.rnn = nn.GRU(4, 5, batch_first=True)
        self.fc = nn.Linear(5, 2)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(ids), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=ids.shape[1])
        y: Tensor = self.fc(hidden)
        return y


class Reads(nn.Module):
    """Reads sequences that are packed outside."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 5, batch_first=True)
        self.fc = nn.Linear(5, 2)

    def forward(self, packed):
        return self.fc(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def test_packed_sequences():
    packed = pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    for pattern in (None, "fc"):
        wrapped = vote.Wrapper(3, pattern)(Reads())
        with raises(ShapeError, r"^the input packed is a packed sequence, .*enforce_sorted=False$") as caught:
            wrapped.predict(packed)
        check_one_line(caught)
    base, ids, lengths = Packs().double().eval(), torch.randint(23, (4, 5)), torch.tensor([5, 2, 3, 1])
    with raises(WrapError, r"^GRU reads a packed sequence, not rows; leave it out with param_filter$"):
        VOTE(base).predict(ids, lengths)
    wrapped = vote.Wrapper(3, "embed|fc", weight_noise=0.5)(base)
    expected = torch.stack([voter(wrapped, base, m)(ids, lengths) for m in range(3)])
    assert_close(wrapped.forecast(ids, lengths).members, expected)


def test_time_in_dimension_0_is_refused():
    base = Recurrent(nn.GRU)
    base.rnn = nn.GRU(6, 5, num_layers=2, bidirectional=True)
    for spec in (vote.Wrapper(), sample.Wrapper()):
        with raises(WrapError, r"^rnn is GRU with batch_first=False, .*; build it with batch_first=True$"):
            spec(base)


class TimeFirst(nn.Module):
    """A layer that reads time in dimension 0, or one sequence without a batch, before a head that has voters."""

    def __init__(self, layer: nn.Module, turns: bool) -> None:
        super().__init__()
        self.layer, self.turns, self.fc = layer, turns, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.turns else x
        h = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        h = h[0] if isinstance(h, tuple) else h
        y: Tensor = self.fc(h.transpose(0, 1) if self.turns else h)
        return y


LAYERS = {
    "gru": lambda: nn.GRU(6, 6),
    "lstm": lambda: nn.LSTM(6, 6),
    "attention": lambda: nn.MultiheadAttention(6, 2),
    "encoder": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_without_voters_must_not_read_members_as_time(layer):
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    spec = vote.Wrapper(3, "fc", weight_noise=0.5)
    base = TimeFirst(LAYERS[layer](), turns=False).double().eval()
    wrapped = spec(base)
    with raises(
        ShapeError, r"^layer\S* \((GRU|LSTM|MultiheadAttention)\) reads time in dimension 0, .* \(20, 4, 6\), "
    ) as e:
        wrapped.predict(x)
    check_one_line(e)
    with raises(ShapeError, "reads time in dimension 0"):
        wrapped(x.repeat(3, 1, 1)[:6], training=True)
    assert torch.equal(wrapped(x), base(x))  # the base alone reads as it always did
    turning = TimeFirst(LAYERS[layer](), turns=True).double().eval()
    wrapped = spec(turning)
    expected = torch.stack([voter(wrapped, turning, m)(x) for m in range(3)])
    assert_close(wrapped.forecast(x).members, expected)
    assert not turning.layer._forward_pre_hooks


@pytest.mark.parametrize("pattern", ["fc", None])
def test_one_sequence_without_a_batch_is_no_batch(pattern):
    base = TimeFirst(nn.GRU(6, 6, batch_first=True), turns=False)
    with raises((ShapeError, WrapError), r"reads one sequence without a batch") as caught:
        vote.Wrapper(3, pattern)(base).predict(torch.randn(5, 6))
    check_one_line(caught)


def test_an_error_of_the_model_says_how_members_ran():
    wrapped = vote.Wrapper(3)(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(1), nn.Linear(4, 2)))
    with raises(RuntimeError, "channels") as caught:
        wrapped.predict(torch.randn(3, 3, 3))
    (note,) = caught.value.__notes__
    assert note.startswith("selfdoubt ran 4 members as rows of dimension 0, with inputs of shape (12, 3, 3): if")


def test_arrays_are_not_tensors():
    for spec in (vote.Wrapper(), sculpt.Wrapper()):
        with raises(ShapeError, r"got input: ndarray; convert arrays by torch\.from_numpy\(x\)$"):
            spec(nn.Sequential(nn.Linear(3, 2))).predict(torch.randn(4, 3).numpy())


class Grouped(nn.Module):
    """Takes a dict of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        y: Tensor = self.fc(batch["x"]) * batch["weight"][:, None]
        return y


def test_dicts_and_keyword_only_inputs():
    base, batch = Grouped().double().eval(), {"x": torch.randn(6, 3).double(), "weight": torch.rand(6).double()}
    wrapped = VOTE(base)
    assert_close(wrapped.forecast(batch).members[2], voter(wrapped, base, 2)(batch))
    assert wrapped.train()(batch).shape == (6, 2)
    encoder = Bert().eval()
    _, inputs = make_inputs("bert")
    one = {name: value[:1] for name, value in inputs.items()}
    assert vote.Wrapper(shared_inputs=("attention_mask",))(encoder).predict(**one).mean["logits"].shape == (1, 3)
    with raises(ConfigError, r"^shared_inputs names \['mask'\]"):
        vote.Wrapper(shared_inputs=("mask",))(encoder)(**inputs)


@dataclass(frozen=True)
class Boxes:
    """Outputs of a model, with a check that a mean must pass and one field that is computed."""

    corners: Tensor
    classes: Tensor
    image: int = 8
    area: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", self.corners.prod(-1))


class Detects(nn.Module):
    """Returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Boxes:
        y = self.fc(x)
        return Boxes(y, y.argmax(-1))


def test_a_dataclass_of_outputs_keeps_its_class():
    base, x = Detects().double().eval(), torch.randn(6, 3, dtype=torch.float64)
    wrapped = vote.Wrapper(5, weight_noise=0.5, answer_from="mean")(base)
    alone = [voter(wrapped, base, m)(x) for m in range(5)]
    mean, risk = wrapped.predict(x)
    assert isinstance(mean, Boxes)
    assert isinstance(risk, Boxes)
    for name in ("corners", "area"):
        members = torch.stack([getattr(a, name) for a in alone])
        assert_close(getattr(mean, name), members.mean(0))
        assert_close(getattr(risk, name), members.std(0, correction=0))
    # Integers: the most frequent class, and the share of members that gave another.
    classes = torch.stack([a.classes for a in alone])
    assert torch.equal(mean.classes, classes.mode(0).values)
    assert_close(risk.classes, (classes != mean.classes).float().mean(0))
    assert mean.image == 8
    assert risk.image is None
    _, scale = sculpt.Wrapper()(base)(x, return_risk=True)
    assert scale.corners.shape == (6, 4)
    assert scale.area is None
    for m in range(5):
        assert torch.equal(vote.merge_voter(wrapped, m)(x).classes, alone[m].classes)


class Answer:
    """A class of outputs that no walk can look into."""

    def __init__(self, y: Tensor) -> None:
        self.y = y


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda y: y.mean(), r"shapes \[\(\)\]"),
        (lambda y: {"loss": y.square().mean(), "size": torch.ones(3)}, r"shapes \[\(\), \(3,\)\]"),
        (lambda y: y.T, r"shapes \[\(2, 24\)\]"),
        (Answer, "Answer, in which there is no tensor"),
        (lambda y: y.tolist(), "list, in which there is no tensor"),
    ],
    ids=["loss", "dict", "transposed", "class", "list"],
)
def test_an_output_without_a_batch_has_no_risk_and_says_so(change, what):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return change(self.fc(x))

    wrapped, x = VOTE(Model()), torch.randn(6, 3)
    with raises(
        ShapeError, rf"^the 24 rows of 4 members must be in dimension 0 of an output, .* gives {what}"
    ) as caught:
        wrapped.predict(x)
    check_one_line(caught)
    assert type(wrapped(x)) is type(change(torch.ones(6, 2)))  # the base alone may return anything


def test_scales_follow_a_reshaped_output():
    class Squeezes(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.fc, self.change = nn.Linear(3, 4), change

        def forward(self, x):
            return self.change(self.fc(x))

    x = torch.randn(6, 3)
    changes = {
        (6, 2, 2): lambda y: y.unflatten(1, (2, 2)), (6, 4, 1): lambda y: y[..., None], (24,): lambda y: y.flatten(),
    }  # fmt: skip
    for shape, change in changes.items():
        wrapped = sculpt.Wrapper()(Squeezes(change))
        wrapped.module.fc.branch[-1].weight.data.normal_()
        y, scale = wrapped(x, return_risk=True)
        assert y.shape == scale.shape == shape
        assert_close(scale, change(wrapped.module.fc.scale(x)))
    for change in (lambda y: y.T, lambda y: y[:, :2], lambda y: (y[:, :2], y[:, 2:])):
        with raises(WrapError, r"^the wrapped head gives \[\(6, 4\)\], and no output has that shape: .*param_filter$"):
            sculpt.Wrapper()(Squeezes(change))(x, return_risk=True)


def test_voters_that_cannot_be_merged():
    with raises(WrapError, r"^only a model that vote\.Wrapper has wrapped has voters, got Wrapped of Wrapper\("):
        vote.merge_voter(sample.Wrapper()(Messages()), 0)
    for number in (3, -1, True):
        with raises(ConfigError, r"^voter must be a number from 0 to 2, got "):
            vote.merge_voter(VOTE(build("unet")), number)


def test_one_sequence_at_a_time_is_no_batch_of_members():
    class OneByOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(torch.stack([self.rnn(sequence)[0][-1] for sequence in x]))
            return y

    base = OneByOne().double().eval()
    wrapped = vote.Wrapper(3, "fc", weight_noise=0.5)(base)
    x = torch.randn(1, 12, 3, dtype=torch.float64)  # 12 steps, 4 rows
    expected = torch.stack([voter(wrapped, base, m)(x) for m in range(3)])
    assert_close(wrapped.forecast(x).members, expected)


def test_statistics_of_a_frozen_model_stay() -> None:
    base = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(1), nn.Linear(12, 2))
    before = base[0].running_mean.clone()
    vote.Wrapper(3, "2")(base).train()(torch.randn(6, 3, 4) + 5)
    assert torch.equal(base[0].running_mean, before)


def test_a_voter_whose_weight_is_computed_cannot_be_merged() -> None:
    base = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    wrapped = vote.Wrapper(3)(base)
    with raises(WrapError, r"computes its weight from others .* remove the parametrization") as caught:
        vote.merge_voter(wrapped, 0)
    check_one_line(caught)
