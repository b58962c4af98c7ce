"""A long prompt or a long text to score is worked on in pieces, and others go on between them."""

from __future__ import annotations

import copy
import threading
from contextlib import contextmanager

import pytest
import torch

from selfdoubt import RiskAwareLM, vote
from selfdoubt.errors import EngineError, PromptError
from selfdoubt.lm.scoring import encode_teacher_forced
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.request import TokensAdded
from selfdoubt.serve.engine.scheduler import STREAM_GAP
from selfdoubt.serve.engine.tasks import EngineTask, TaskQueue
from selfdoubt.wrapping import innermost
from tests import zoo
from tests.unit.serve.test_engine import prompt

LONG = prompt(*(20 + i % 200 for i in range(1500)))
TEXT = "The capital of France is Paris. " * 150


@pytest.fixture(scope="module")
def lm():
    model = copy.deepcopy(zoo.talker())  # that one is everybody's, and so is its config
    model.config.max_position_embeddings = 4096
    return RiskAwareLM(vote.Wrapper(n_voters=2, rank=2)(model).eval(), zoo.tokenizer())


class Machine:
    """A slow machine: a pass costs a fixed time and some per token. ``now`` is its clock, which stands still else.

    It notes the shapes of all passes, and does what it is told before each.
    """

    def __init__(self, fixed=0.02, each=0.0005):
        self.fixed, self.each, self.time = fixed, each, 0.0
        self.passes = []  # (rows, columns, seconds)
        self.before = lambda ids: None

    def now(self):
        return self.time

    def run(self, ids):
        self.before(ids)
        took = self.fixed + self.each * ids.numel()
        self.time += took
        self.passes.append((*ids.shape, took))


@contextmanager
def running(lm, machine, **limits):
    base = innermost(lm.model)
    hook = base.register_forward_pre_hook(lambda _, __, kwargs: machine.run(kwargs["input_ids"]), with_kwargs=True)
    engine = Engine(lm, Limits(**limits), clock=machine.now)
    engine.start(wait=True)
    machine.passes.clear()
    try:
        yield engine
    finally:
        engine.close(20)
        hook.remove()


def started(job):
    next(u for u in job.updates() if isinstance(u, TokensAdded))
    return job


def given(lm, text=TEXT, question=None):
    return encode_teacher_forced(lm.tokenizer, [(question, text)], raw=False)


def gaps(machine, beside):
    """Seconds from each step to the next, while more than the stream's own rows were worked on."""
    found, since, busy = [], 0.0, False
    for rows, columns, took in machine.passes:
        since += took
        busy |= columns > 1
        if columns == 1 and rows >= beside:
            if busy:
                found.append(since)
            since, busy = 0.0, False
    return found


@pytest.mark.parametrize("heavy", ["prompt", "score", "both"])
def test_between_two_pieces_a_stream_gets_its_token_and_waits_for_no_more_than_the_gap(lm, heavy):
    machine = Machine()
    with running(lm, machine) as engine:
        stream = started(engine.generate("What?", max_tokens=400, temperature=1.0))
        machine.passes.clear()
        work = []
        if heavy != "score":
            work.append(engine.generate(LONG, max_tokens=1).answers)
        if heavy != "prompt":
            work.append(engine.score(given(lm)).result)
        for wait in work:
            assert wait()
        stream.cancel()
    found = gaps(machine, 2)
    assert len(found) > 5
    assert max(found) <= 1.05 * STREAM_GAP
    assert max(columns for _, columns, _ in machine.passes) > 32  # no smaller than they must be


def test_alone_a_long_prompt_is_read_in_fewer_pieces(lm):
    counts = []
    for beside in (True, False):
        machine = Machine()
        with running(lm, machine) as engine:
            stream = started(engine.generate("What?", max_tokens=400)) if beside else None
            machine.passes.clear()
            engine.generate(LONG, max_tokens=1).answers()
            counts.append(sum(columns > 1 for _, columns, _ in machine.passes))
            if stream is not None:
                stream.cancel()
    assert counts[1] < counts[0] / 2


def test_a_score_in_the_engine_is_the_score(lm):
    pairs = [("Where is Paris?", "In France. " * 30), (None, TEXT[:300]), ("Why?", "x")]
    with running(lm, Machine(each=0.002)) as engine:
        found = engine.score(encode_teacher_forced(lm.tokenizer, pairs, raw=False)).result(60)
    for mine, alone in zip(found, lm.score_batch(pairs, alternatives=0), strict=True):
        assert [(t.id, t.text) for t in mine.tokens] == [(t.id, t.text) for t in alone.tokens]
        assert dict(mine.scores) == pytest.approx(dict(alone.scores), abs=1e-8)


class Gate:
    """Holds the engine before its so-manieth long pass, until the test opens."""

    def __init__(self, machine, number=3):
        self.reached, self.opened, self._left = threading.Event(), threading.Event(), number
        machine.before = self

    def __call__(self, ids):
        if ids.shape[1] > 8:
            self._left -= 1
            if not self._left:
                self.reached.set()
                assert self.opened.wait(30)


def test_a_short_question_does_not_wait_until_a_long_prompt_is_read(lm):
    machine = Machine(each=0.005)
    with running(lm, machine) as engine:
        gate = Gate(machine)
        long = engine.generate(LONG, max_tokens=1)
        assert gate.reached.wait(30)
        short = engine.generate("What?", max_tokens=1)
        gate.opened.set()
        assert short.answers()
        assert not long.started
        assert long.answers()


