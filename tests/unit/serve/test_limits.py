"""How much a request may ask for, at every door, and that no refusal repeats all that was sent."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from selfdoubt.errors import BusyError, ConfigError, DeadlineError, EngineError, NonFiniteError, PromptError
from selfdoubt.lm.text.prompt import Prompt
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.engine.limits import CHARACTERS_PER_TOKEN, Limits
from selfdoubt.serve.http.body import MAX_FIELDS, MAX_ITEMS, check_body
from selfdoubt.serve.http.encoders import SHORT_TEXT, EncoderThreads, measure_prompt
from selfdoubt.serve.openai.errors import MAX_FIELD, MAX_MESSAGE, RequestError, shorten, to_request_error
from selfdoubt.serve.openai.requests import ChatRequest, CompletionRequest, ScoreRequest
from selfdoubt.wrapping import innermost
from tests.unit.serve.test_app import CHAT, HELLO, TEXT, ask, fault, ok, slow
from tests.waiting import wait_until

LONG = "<script>" * 2500
SCORE = "/v1/score"


@pytest.fixture(scope="module")
def small(serve, talker):
    return serve(
        talker, Limits(answer_tokens=8, messages=3, message_parts=2, prompts=2, texts=3, stop_characters=10, stops=2)
    )


def user(content):
    return {"role": "user", "content": content}


def parts(number):
    return [{"type": "text", "text": "a"}] * number


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"stop": "a" * 11}, "stop text may have 10 characters"),
        (CHAT, {"stop": ["a", "b" * 11]}, "stop text may have 10 characters"),
        (CHAT, {"stop": ["a", "b", "c"]}, "2 stop texts"),
        (CHAT, {"messages": [user("a")] * 4}, "3 messages"),
        (CHAT, {"messages": [user("a"), user(parts(3))]}, "2 parts"),
        (CHAT, {"messages": [user("a " * 9000)]}, "characters"),
        (CHAT, {"messages": [user("a " * 5000), user("b " * 5000)]}, "characters"),
        (TEXT, {"prompt": ["a"] * 3}, "2 prompts"),
        (TEXT, {"prompt": [[5]] * 3}, "2 prompts"),
        (TEXT, {"prompt": "a " * 9000}, "characters"),
        (TEXT, {"prompt": [5] * 9000}, "tokens, got 9000"),
        (TEXT, {"prompt": [2**70]}, "token ids go from 0 to"),
        (TEXT, {"prompt": [[5], [5, 2**40]]}, "token ids go from 0 to"),
        (TEXT, {"prompt": "a", "stop": "a" * 11}, "stop text"),
        (SCORE, {"input": [{"text": "a"}] * 4}, "3 texts"),
        (SCORE, {"input": {"text": "a " * 9000}}, "characters"),
        (SCORE, {"input": {"text": "a", "question": "a " * 9000}}, "characters"),
        (SCORE, {"input": {"text": "a", "messages": [user("a")] * 4}}, "3 messages"),
        (SCORE, {"input": {"text": "a", "messages": [user(parts(3))]}}, "2 parts"),
        (SCORE, {"input": {"text": "a " * 300}}, "the model reads 256 at most"),
    ],
)
def test_what_is_beyond_a_limit_is_refused_in_one_line(small, path, body, words):
    found = fault(ask(small, path, **body), 400)["message"]
    assert words in found
    assert "\n" not in found
    assert any(char.isdigit() for char in found)


def test_what_is_within_the_limits_is_taken(small):
    ok(small, CHAT, messages=[user("a"), user("b"), user(parts(2))], stop=["a" * 10, "b"], max_tokens=1)
    ok(small, TEXT, prompt=["a", "b"], max_tokens=1)
    ok(small, SCORE, input=[{"text": "a"}, {"text": "b"}, {"text": "c", "messages": [user("a")] * 3}])


@pytest.mark.parametrize(
    ("question", "options", "error"),
    [
        ([user("a")] * 4, {}, PromptError),
        ("a" * 20_000, {}, PromptError),
        ("a", {"stop": ["a" * 11]}, ConfigError),
        ("a", {"stop": ["a", "b", "c"]}, ConfigError),
    ],
)
def test_the_engine_itself_refuses_it_too(talker, question, options, error):
    """The page and the replicas come in by this door."""
    limits = Limits(messages=3, stops=2, stop_characters=10)
    with pytest.raises(error, match="at most here"):
        Engine(talker, limits).generate(question, **options)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3000))
def test_nothing_that_fits_is_refused_for_its_characters(tokens, context, batch_tokens):
    """No token of any vocabulary in use is as long as what counts for one here, but for runs of spaces."""
    limits = Limits(prompt_tokens=tokens, batch_tokens=batch_tokens)
    most = min(tokens, context, batch_tokens)
    limits.check_prompt_size("a" * CHARACTERS_PER_TOKEN * most, context + 1)
    with pytest.raises(PromptError, match=f"got {CHARACTERS_PER_TOKEN * most + 1}; shorten it"):
        limits.check_prompt_size("a" * (CHARACTERS_PER_TOKEN * most + 1), context + 1)


@pytest.mark.parametrize("name", ["stops", "stop_characters", "messages", "message_parts", "prompts", "texts"])
def test_every_limit_is_at_least_one(name):
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        Limits(**{name: 0})


@given(st.text(max_size=5000), st.integers(10, 400))
def test_a_text_is_shortened_in_its_middle(text, most):
    found = shorten(text, most)
    assert len(found) <= most
    assert found == " ".join(found.split())
    if len(text) <= most:
        assert found == " ".join(text.split())
    else:
        assert found.startswith(" ".join(text.split())[: most // 3].rstrip()[: most // 4])


@pytest.mark.parametrize(
    "kind", [BusyError, DeadlineError, EngineError, PromptError, ConfigError, NonFiniteError, RuntimeError]
)
def test_no_error_repeats_all_of_a_long_text(kind):
    message = f"wanted {LONG}; shorten it"
    body = to_request_error(kind(message)).body["error"]
    assert len(body["message"]) <= MAX_MESSAGE
    if kind is not RuntimeError:
        assert body["message"].startswith("wanted <script>")
        assert body["message"].endswith("; shorten it")
    assert len(RequestError(400, message, param=LONG).body["error"]["param"]) <= MAX_FIELD


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"model": LONG}),
        (CHAT, {LONG: 1}),
        (CHAT, {"messages": [{"role": LONG, "content": "a"}]}),
        (CHAT, {"messages": [user([{"type": LONG, "text": "a"}])]}),
        (CHAT, {"messages": [{**user("a"), LONG: 1}]}),
        (CHAT, {"reasoning_effort": LONG}),
        (CHAT, {"temperature": LONG}),
        (CHAT, {"stop": {LONG: LONG}}),
        (CHAT, {"max_tokens": 10**3000}),
        (CHAT, {"tool_choice": LONG}),
        (TEXT, {"prompt": "a", "suffix": LONG}),
        (TEXT, {"prompt": {LONG: 1}}),
        (SCORE, {"input": {"text": "a", LONG: LONG}}),
        (SCORE, {"input": [LONG]}),
        (SCORE, {"model": LONG, "input": {"text": "a"}}),
    ],
)
def test_no_refusal_repeats_all_that_was_sent(small, path, body):
    reply = small.post(path, json={"messages": HELLO, **body} if path == CHAT else body)
    assert reply.status_code in (400, 404)
    assert len(reply.content) < 2 * (MAX_MESSAGE + MAX_FIELD)
    assert "\n" not in reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models/" + "x" * 20_000, "/" + "x" * 20_000])
def test_no_path_is_repeated_either(small, serve, talker, caplog, path):
    logging = serve(talker, log_requests=True)
    with caplog.at_level("INFO", logger="selfdoubt.serve"):
        for client in (small, logging):
            assert len(client.get(path).content) < 2 * MAX_MESSAGE
    assert "404" in caplog.text
    assert (
        max(len(record.getMessage()) for record in caplog.records if record.name == "selfdoubt.serve") < 2 * MAX_MESSAGE
    )


def test_a_full_queue_is_said_without_a_question(talker, monkeypatch):
    engine = Engine(talker, Limits(queue=1))
    monkeypatch.setattr(Engine, "_check_open", lambda self: None)  # its thread does not run: whoever comes waits
    engine.check_capacity()
    engine.generate("What?", max_tokens=2)
    with pytest.raises(BusyError, match="1 requests are waiting already"):
        engine.check_capacity()


def test_a_long_text_holds_up_no_short_one_and_too_many_are_refused():
    async def crowd():
        encoders, gate = EncoderThreads(3), threading.Event()
        try:
            long = [asyncio.create_task(encoders.run(lambda: gate.wait(30), SHORT_TEXT + 1)) for _ in range(2)]
            await asyncio.sleep(0)
            assert await asyncio.wait_for(encoders.run(lambda: "short", SHORT_TEXT), 20) == "short"
            long.append(asyncio.create_task(encoders.run(lambda: gate.wait(30), SHORT_TEXT + 1)))
            await asyncio.sleep(0)
            with pytest.raises(BusyError, match="3 requests wait to be read already"):
                await encoders.run(lambda: "one too many", SHORT_TEXT + 1)
            assert (
                await asyncio.wait_for(encoders.run(lambda: "short", SHORT_TEXT), 20) == "short"
            )  # has places of its own
            gate.set()
            assert all(await asyncio.gather(*long))
            assert await encoders.run(lambda: "again", 1) == "again"
            with pytest.raises(ZeroDivisionError):
                await encoders.run(lambda: 1 / 0, 1)
        finally:
            gate.set()
            encoders.close()

    asyncio.run(crowd())


def test_what_was_encoded_for_somebody_who_went_away_is_undone():
    async def go_away():
        encoders, began, gate = EncoderThreads(2), threading.Event(), threading.Event()
        undone: list[str] = []

        def work():
            began.set()
            gate.wait(30)
            return "outcome"

        task = asyncio.create_task(encoders.run(work, 1, undone.append))
        waiting = asyncio.create_task(encoders.run(lambda: "never", 1, undone.append))
        await asyncio.to_thread(began.wait, 30)
        for each in (task, waiting):
            each.cancel()
            with pytest.raises(asyncio.CancelledError):
                await each
        gate.set()
        assert await encoders.run(lambda: "again", 1) == "again"  # behind the first, in the same thread
        encoders.close()
        return undone

    assert asyncio.run(go_away()) == ["outcome"]


def test_the_size_of_a_chat_counts_its_messages():
    assert measure_prompt("abc") == 3
    assert measure_prompt(None) == measure_prompt(Prompt([1], [True])) == 0
    assert measure_prompt([user("a")] * 200) > SHORT_TEXT
    assert 0 < measure_prompt([5] * 100) < measure_prompt([5] * 10_000)
    assert measure_prompt([5] * 10_000) > SHORT_TEXT


def test_a_score_whose_time_is_over_ends(serve, talker):
    """The engine has nothing left to do soon after a 504."""
    client = serve(talker, Limits())
    engine = client.app.state.shared.engine
    item = {"text": "Paris. " * 60}
    passes = []
    handle = innermost(talker.model).register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with slow(client, 0.05):
            assert fault(ask(client, SCORE, input=[item] * 400, timeout=1), 504)["code"] == "deadline_exceeded"
            wait_until(lambda: not len(engine._tasks))
            seen = len(passes)
            time.sleep(0.3)
            assert len(passes) == seen
    finally:
        handle.remove()
    ok(client, SCORE, input=item)


WRONG = [[], 1, None, 1.5, {}, {"a": 1}, "", True]


@pytest.mark.parametrize("item", WRONG)
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, lambda items: {"messages": items}),
        (ChatRequest, lambda items: {"messages": [user(items)]}),
        (ChatRequest, lambda items: {"messages": [user("a")], "stop": items}),
        (ChatRequest, lambda items: {"messages": [user("a")], "modalities": items}),
        (ChatRequest, lambda items: {"messages": [user("a")], "tools": items}),
        (CompletionRequest, lambda items: {"prompt": items}),
        (CompletionRequest, lambda items: {"prompt": [items]}),
        (ScoreRequest, lambda items: {"input": items}),
        (ScoreRequest, lambda items: {"input": {"text": "a", "messages": items}}),
    ],
)
def test_the_first_wrong_item_of_a_list_ends_its_check(kind, body, item):
    """A million errors for a body of a megabyte took seconds, in which nobody else was served."""
    count = 0
    try:
        kind.model_validate(body([item] * 3000))
    except ValidationError as wrong:
        count = wrong.error_count()
    assert count < 10


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({f"a{i}": 0 for i in range(MAX_FIELDS + 1)}, "256 fields at most, got 257"),
        ({"a": [[{str(i): 0 for i in range(MAX_FIELDS + 1)}]]}, "fields"),
        ({"messages": [[]] * (MAX_ITEMS + 1)}, "4096 items at most unless they are numbers, got 4097"),
        ([["a"] * (MAX_ITEMS + 1)], "items"),
    ],
)
def test_a_body_of_many_parts_is_refused_before_it_is_understood(data, words):
    with pytest.raises(ValueError, match=words):
        check_body(json.dumps(data).encode(), 32)


def test_a_body_of_many_token_ids_or_as_many_parts_as_allowed_is_taken():
    check_body(json.dumps({"prompt": [5] * 100_000}).encode(), 32)
    check_body(json.dumps([{str(i): 0 for i in range(MAX_FIELDS)}, [[]] * MAX_ITEMS]).encode(), 32)
    largest = Limits()
    assert max(largest.messages, largest.message_parts, largest.prompts, largest.texts) <= MAX_ITEMS
