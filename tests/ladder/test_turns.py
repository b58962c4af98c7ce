"""Turns: nothing reaches the host, one graph holds all of it, and batches in slots say what sequences say alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from selfdoubt import sample, sculpt, vote
from selfdoubt.lm.decode import DecodeBatch, TokenSequence, decode_batch
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.probes import find_probes
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.static.decoder import StaticDecoder
from selfdoubt.lm.static.step import StaticStep
from selfdoubt.lm.static.stepper import Buckets, build_allocator
from selfdoubt.lm.static.turn import DecodeTurn, TurnBuffers, describe_sampling
from selfdoubt.lm.stepper import HFStepper
from tests.ladder import test_joining
from tests.ladder.test_joining import GUESTS, alone, same, sampling, together
from tests.ladder.test_static import fitted
from tests.plain import run
from tests.zoo import FAMILIES, causal, prompts

SMALL = Buckets(first_length=8, doubled_length=16)
VOTE = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5)
WRAPPERS = {
    "none": lambda model: model,
    "vote-base": replace(VOTE, answer_from="base"),
    "sample": sample.Wrapper(n_samples=2, distribution=sample.Bernoulli(0.3)),
    "vote-sculpt": lambda model: VOTE(sculpt.Wrapper(rank=4)(model)),
    "density": fitted,
}
#: Operators that wait for the device, or whose result's shape depends on values.
WAITS = {
    "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.masked_select.default", "aten.equal.default",
    "aten.is_nonzero.default", "aten.unique2.default", "aten._unique2.default", "aten.unique_dim.default",
}  # fmt: skip


class ForbidWaiting(TorchDispatchMode):
    """A mode in which what waits for the device is an error, as it is while a CUDA graph is captured."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert str(function) not in WAITS, f"{function} waits for the device"
        if str(function).startswith("aten.index"):  # a mask gives as many elements as it has ones
            masks = [x for arg in args if isinstance(arg, (list, tuple)) for x in arg if x is not None]
            assert all(x.dtype != torch.bool for x in masks), f"{function} with a mask waits for the device"
        return function(*args, **(kwargs or {}))


def prepared(model, draws="top_p", alternatives=3):
    """A turn over two sequences in four slots, and its cache."""
    stepper = HFStepper(model, [0], None, find_probes(model))
    with torch.inference_mode():
        prefill(stepper, prompts(4, 4))
        allocator = build_allocator(stepper, SMALL)
        allocator.reserve(3, 10)
        step = StaticStep(stepper, allocator.cache)
        buffers = TurnBuffers(torch.device("cpu"))
        slots = allocator.admit(stepper)
        samplings = [Sampling(), Sampling(temperature=0.7, top_p=0.9)]
        uniform = [torch.tensor(0.3, dtype=torch.float64)] * 2
        buffers.put(slots, torch.tensor([5, 6]), describe_sampling(samplings, uniform))
        return DecodeTurn(step, buffers, draws, alternatives), allocator.cache


def test_the_mode_finds_what_waits():
    with ForbidWaiting(), pytest.raises(AssertionError, match="waits"):
        torch.ones(()).item()
    with ForbidWaiting(), pytest.raises(AssertionError, match="waits"):
        torch.ones(3)[torch.ones(3) > 0]


@pytest.mark.parametrize("draws", ["greedy", "drawn", "top_p"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_turn_never_waits_for_the_device(name, draws):
    turn, cache = prepared(WRAPPERS[name](causal("llama")), draws)
    with torch.inference_mode(), ForbidWaiting():
        output = turn()
    assert cache.positions[:2].tolist() == [5, 5]
    assert output.table.numbers.shape[:2] == (4, 1)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "llama"])
def test_no_family_waits_for_the_device(family):
    turn, _ = prepared(WRAPPERS["vote-base"](causal(family)))
    with torch.inference_mode(), ForbidWaiting():
        turn()


def test_a_turn_is_put_back_by_what_was_saved():
    turn, cache = prepared(WRAPPERS["vote-base"](causal("llama")))
    with torch.inference_mode():
        saved = turn.save()
        first = turn().table.numbers
        again = turn().table.numbers
        turn.restore(saved)
        assert cache.positions[:2].tolist() == [4, 4]
        assert_close(turn().table.numbers[:2], first[:2], rtol=0, atol=0)
    assert not torch.equal(first[:2], again[:2])