@pytest.mark.parametrize("heavy", ["prompt", "score"])
def test_many_long_ones_leave_a_place_to_a_short_one(lm, heavy):
    machine = Machine(each=0.005)
    with running(lm, machine) as engine:
        gate = Gate(machine, 8)
        if heavy == "prompt":
            long = [engine.generate(LONG, max_tokens=1, client=str(i)) for i in range(6)]
        else:
            long = [engine.score(given(lm)) for _ in range(6)]
        assert gate.reached.wait(30)
        if heavy == "prompt":
            short = engine.generate("What?", max_tokens=1, client="another")
            gate.opened.set()
            assert short.answers()
            assert not any(job.ended for job in long)
            for job in long:
                job.cancel()
        else:
            short = engine.score(given(lm, "yen"))
            gate.opened.set()
            assert short.result(30)
            assert not any(future.done() for future in long)
            for future in long:
                future.cancel()


@pytest.mark.parametrize("number", [2, 3, 4])
def test_texts_to_score_get_on_equally_while_prompts_are_read(lm, number):
    machine, order = Machine(each=0.005), []

    def pieces(name):
        for _ in range(5):
            order.append(name)
            yield

    with running(lm, machine) as engine:
        gate = Gate(machine)
        prompts = [engine.generate(LONG, max_tokens=1, client=str(i)) for i in range(2)]
        assert gate.reached.wait(30)
        futures = [engine._add(EngineTask(lambda _, __, name=name: pieces(name))) for name in range(number)]
        gate.opened.set()
        for future in futures:
            future.result(30)
        assert not any(job.started for job in prompts)  # they were read all the while
        for job in prompts:
            job.cancel()
    assert all(len(set(order[i : i + number])) == number for i in range(0, len(order), number)), order


def test_texts_that_wait_and_were_given_up_take_no_place():
    errands = TaskQueue()
    texts = [EngineTask(lambda *_: None, is_long=True) for _ in range(8)]
    for text in texts:
        errands.add(text)
    assert errands.next() is texts[0]
    for text in texts[3:]:
        text.future.cancel()
    assert errands.next() is texts[1]
    assert len(errands) == 3


def test_a_score_that_nobody_waits_for_is_not_gone_on_with(lm):
    machine = Machine(each=0.005)
    with running(lm, machine) as engine:
        gate = Gate(machine)
        future = engine.score(given(lm, question="Where?"))
        assert gate.reached.wait(30)
        assert future.cancel()
        gate.opened.set()
        assert engine.generate("What?", max_tokens=2).answers()
        passes = len(machine.passes)
        assert engine.generate("What?", max_tokens=2).answers()
        after = machine.passes[passes:]
        assert after
        assert all(columns < 32 for _, columns, _ in after)  # the questions', and no piece of the text's
        assert not len(engine._tasks)


def test_closing_ends_a_score_in_its_middle(lm):
    machine = Machine(each=0.005)
    with running(lm, machine) as engine:
        gate = Gate(machine)
        future = engine.score(given(lm))
        assert gate.reached.wait(30)
        closing = threading.Thread(target=engine.close, args=[0.01])
        closing.start()
        closing.join(0.3)
        gate.opened.set()
        closing.join(30)
        assert not closing.is_alive()
        with pytest.raises(EngineError, match="closing"):
            future.result(0)
        assert sum(columns > 1 for _, columns, _ in machine.passes) <= 4


def test_a_prompt_that_nobody_waits_for_is_not_read_to_its_end(lm):
    machine = Machine(each=0.005)
    with running(lm, machine) as engine:
        gate = Gate(machine)
        job = engine.generate(LONG, max_tokens=1)
        assert gate.reached.wait(30)
        job.cancel()
        gate.opened.set()
        assert engine.generate("What?", max_tokens=2).answers()
    assert sum(columns for _, columns, _ in machine.passes) < 1000


def test_an_error_in_one_score_ends_no_other(lm):
    machine = Machine()

    def poisoned(ids):
        if (ids == 7).any():
            raise RuntimeError("this token breaks the model")

    machine.before = poisoned
    with running(lm, machine) as engine:
        fine, other = given(lm), given(lm, TEXT[:100])
        bad = [fine[0]._replace(ids=[20, 7, 21] * 200)]
        futures = [engine.score(g) for g in (fine, bad, other)]
        assert futures[0].result(60)
        with pytest.raises(RuntimeError, match="breaks the model"):
            futures[1].result(60)
        assert futures[2].result(60)


def test_texts_to_score_that_are_too_long_are_refused_before_any_pass(lm):
    machine = Machine()
    with running(lm, machine, prompt_tokens=100) as engine:
        for item in (given(lm), given(lm, "x", TEXT), given(lm, TEXT, "Why?")):
            with pytest.raises(PromptError, match="more than 100 tokens"):
                engine.score(item)
        assert engine.score(given(lm, "x")).result(30)
    with running(lm, machine) as engine:
        machine.passes.clear()
        with pytest.raises(PromptError, match="the model reads 4096 at most"):
            engine.score(given(lm, TEXT * 4, "Why?"))
        assert not machine.passes


def test_hidden_states_are_let_go_with_the_cache(lm):
    """What is cancelled in its middle holds no tensor of the model any more."""
    import gc
    import weakref

    machine = Machine(each=0.005)
    kept = []
    handle = innermost(lm.model).register_forward_hook(lambda _, __, out: kept.append(weakref.ref(out.logits)))
    try:
        with running(lm, machine) as engine:
            gate = Gate(machine)
            future = engine.score(given(lm))
            assert gate.reached.wait(30)
            future.cancel()
            gate.opened.set()
            while len(engine._tasks):
                threading.Event().wait(0.01)
            gc.collect()
            assert not [ref for ref in kept if isinstance(ref(), torch.Tensor)]
    finally:
        handle.remove()
