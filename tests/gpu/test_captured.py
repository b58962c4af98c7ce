"""On a CUDA device: captured steps give what eager ones give, wait for nothing, and keep their memory bounded."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch

from selfdoubt import RiskAwareLM, sample, vote
from selfdoubt.errors import SlowWarning
from selfdoubt.lm.decode import DecodeBatch, TokenSequence, decode_batch
from selfdoubt.lm.decoding import find_decoder, measure_step_memory
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.probes import find_probes
from selfdoubt.lm.sampling import Sampling
from selfdoubt.lm.static.cuda_graphs import MAX_GRAPHS
from selfdoubt.lm.static.decoder import StaticDecoder
from selfdoubt.lm.static.stepper import Buckets
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.engine.limits import Limits
from tests.zoo import FAMILIES, causal, prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

QUESTIONS = ["What is the capital of France?", "In which country is Tartu?", "What is the capital of Zorbelheim?"]
WRAPPERS = {
    "none": lambda model: model,
    "vote": vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5),
    "vote-base": vote.Wrapper(n_voters=3, rank=2, weight_noise=0.5, answer_from="base"),
    "sample": sample.Wrapper(n_samples=3),
}
#: Numbers of a token that may differ by this much: the kernels of both ways round differently.
CLOSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.15}


@pytest.fixture(autouse=True)
def _no_fallback():
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowWarning)
        yield


@pytest.fixture(scope="module")
def pocket():
    return RiskAwareLM.load("pocket", dtype=torch.float32, device="cuda")


def test_a_gpu_captures_by_default(pocket):
    pocket.step = "auto"
    answer = pocket.generate(QUESTIONS[0])
    assert answer.text == "The capital of France is Paris."
    decoder = find_decoder(pocket)
    assert decoder.mode == "captured"
    assert decoder.graphs >= 1
    assert measure_step_memory(pocket).cache_bytes > 0


@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.parametrize("step", ["captured", "compiled", "static"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_the_eager_ones(pocket, step, temperature):
    pocket.layers = [1]
    options = {"temperature": temperature, "top_p": 0.9, "seeds": [1, 2, 3]}
    pocket.step = "eager"
    expected = pocket.generate(QUESTIONS, **options)
    pocket.step = step
    for mine, alone in zip(pocket.generate(QUESTIONS, **options), expected, strict=True):
        assert [t.id for t in mine.tokens] == [t.id for t in alone.tokens]
        assert mine.scores.keys() == alone.scores.keys()
        assert dict(mine.scores) == pytest.approx(dict(alone.scores), abs=1e-2)
        torch.testing.assert_close(mine.states.mean, alone.states.mean, rtol=1e-3, atol=1e-3)


def test_streams_and_scores(pocket):
    pocket.step = "captured"
    stream = pocket.stream(QUESTIONS[0])
    assert "".join(token.text for token in stream) == stream.answer.text == "The capital of France is Paris."
    assert pocket.score(stream.answer.text, QUESTIONS[0]).scores["sum_nll"] == pytest.approx(
        stream.answer.scores["sum_nll"], abs=0.05
    )


def both(model, samplings, starts, steps=("captured", "eager")):
    """Events of the same sequences, captured and eager."""
    events = []
    for step in steps:
        stepper = HFStepper(model, (), None, find_probes(model))
        _, following = prefill(stepper, starts)
        sequences = [TokenSequence(n, s, n, 60) for n, s in enumerate(samplings)]
        if step == "eager":
            batch: Any = DecodeBatch(stepper, following, sequences)
        else:
            decoder = StaticDecoder(
                lambda: HFStepper(model, (), None, find_probes(model)), step, buckets=Buckets(8, 16)
            )
            batch = decoder.start(stepper, following, sequences)
            assert batch is not None, decoder.obstacle
        events.append(list(decode_batch(batch)))
    return events


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", WRAPPERS)
def test_captured_steps_against_eager_ones(name, dtype):
    model = WRAPPERS[name](causal("llama", dtype)).to("cuda")
    samplings = [Sampling(max_tokens=20), Sampling(0.8, 0.9, 14), Sampling(1.0, 1.0, 9, alternatives=2)]
    try:
        ours, theirs = both(model, samplings, prompts(3, 9, 5))
    finally:
        model.to("cpu")  # it shares its weights with other tests' models
    differs: set[int] = set()
    compared = 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a.sequence, a.finish) == (b.sequence, b.finish)
        if dtype == torch.bfloat16 and a.token.id != b.token.id:  # a near tie: the texts part there
            differs.add(a.sequence)
        if a.sequence in differs:
            continue
        assert a.token.id == b.token.id
        numbers = [[x for x in e.token if isinstance(x, float)] for e in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], rel=CLOSE[dtype], abs=CLOSE[dtype])
        compared += 1
    assert compared > 2 * len(samplings)  # the first tokens are chosen before any captured step


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_captured(family):
    dtype = torch.float32
    model = vote.Wrapper(n_voters=3, weight_noise=0.5)(causal(family, dtype)).to("cuda")
    try:
        ours, theirs = both(model, [Sampling(max_tokens=12)] * 2, prompts(5, 5))
    finally:
        model.to("cpu")
    assert [e.token.id for e in ours][:6] == [e.token.id for e in theirs][:6]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_turns_never_wait_for_the_device(pocket):
    pocket.step, stops = "captured", pocket.stop_ids
    pocket.stop_ids = ()  # the answer must not end meanwhile
    stream = pocket.stream("Tell me of many places, please.", max_tokens=40, temperature=1.0)
    try:
        for _ in range(4):
            next(stream)
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(8):
            next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        pocket.stop_ids = stops


def test_graphs_and_their_memory_are_bounded(pocket):
    pocket.step = "captured"
    for alternatives in range(MAX_GRAPHS + 4):
        pocket.generate(QUESTIONS[0], alternatives=alternatives, max_tokens=4)
    first = measure_step_memory(pocket)
    assert first.graphs == MAX_GRAPHS
    for alternatives in range(MAX_GRAPHS + 4):
        pocket.generate(QUESTIONS[0], alternatives=alternatives, max_tokens=4)
    last = measure_step_memory(pocket)
    assert last.graphs == MAX_GRAPHS
    assert last.graph_bytes <= first.graph_bytes + 2**26
    assert last.cache_bytes == first.cache_bytes


def test_no_cudnn_attention_runs(pocket):
    pocket.step = "eager"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pocket.generate(QUESTIONS[0], max_tokens=6)
    names = {event.key for event in profile.key_averages()}
    assert not [name for name in names if "cudnn_attention" in name]
    assert [name for name in names if "scaled_dot_product" in name]


def test_an_engine_under_load_agrees_with_single_answers(pocket):
    options = [
        {"temperature": 0.8 * (i % 2), "top_p": (1.0, 0.9)[i % 3 == 1], "seed": i, "max_tokens": 2 + (5 * i) % 17}
        for i in range(24)
    ]
    pocket.step = "eager"
    expected = [pocket.generate(QUESTIONS[i % 3], **o) for i, o in enumerate(options)]
    pocket.step = "captured"
    engine = Engine(pocket, Limits(batch=7))
    engine.start(wait=True)
    answers: list[Any] = [None] * len(options)

    def ask(i):
        (answers[i],) = engine.generate(QUESTIONS[i % 3], **options[i]).answers()

    threads = [threading.Thread(target=ask, args=[i]) for i in range(len(options))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close(20)
    for mine, alone in zip(answers, expected, strict=True):
        assert [t.id for t in mine.tokens] == [t.id for t in alone.tokens]
        assert dict(mine.scores) == pytest.approx(dict(alone.scores), abs=1e-2)
