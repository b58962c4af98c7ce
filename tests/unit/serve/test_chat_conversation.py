"""Conversations on the pocket model behind a real engine: what is asked, withheld, tried again, stopped, remembered."""

from __future__ import annotations

import asyncio
import json

import pytest

from selfdoubt.errors import EngineError, PromptError
from selfdoubt.lm.answer import UNSURE
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.serve.chat.answers import run_turn
from selfdoubt.serve.chat.conversation import (
    Attempt,
    ChatSettings,
    Conversation,
    build_history,
    get_confidence,
    recommend_confidence,
)
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.engine.limits import Limits


@pytest.fixture(scope="module")
def lm():
    return RiskAwareLM.load("pocket")


@pytest.fixture(scope="module")
def engine(lm):
    made = Engine(lm)
    made.start()
    yield made
    made.close()


@pytest.fixture
def talk():
    return Conversation()


def settings(**given):
    """The pocket model has only learnt single questions: it remembers nothing, unless a test says so."""
    return ChatSettings(**{"memory": False, **given})


def run(engine, talk, turn, watch=lambda turn: None):
    async def all_of_it():
        async for _ in run_turn(engine, talk, turn, period=0.0):
            watch(turn)

    asyncio.run(all_of_it())
    return turn


def test_a_question_gets_the_answer_that_the_model_gives(engine, talk, lm):
    turn = run(engine, talk, talk.start_turn("What is the capital of France?", settings()))
    alone = lm.generate("What is the capital of France?")
    assert turn.state == "done"
    assert turn.shown == turn.remembered == alone.text
    assert turn.attempts[0].answer.p_correct == pytest.approx(alone.p_correct, abs=1e-4)
    assert [t.text for t in turn.question_tokens] == [t.text for t in alone.question]
    assert not talk.busy


def test_tokens_are_there_before_the_end(engine, talk):
    seen = []
    turn = talk.start_turn("Where is Valencia?", settings())
    run(engine, talk, turn, lambda t: seen.append((t.state, len(t.attempts[0].tokens), t.shown)))
    assert len({count for _, count, _ in seen}) >= 3
    assert all(len(shown) for state, count, shown in seen if count)


def test_an_unsure_answer_is_withheld_until_somebody_asks_to_see_it(engine, talk):
    seen = []
    turn = talk.start_turn("In which country is Zorbelheim?", settings(at_least=0.84))
    run(engine, talk, turn, lambda t: seen.append(t.shown))
    assert set(seen[:-1]) == {""}
    assert turn.is_hidden
    assert turn.shown == turn.remembered == UNSURE
    turn.revealed = True
    assert turn.shown == "The city of Zorbelheim is in Germany."
    sure = run(engine, talk, talk.start_turn("What is the capital of France?", settings(at_least=0.84)))
    assert sure.shown == "The capital of France is Paris."


def test_without_a_calibration_the_percentile_says_how_sure(engine, lm):
    plain = RiskAwareLM(lm.model, lm.tokenizer, reference=lm.reference)
    found = plain.generate("What is the capital of France?")
    assert get_confidence(found) == pytest.approx(1 - found.percentile)
    assert recommend_confidence(plain.calibration) is None
    nothing = RiskAwareLM(lm.model, lm.tokenizer).generate("What is the capital of France?")
    assert get_confidence(nothing) is None


def test_the_recommended_sureness_withholds_what_the_threshold_does(lm):
    assert lm.calibration.threshold <= recommend_confidence(lm.calibration) < lm.calibration.threshold + 0.01


def test_trying_again_ends_with_the_first_sure_answer(engine, talk):
    turn = run(engine, talk, talk.start_turn("What is the capital of France?", settings(), "until", 0.84))
    assert turn.is_confident
    assert len(turn.attempts) == 1
    assert turn.shown == turn.attempts[-1].answer.text


def test_trying_again_takes_new_seeds_and_ends_with_the_least_doubtful(engine, talk, lm):
    three = settings(max_tries=3, seed=5)
    turn = run(engine, talk, talk.start_turn("In which country is Issaquah?", three, "until", 0.99))
    alone = [lm.generate(turn.question, temperature=1.0, seed=5 + i) for i in range(3)]
    assert [t.answer.text for t in turn.attempts] == [a.text for a in alone]
    assert not turn.is_confident
    assert turn.shown == max(alone, key=lambda a: a.p_correct or 0.0).text


def test_between_tries_nothing_is_seen(engine, talk):
    seen = []
    turn = talk.start_turn("In which country is Issaquah?", settings(max_tries=2), "until", 0.99)
    run(engine, talk, turn, lambda t: seen.append(t.shown))
    assert set(seen[:-1]) == {""}