COMPILE = """
import torch, sys
from tests.ladder.test_turns import WRAPPERS, prepared
from tests.zoo import causal
family, name = {family!r}, {name!r}
turn, cache = prepared(WRAPPERS[name](causal(family, torch.float32 if family == "gemma2" else torch.float64)))
with torch.inference_mode():
    saved = turn.save()
    expected = turn()
    turn.restore(saved)
    compiled = torch.compile(turn.compute, fullgraph=True, backend="aot_eager", dynamic=False)
    for attempt in range(3):
        turn.restore(saved)
        with turn.probing():
            found = compiled()
    assert cache.positions[:2].tolist() == [5, 5]
    for a, b in zip(found.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(a[:2], b[:2], rtol=1e-6, atol=1e-6)
print("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "vote-base"),
     *(pytest.param("llama", n, marks=pytest.mark.slow) for n in WRAPPERS if n != "vote-base"),
     *(pytest.param(f, "none", marks=pytest.mark.slow) for f in FAMILIES if f != "llama")],
)  # fmt: skip
def test_a_turn_is_one_graph_that_stays_valid(family, name):
    assert run(COMPILE.format(family=family, name=name)).strip().endswith("graphs 1")


def opener(ahead):
    """A function like ``test_joining.opened`` for batches in slots; all batches of a model share a decoder."""
    decoders = {}

    def opened(model, names, starts):
        if model not in decoders:
            decoders[model] = StaticDecoder(lambda: HFStepper(model), "static", ahead=ahead, buckets=SMALL)
        stepper = HFStepper(model)
        _, following = prefill(stepper, [starts[n] for n in names])
        sequences = [TokenSequence(n, sampling(GUESTS[n]), n, 10**6) for n in names]
        batch = decoders[model].start(stepper, following, sequences)
        assert batch is not None, decoders[model].obstacle
        return batch

    return opened


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "vote-base"), ("mistral", "none"),
     *(pytest.param(f, "vote-base", marks=pytest.mark.slow) for f in FAMILIES if f not in ("llama", "mistral"))],
)  # fmt: skip
def test_guests_of_slots_come_and_go(family, name, ahead, monkeypatch):
    monkeypatch.setattr(test_joining, "opened", opener(ahead))
    model, starts = WRAPPERS[name](causal(family)), prompts(*(guest[1] for guest in GUESTS))
    one_by_one = family == "gemma2"  # padded together, it is NaN without any wrapper
    found = together(model, starts, one_by_one=one_by_one, leaves=4)
    for n, guest in enumerate(GUESTS):
        expected = alone(model, starts[n], guest, n)
        same(found[n], expected[:2] if n == 4 else expected)


def batches(model, ahead, samplings, starts):
    """The same sequences in a batch of slots, and in an eager one."""
    decoder = StaticDecoder(
        lambda: HFStepper(model, [1], None, find_probes(model)), "static", ahead=ahead, buckets=SMALL
    )
    both = []
    for start in (decoder.start, DecodeBatch):
        stepper = HFStepper(model, [1], None, find_probes(model))
        _, following = prefill(stepper, starts)
        both.append(start(stepper, following, [TokenSequence(n, s, 9, 40) for n, s in enumerate(samplings)]))
    return both


@pytest.mark.parametrize("ahead", [False, True])
def test_events_bring_states_attention_and_ends(ahead):
    ends = frozenset({7, 11, 30, 40, 50})
    samplings = [Sampling(0.8, 0.9, 12, ends, 2), Sampling(max_tokens=9), Sampling(1.0, 1.0, 6)]
    both = batches(WRAPPERS["vote-base"](causal("llama")), ahead, samplings, prompts(3, 8, 5))
    ours, theirs = (list(decode_batch(batch)) for batch in both)
    assert [(e.sequence, e.finish) for e in ours] == [(e.sequence, e.finish) for e in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.token or a.end).id == (b.token or b.end).id
        assert len((a.token or a.end).alternatives) == samplings[a.sequence].alternatives
        assert_close(a.states, b.states, rtol=1e-5, atol=1e-5)
        assert_close(a.attention, b.attention, rtol=1e-5, atol=1e-5)
    assert {e.finish for e in ours} == {None, "stop", "length"}


@pytest.mark.parametrize("ahead", [False, True])
def test_batches_that_both_run_can_join(ahead):
    model, starts = WRAPPERS["sample"](causal("llama")), prompts(3, 8, 5, 2)
    samplings = [Sampling(0.7 * (n % 2), 1.0, 9 + n) for n in range(4)]
    decoder = StaticDecoder(lambda: HFStepper(model), "static", ahead=ahead, buckets=SMALL)
    parts = []
    for names in ([0, 1], [2], [3]):
        stepper = HFStepper(model)
        _, following = prefill(stepper, [starts[n] for n in names])
        parts.append(decoder.start(stepper, following, [TokenSequence(n, samplings[n], n, 40) for n in names]))
    found: dict[int, list[int]] = {n: [] for n in range(4)}
    for batch in parts:
        for event in batch.choose():
            found[event.sequence].append(event.token.id)
        batch.step()
    parts[0].join(parts[1])
    parts[0].join(parts[2])
    assert [s.name for s in parts[0].sequences] == [0, 1, 2, 3]
    for event in decode_batch(parts[0]):
        found[event.sequence].append(event.token.id)
    for n in range(4):
        stepper = HFStepper(model)
        _, following = prefill(stepper, [starts[n]])
        expected = decode_batch(DecodeBatch(stepper, following, [TokenSequence(n, samplings[n], n, 40)]))
        assert found[n] == [event.token.id for event in expected]
