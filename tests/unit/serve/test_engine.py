"""Many at once get what each would get alone; limits hold, and what goes wrong with one goes wrong with no other."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from selfdoubt import RiskAwareLM, sample, sculpt, vote
from selfdoubt.errors import BusyError, ConfigError, DeadlineError, EngineError, NonFiniteError, PromptError
from selfdoubt.lm.answer import Answer
from selfdoubt.lm.scoring import encode_teacher_forced
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.request import Finished, RequestHandle, Started, TokensAdded, cancel_on_exit
from selfdoubt.wrapping import innermost
from tests import zoo
from tests.waiting import wait_until

POISON = 7  # a token id that breaks the model


def speaker(wrapper=lambda model: model, **settings):
    return RiskAwareLM(wrapper(zoo.talker()).eval(), zoo.tokenizer(), **settings)


@contextmanager
def running(lm, stats=None, **limits):
    engine = Engine(lm, Limits(**limits), stats)
    engine.start(wait=True)
    try:
        yield engine
    finally:
        engine.close(20)


@pytest.fixture(scope="module")
def pocket():
    return RiskAwareLM.load("pocket", dtype=torch.float32)


def prompt(*ids):
    return Prompt(list(ids), [True] * len(ids))


@contextmanager
def hooked(lm, hook):
    """The model runs ``hook(input ids)`` before each pass."""
    base = innermost(lm.model)
    handle = base.register_forward_pre_hook(lambda _, __, kwargs: hook(kwargs["input_ids"]), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def slowly(seconds=0.01):
    return lambda ids: time.sleep(seconds)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_64_at_once_get_what_each_would_get_alone(pocket, temperature):
    """float32: other batch shapes round otherwise, hence 1e-3 nats; no token may differ."""
    places = ["France", "Japan", "Tartu", "Springfield", "Zorbelheim", "Peru", "Kenya", "the Czech Republic"]
    shapes = [
        "What is the capital of {}?",
        "In which country is {}?",
        "Tell me: which currency do they use in {}, please?",
    ]
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello. " * 20}]
    questions = [shapes[i % 3].format(places[i % 8]) for i in range(60)]
    questions += [[*chat, {"role": "user", "content": questions[i]}] for i in range(4)]
    options = [{"temperature": temperature, "seed": i, "max_tokens": 3 + i % 17} for i in range(64)]
    expected = [pocket.generate(q, **o) for q, o in zip(questions, options, strict=True)]
    found: list[Answer | None] = [None] * 64
    shuffled = random.Random(0)

    def person(i):
        time.sleep(shuffled.random() / 2)
        (found[i],) = engine.generate(questions[i], client=str(i % 5), **options[i]).answers()

    with running(pocket, batch=24) as engine:
        people = [threading.Thread(target=person, args=[i]) for i in range(64)]
        for thread in people:
            thread.start()
        for thread in people:
            thread.join()
        assert engine.running == engine.waiting == 0
    for mine, alone in zip(found, expected, strict=True):
        assert mine is not None
        assert [t.id for t in mine.tokens] == [t.id for t in alone.tokens]
        assert (mine.text, mine.finish) == (alone.text, alone.finish)
        assert dict(mine.scores) == pytest.approx(dict(alone.scores), abs=1e-3)
        assert (mine.percentile, mine.p_correct) == pytest.approx((alone.percentile, alone.p_correct), abs=1e-2)
        for a, b in zip(mine.tokens, alone.tokens, strict=True):
            assert (a.text, [x.text for x in a.alternatives]) == (b.text, [x.text for x in b.alternatives])
            assert a.risk == pytest.approx(b.risk, abs=1e-3)


WRAPPERS = {
    "none": lambda model: model,
    "vote": vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5),
    "sample": sample.Wrapper(n_samples=3),
    "sculpt": sculpt.Wrapper(),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_every_wrapper_in_float64(name):
    lm = speaker(WRAPPERS[name], layers=[1])
    questions = ["What?", "Where is the capital of France, Japan and São Paulo?", "Why is Paris?", "yen?"] * 3
    options = [{"max_tokens": 3 + i, "temperature": 0.9 * (i % 2), "seed": i} for i in range(len(questions))]
    with running(lm, batch=5) as engine:
        jobs = [engine.generate(q, **o) for q, o in zip(questions, options, strict=True)]
        found = [job.answers()[0] for job in jobs]
    for mine, q, o in zip(found, questions, options, strict=True):
        alone = lm.generate(q, **o)
        assert [t.id for t in mine.tokens] == [t.id for t in alone.tokens]
        assert dict(mine.scores) == pytest.approx(dict(alone.scores), abs=1e-6)
        assert torch.allclose(mine.states.mean, alone.states.mean, atol=1e-4)


def test_updates_come_in_their_order_and_add_up(pocket):
    with running(pocket) as engine:
        updates = list(engine.generate("What is the capital of Peru?", n=2, temperature=0.5).updates())
    assert isinstance(updates[0], Started)
    assert "".join(t.text for t in updates[0].question) == "What is the capital of Peru?"
    for choice in range(2):
        own = [u for u in updates[1:] if u.choice == choice]
        assert isinstance(own[-1], Finished)
        assert [t for u in own[:-1] for t in u.tokens] == list(own[-1].answer.tokens)


def test_a_coroutine_reads_them_too(pocket):
    async def person(engine, question):
        return [update async for update in engine.generate(question).stream()]

    async def crowd(engine):
        return await asyncio.gather(*(person(engine, f"Where is {p}?") for p in ("Paris", "Lima", "Tartu")))

    with running(pocket) as engine:
        for updates in asyncio.run(crowd(engine)):
            assert sum(isinstance(u, TokensAdded) for u in updates) > 3


def test_tokens_arrive_before_the_answer_is_complete(pocket):
    with running(pocket) as engine, hooked(pocket, slowly()):
        updates = engine.generate("What is the capital of France?").updates()
        seen = [next(updates) for _ in range(4)]
        assert [type(u) for u in seen] == [Started, TokensAdded, TokensAdded, TokensAdded]
        assert engine.running == 1


def test_who_goes_away_frees_the_rows_at_once():
    lm = speaker(WRAPPERS["vote"])
    with running(lm, batch=4) as engine, hooked(lm, slowly()):
        jobs = [engine.generate("What?", max_tokens=50, stop=[]) for _ in range(4)]
        for job in jobs:
            next(u for u in job.updates() if isinstance(u, TokensAdded))
        assert engine.running == 4
        for job in jobs:
            job.cancel()
        (answer,) = engine.generate("Where?", max_tokens=2).answers()
        assert answer.tokens
        assert engine.running == 0


def test_a_full_queue_says_when_to_come_again():
    lm = speaker()
    with running(lm, batch=1, queue=2) as engine, hooked(lm, slowly()):
        first = engine.generate("What?", max_tokens=40)
        next(first.updates())
        waiting = [engine.generate("What?", max_tokens=2) for _ in range(2)]
        with pytest.raises(BusyError, match=r"2 requests are waiting already") as error:
            engine.generate("What?")
        assert 1 <= error.value.retry_after <= 60
        assert engine.waiting == 2
        assert all(len(job.answers()) == 1 for job in waiting)


def test_time_that_is_over_ends_who_runs_and_who_waits():
    lm = speaker()
    with running(lm, batch=1) as engine, hooked(lm, slowly(0.02)):
        runs, waits = (engine.generate("What?", max_tokens=50, timeout=0.2) for _ in range(2))
        for job in (runs, waits):
            with pytest.raises(DeadlineError, match=r"not finished within 0\.2 seconds"):
                job.answers()
        assert engine.generate("What?", max_tokens=2).answers()


def test_clients_take_turns():
    lm = speaker()
    ends = []
    with running(lm, batch=1) as engine, hooked(lm, slowly(0.002)):
        jobs = [("loud", engine.generate("What?", max_tokens=3, client="loud")) for _ in range(8)]
        jobs.append(("quiet", engine.generate("What?", max_tokens=3, client="quiet")))

        def wait(name, job):
            job.answers()
            ends.append(name)

        people = [threading.Thread(target=wait, args=each) for each in jobs]
        for thread in people:
            thread.start()
        for thread in people:
            thread.join()
    assert ends.index("quiet") <= 2


def test_an_error_in_one_request_ends_no_other():
    def poisoned(ids):
        if (ids == POISON).any():
            raise RuntimeError("this token breaks the model")

    lm = speaker(WRAPPERS["vote"])
    fine = [prompt(20 + i, 21, 22) for i in range(6)]
    with running(lm) as engine:
        alone = [engine.generate(p, max_tokens=8).answers()[0].text for p in fine]
        with hooked(lm, poisoned):
            jobs = [engine.generate(p, max_tokens=8) for p in fine[:3]]
            bad = [engine.generate(prompt(20, POISON, 21)) for _ in range(7)]
            jobs += [engine.generate(p, max_tokens=8) for p in fine[3:]]
            for job in bad:
                with pytest.raises(RuntimeError, match=r"breaks the model"):
                    job.answers()
            assert [job.answers()[0].text for job in jobs] == alone
            assert engine.ready


def test_a_failing_step_is_taken_apart_and_only_its_cause_ends():
    """Somebody has chosen the poison: the whole batch fails in mid-step, with half of its cache written."""
    lm = speaker(WRAPPERS["vote"])
    with running(lm) as engine:
        asks = [engine.generate(prompt(20 + i, 21, 22), max_tokens=12, temperature=2.0, seed=i) for i in range(8)]
        alone = [job.answers()[0] for job in asks]
        chosen = [[t.id for t in a.tokens] for a in alone]
        poison = next(t for t in chosen[3][4:6] if sum(t in other for other in chosen) < 4)

        def poisoned(module, args, output):
            if (seen["ids"] == poison).any():
                raise RuntimeError("broke in the middle")

        seen: dict[str, torch.Tensor] = {}
        block = innermost(lm.model).model.layers[1].mlp
        handle = block.register_forward_hook(poisoned)
        try:
            with hooked(lm, lambda ids: seen.update(ids=ids)):
                jobs = [
                    engine.generate(prompt(20 + i, 21, 22), max_tokens=12, temperature=2.0, seed=i) for i in range(8)
                ]
                for job, ids, expected in zip(jobs, chosen, alone, strict=True):
                    if poison in ids[:-1]:
                        with pytest.raises(RuntimeError, match=r"broke in the middle"):
                            job.answers()
                    else:
                        (answer,) = job.answers()
                        assert answer.text == expected.text
                        assert dict(answer.scores) == pytest.approx(dict(expected.scores), abs=1e-6)
        finally:
            handle.remove()


def test_nan_ends_its_own_request_only():
    lm = speaker(WRAPPERS["vote"])
    seen: dict[str, torch.Tensor] = {}

    def spoiled(module, args, output):
        rows = (seen["ids"] == POISON).any(1)
        return torch.where(rows[:, None, None], torch.nan, output)

    head = innermost(lm.model).get_output_embeddings()
    with running(lm) as engine:
        alone = [engine.generate(prompt(20 + i, 21), max_tokens=6).answers()[0].text for i in range(4)]
        handle = head.register_forward_hook(spoiled)
        try:
            with hooked(lm, lambda ids: seen.update(ids=ids)):
                fine = [engine.generate(prompt(20 + i, 21), max_tokens=6) for i in range(4)]
                bad = engine.generate(prompt(20, POISON))
                with pytest.raises(NonFiniteError, match=r"NaN or infinite"):
                    bad.answers()
                assert [job.answers()[0].text for job in fine] == alone
        finally:
            handle.remove()


def test_a_model_that_no_longer_works_stops_the_engine_and_everybody_is_told():
    lm = speaker()

    submitted = threading.Event()

    def gone(ids):
        assert submitted.wait(60)  # the engine gives up after a few failures, and takes no request after that
        raise RuntimeError("the device is gone")

    with running(lm, batch=2) as engine:
        with hooked(lm, gone):
            jobs = [engine.generate("What?") for _ in range(12)]
            submitted.set()
            errors = []
            for job in jobs:
                with pytest.raises((RuntimeError, EngineError)) as error:
                    job.answers()
                errors.append(error.value)
            assert isinstance(errors[-1], EngineError)
            assert "the device is gone" in str(errors[-1])
        assert not engine.ready
        with pytest.raises(EngineError, match=r"has failed \(RuntimeError: the device is gone\); start it again"):
            engine.generate("What?")
        with pytest.raises(EngineError):
            engine.call(lambda lm: 1)


def test_a_model_that_never_worked_is_said_at_the_start():
    lm = speaker()
    with hooked(lm, lambda ids: 1 / 0):
        engine = Engine(lm)
        with pytest.raises(EngineError, match=r"ZeroDivisionError"):
            engine.start(wait=True)
    assert not engine.ready


def test_closing_lets_the_others_finish():
    lm = speaker()
    with hooked(lm, slowly(0.005)):
        engine = Engine(lm, Limits(batch=2))
        engine.start(wait=True)
        jobs = [engine.generate("What?", max_tokens=10) for _ in range(5)]
        closing = threading.Thread(target=engine.close)
        closing.start()
        wait_until(lambda: not engine.ready)
        with pytest.raises(EngineError, match=r"the engine is closing"):
            engine.generate("What?")
        assert all(job.answers()[0].tokens for job in jobs)
        closing.join()


def test_closing_has_an_end():
    lm = speaker()
    with hooked(lm, slowly(0.02)):
        engine = Engine(lm, Limits(batch=1))
        engine.start(wait=True)
        jobs = [engine.generate("What?", max_tokens=50) for _ in range(3)]
        future = engine.call(lambda lm: 1)
        engine.close(0.1)
        for job in jobs:
            with pytest.raises(EngineError, match=r"the engine is closing"):
                job.answers()
        assert future.done()


def test_errands_run_between_tokens(pocket):
    with running(pocket) as engine, hooked(pocket, slowly(0.005)):
        job = engine.generate("What is the capital of France?")
        assert engine.call(lambda lm: lm.score("Paris", "Which city?").finish).result(5) == "given"
        assert engine.running == 1
        with pytest.raises(ZeroDivisionError):
            engine.call(lambda lm: 1 / 0).result(5)
        assert job.answers()[0].text == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"n": 0}, ConfigError, r"n must be between 1 and 3, got 0"),
        ({"n": 4}, ConfigError, r"n must be between 1 and 3, got 4"),
        ({"max_tokens": 31}, ConfigError, r"max_tokens must be at most 30 here, got 31"),
        ({"prompt": prompt(*[9] * 21)}, PromptError, r"between 1 and 20 tokens, got 21; shorten it"),
        ({"prompt": prompt()}, PromptError, r"between 1 and 20 tokens, got 0"),
        ({"prompt": prompt(99999)}, PromptError, r"token ids go from 0 to \d+, got 99999"),
        ({"prompt": prompt(*[9] * 20), "n": 3, "max_tokens": 30}, ConfigError, r"more than the 100 tokens"),
        ({"prompt": "  "}, PromptError, r"the question is empty"),
        ({"temperature": -1.0}, ConfigError, r"temperature must be finite"),
        ({"stop": [""]}, ConfigError, r"a stop text must not be empty"),
    ],
)
def test_what_is_refused(wrong, error, message):
    engine = Engine(speaker(), Limits(choices=3, prompt_tokens=20, answer_tokens=30, batch_tokens=100))
    with pytest.raises(error, match=message):
        engine.generate(**{"prompt": "What?", "max_tokens": 5} | wrong)


def test_an_engine_that_does_not_run_says_so():
    with pytest.raises(EngineError, match=r"does not run; start it"):
        Engine(speaker()).generate("What?", max_tokens=5)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"queue": -1}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_limits_have_limits(wrong):
    with pytest.raises(ConfigError, match=rf"{next(iter(wrong))} must be"):
        Limits(**wrong)


class Notes:
    """Writes down what it is told."""

    def __init__(self):
        self.steps, self.firsts, self.ends, self.tokens = [], [], [], 0

    def set_waiting(self, requests):
        pass

    def record_step(self, sequences, seconds):
        self.steps.append(sequences)

    def record_tokens(self, tokens):
        self.tokens += tokens

    def record_first_token(self, seconds):
        self.firsts.append(seconds)

    def record_end(self, outcome, answer):
        self.ends.append(outcome)


def test_stats_receive_what_happens():
    lm, notes = speaker(), Notes()
    with running(lm, notes, batch=3) as engine, hooked(lm, slowly(0.005)):
        long, gone = (engine.generate("What?", max_tokens=n) for n in (9, 50))
        late = engine.generate("What?", max_tokens=50, timeout=0.1)
        next(u for u in gone.updates() if isinstance(u, TokensAdded))
        gone.cancel()
        assert len(long.answers()[0].tokens) == 9
        with pytest.raises(DeadlineError):
            late.answers()
    assert sorted(notes.ends) == ["cancelled", "deadline", "length"]
    assert max(notes.steps) <= 3
    assert notes.tokens > 9
    assert len(notes.firsts) == 3
    assert all(0 < seconds < 5 for seconds in notes.firsts)


@pytest.mark.parametrize("by_text", [True, False])
def test_an_answer_that_ends_at_once_has_the_surprisal_of_its_end(by_text):
    lm, question = speaker(), "What is the capital of France?"
    first = lm.generate(question, max_tokens=1).tokens[0]
    with running(lm) as engine:
        job = engine.generate(question, max_tokens=5, stop=[first.text if by_text else first.id])
        (answer,) = job.answers()
    assert (answer.text, answer.tokens, answer.finish) == ("", (), "stop")
    assert answer.risk == answer.scores["sum_nll"] == pytest.approx(first.nll)


def test_an_engine_that_is_held_open_accepts_texts_but_no_requests():
    lm = speaker()
    texts = encode_teacher_forced(lm.tokenizer, [(None, "Paris.")], raw=False)
    with running(lm) as engine:
        with engine.hold_open():
            closing = threading.Thread(target=engine.close, args=(60,))
            closing.start()
            while engine.ready:
                time.sleep(0.001)
            with pytest.raises(EngineError, match="closing"):
                engine.generate("What?")
            with pytest.raises(EngineError, match="closing"), engine.hold_open():
                pass
            assert len(engine.score(texts).result(30)) == 1
            assert closing.is_alive()
        closing.join()
        with pytest.raises(EngineError, match="closing"):
            engine.score(texts)


def test_an_engine_that_is_held_open_ends_when_patience_is_over():
    lm = speaker()
    texts = encode_teacher_forced(lm.tokenizer, [(None, "Paris.")], raw=False)
    with running(lm) as engine, engine.hold_open():
        engine.close(0.1)
        with pytest.raises(EngineError, match="closing"):
            engine.score(texts)


def test_handles_are_cancelled_when_their_block_ends():
    def fail(handles, kept):
        with cancel_on_exit(handles):
            handles += [engine.generate("What?", max_tokens=400), kept]
            handles.remove(kept)
            raise ZeroDivisionError

    with running(speaker()) as engine:
        handles: list[RequestHandle] = []
        kept = engine.generate("What?", max_tokens=2)
        with pytest.raises(ZeroDivisionError):
            fail(handles, kept)
        assert handles[0].cancelled
        assert len(kept.answers()) == 1