def test_candidates_are_those_of_the_model_in_its_order(engine, talk, lm):
    turn = run(engine, talk, talk.start_turn("Where is Valencia?", settings(candidates=4), "candidates"))
    alone = lm.candidates("Where is Valencia?", 4)
    assert sorted(t.answer.text for t in turn.attempts) == sorted(a.text for a in alone)
    sure = [get_confidence(t.answer) or 0.0 for t in turn.ranked]
    assert sure == sorted(sure, reverse=True)
    assert turn.remembered == turn.ranked[0].answer.text
    assert turn.shown.startswith(f"1. {turn.remembered}\n2. ")


def test_stopping_cancels_the_request_and_keeps_what_there_is(engine, talk):
    turn = talk.start_turn("Where is Valencia?", settings(temperature=1.0))
    jobs = []

    def stop(turn):
        if talk.handle is not None:
            jobs.append(talk.handle)
        if sum(len(t.tokens) for t in turn.attempts) >= 3:
            talk.stop()

    run(engine, talk, turn, stop)
    assert jobs[-1].cancelled
    assert talk.handle is None
    if turn.state == "stopped":  # a quick machine may have been through
        assert turn.attempts[0].answer is None or turn.attempts[0].tokens
    assert turn.shown


def test_who_stops_listening_cancels_the_request(engine, talk):
    async def leave():
        turn = talk.start_turn("Where is Valencia?", settings())
        going = run_turn(engine, talk, turn, period=0.0)
        await anext(going)
        job = talk.handle
        await going.aclose()
        return turn, job

    turn, job = asyncio.run(leave())
    assert job.cancelled
    assert turn.state == "stopped"
    assert not talk.busy


def test_what_was_shown_is_remembered_and_what_was_withheld_is_not(engine, talk):
    run(engine, talk, talk.start_turn("In which country is Zorbelheim?", settings(at_least=0.84)))
    turn = talk.start_turn("And Tartu?", settings(memory=True))
    assert turn.messages == [
        {"role": "user", "content": "In which country is Zorbelheim?"},
        {"role": "assistant", "content": UNSURE},
        {"role": "user", "content": "And Tartu?"},
    ]
    talk.drop_turn(turn)
    assert talk.start_turn("And Tartu?", settings()).messages == [{"role": "user", "content": "And Tartu?"}]


def test_asking_again_takes_the_place_of_the_old_turn_and_what_came_after_it(engine, talk):
    for question in ("What is the capital of France?", "Where is Valencia?"):
        run(engine, talk, talk.start_turn(question, settings()))
    first = talk.turns[0]
    again = run(engine, talk, talk.retry_turn(first, settings(), "once"))
    assert talk.turns == [again]
    assert again.before == ()
    assert (again.question, again.temperature, again.attempts[0].seed) == (first.question, 1.0, 1)


def test_a_turn_that_came_to_nothing_gives_its_place_back(engine, talk):
    old = run(engine, talk, talk.start_turn("What is the capital of France?", settings()))
    new = talk.start_turn("why " * 1000, settings(), instead=old.id)
    with pytest.raises(PromptError, match="token"):
        run(engine, talk, new)
    assert talk.drop_turn(new) == [old]
    assert talk.turns == [old]
    assert not talk.busy


def test_a_closed_engine_is_said(lm, talk):
    with pytest.raises(EngineError):
        run(Engine(lm), talk, talk.start_turn("Where?", settings()))
    assert not talk.busy


def test_history_leaves_out_what_runs_and_what_is_empty():
    talk = Conversation()
    talk.start_turn("a", settings())
    assert build_history(talk.turns) == ()
    talk.turns[0].state, talk.turns[0].attempts = "stopped", [Attempt(0)]
    assert build_history(talk.turns) == ()


def test_a_conversation_is_plain_data_with_every_token(engine, talk):
    run(engine, talk, talk.start_turn("In which country is Tartu?", settings(at_least=0.84)))
    run(engine, talk, talk.start_turn("What is the capital of France?", settings(), "candidates"))
    found = json.loads(json.dumps(talk.to_json({"model": "pocket"}), allow_nan=False))
    withheld, drawn = found["turns"]
    assert found["model"] == "pocket"
    assert (withheld["shown"], withheld["withheld"]) == (UNSURE, True)
    assert withheld["answers"][0]["hidden"]
    assert withheld["settings"]["at_least"] == 0.84
    assert len(drawn["answers"]) == 5
    for answered in drawn["answers"]:
        assert "".join(t["text"] for t in answered["tokens"]) == answered["text"]
        assert {"logprob", "epistemic", "alternatives"} <= set(answered["tokens"][0])


def test_clearing_stops_what_runs(engine, talk):
    async def clear():
        turn = talk.start_turn("Where is Valencia?", settings())
        async for _ in run_turn(engine, talk, turn, period=0.0):
            talk.clear()
        return turn

    assert asyncio.run(clear()).state == "stopped"
    assert talk.turns == []


def test_an_answer_needs_no_more_candidates_than_the_engine_gives(lm, talk):
    made = Engine(lm, Limits(choices=2))
    made.start()
    try:
        turn = run(made, talk, talk.start_turn("Where is Valencia?", settings(candidates=2), "candidates"))
        assert len(turn.attempts) == 2
    finally:
        made.close()
