"""What may be asked: every parameter that OpenAI defines is either honoured, without an effect, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from pydantic import ValidationError

from selfdoubt.errors import ConfigError
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.request import build_request
from selfdoubt.serve.http.settings import ServerSettings
from selfdoubt.serve.openai.errors import RequestError
from selfdoubt.serve.openai.params import build_params, decode_ids
from selfdoubt.serve.openai.requests import (
    ADVICE,
    ChatRequest,
    CompletionRequest,
    ScoreRequest,
    describe_validation_error,
)

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**parameters):
    return ChatRequest.model_validate({"messages": HELLO, **parameters})


def complaint_of(model, data):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(data)
    return describe_validation_error(caught.value.errors())


def params_of(request, lm, settings=ServerSettings(), limits=Limits()):  # noqa: B008
    return build_params(request, settings, limits, lm.front)


def test_every_parameter_of_openai_is_known():
    theirs = {*chat_create_params.CompletionCreateParamsBase.__annotations__, "stream"}
    assert theirs <= {*ChatRequest.model_fields}
    theirs = {*completion_create_params.CompletionCreateParamsBase.__annotations__, "stream"}
    assert theirs <= {*CompletionRequest.model_fields}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function"}]), ("functions", [{"name": "f"}]), ("tool_choice", "required"),
        ("function_call", {"name": "f"}), ("response_format", {"type": "json_object"}), ("frequency_penalty", 0.5),
        ("presence_penalty", -1), ("logit_bias", {"50256": -100}), ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"), ("verbosity", "low"), ("audio", {"voice": "ash"}), ("prediction", {}),
        ("web_search_options", {}), ("moderation", {}),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_in_words(name, value):
    message, param = complaint_of(ChatRequest, {"messages": HELLO, name: value})
    assert name in message
    assert "support" in message
    assert param == name


@pytest.mark.parametrize(("name", "value"), [("echo", True), ("suffix", "end")])
def test_what_completions_cannot_do_is_refused_in_words(name, value):
    message, param = complaint_of(CompletionRequest, {"prompt": "x", name: value})
    assert "not supported" in message
    assert param == name


def test_neutral_values_of_the_same_are_taken():
    chat(
        tools=[], functions=[], tool_choice="none", function_call="auto", response_format={"type": "text"},
        frequency_penalty=0, presence_penalty=0.0, logit_bias={}, modalities=["text"], reasoning_effort=None,
        audio=None, parallel_tool_calls=True,
    )  # fmt: skip
    chat(user="me", metadata={"a": "b"}, store=False, service_tier="auto", safety_identifier="x", prompt_cache_key="k")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"messages": HELLO, "top_k": 4}, "Unrecognized request argument supplied: top_k"),
        ({}, "you must provide messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "content of a message must be"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]}, "content of a message"),
        ({"messages": [{"role": "user", "content": "x", "name": "Eve"}]}, "names of participants"),
        ({"messages": HELLO, "n": "2"}, "n:"),
        ({"messages": HELLO, "n": 0}, "n:"),
        ({"messages": HELLO, "n": True}, "n:"),
        ({"messages": HELLO, "temperature": 2.1}, "temperature:"),
        ({"messages": HELLO, "temperature": float("nan")}, "temperature:"),
        ({"messages": HELLO, "top_p": 1.01}, "top_p:"),
        ({"messages": HELLO, "seed": 2**63}, "seed:"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens:"),
        ({"messages": HELLO, "stop": [*"abcde"]}, "stop must be"),
        ({"messages": HELLO, "stop": ""}, "stop must be"),
        ({"messages": HELLO, "top_logprobs": 21}, "top_logprobs:"),
        ({"messages": HELLO, "logprobs": 3}, "logprobs:"),
        ({"messages": HELLO, "stream": "yes"}, "stream:"),
        ({"messages": HELLO, "stream_options": {"usage": True}}, "stream_options.usage"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_told_in_one_line_which_part_is_wrong(data, words):
    message, _ = complaint_of(ChatRequest, data)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("prompt", ["", [], [[]], [1, "a"], [1, -1], [[1], "a"], None, 7, {"a": 1}])
def test_a_prompt_is_text_or_ids_or_several(prompt, talker):
    if prompt == "":  # is for the tokenizer to say: another model may begin with something
        CompletionRequest(prompt="")
        return
    message, param = complaint_of(CompletionRequest, {"prompt": prompt})
    assert message == ADVICE["prompt"]
    assert param == "prompt"


def test_prompts_come_as_one_or_several(talker):
    def of(prompt):
        return params_of(CompletionRequest(prompt=prompt), talker).prompts

    assert of("a b") == ["a b"]
    assert of(["a", "b"]) == ["a", "b"]
    assert of([5, 6]) == [[5, 6]]
    assert of([[5], [6, 7]]) == [[5], [6, 7]]
    prompt = decode_ids(talker.front, [0, 9])
    assert (prompt.ids, prompt.is_user_token) == ([0, 9], [False, True])  # <|bos|> is not a user's word


def test_parts_of_a_content_are_lines_and_a_developer_is_the_system(talker):
    parts = [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert params_of(chat(messages=messages), talker).prompts == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One.\nTwo."}]
    ]


def test_answers_of_the_server_can_be_sent_back():
    said: dict[str, Any] = {
        "role": "assistant",
        "content": "Hi.",
        "refusal": None,
        "audio": None,
        "annotations": [],
        "tool_calls": None,
    }
    chat(messages=[*HELLO, said, *HELLO])


def test_the_defaults_are_those_of_openai_unless_the_server_has_others(talker):
    first, second = params_of(chat(), talker), params_of(chat(), talker)
    assert first.sampling.temperature == 1
    assert first.sampling.top_p == 1
    assert len(first.seeds) == 1
    assert not first.stream
    assert not first.logprobs
    assert first.seeds != second.seeds
    assert params_of(chat(), talker, ServerSettings(temperature=0)).sampling.temperature == 0
    assert params_of(chat(temperature=0.5), talker, ServerSettings(temperature=0)).sampling.temperature == 0.5
    assert params_of(CompletionRequest(prompt="x"), talker).sampling.max_tokens == 16
    assert params_of(chat(), talker, ServerSettings(max_tokens=40)).sampling.max_tokens == 40
    assert params_of(chat(), talker, limits=Limits(answer_tokens=7)).sampling.max_tokens == 7


def test_options_reach_the_engine(talker):
    found = params_of(chat(max_completion_tokens=9, top_p=0, seed=3, stop="end", n=2, timeout=5, temperature=0), talker)
    assert (found.sampling.max_tokens, found.sampling.temperature) == (9, 0)
    assert 0 < found.sampling.top_p < 1e-9
    assert (found.seeds, found.stops, found.timeout) == ((3, 4), ("end",), 5)
    request = found.build_request(talker.front, found.prompts[0], Limits(), "me")
    assert (request.sampling, request.seeds, request.stops) == (found.sampling, found.seeds, found.stops)
    assert (request.client, request.timeout) == ("me", 5)
    assert request == build_request(
        talker.front, HELLO, {"max_tokens": 9, "top_p": 1e-12, "seed": 3, "stop": ["end"], "temperature": 0},
        n=2, alternatives=0, client="me", timeout=5,
    )  # fmt: skip
    assert params_of(chat(timeout=500), talker, limits=Limits(timeout=60)).timeout == 60


@pytest.mark.parametrize(
    "request_",
    [
        chat(max_tokens=3, max_completion_tokens=4),
        chat(top_logprobs=2),
        chat(top_logprobs=0, logprobs=False),
        chat(stream_options={"include_usage": True}),
        CompletionRequest(prompt="x", best_of=3),
        CompletionRequest(prompt=["x"] * 129),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(request_, talker):
    with pytest.raises(ConfigError):
        params_of(request_, talker)


def test_another_model_is_not_found(talker):
    with pytest.raises(RequestError, match="gpt-5") as caught:
        params_of(chat(model="gpt-5"), talker)
    assert caught.value.status == 404
    assert caught.value.code == "model_not_found"
    params_of(chat(model="pocket"), talker)


def test_what_the_server_was_told_not_to_do_is_not_asked_for(talker, pocket):
    assert not params_of(chat(), talker, ServerSettings(risk=False)).risk
    with pytest.raises(RequestError, match="--no-risk"):
        params_of(chat(risk=True), talker, ServerSettings(risk=False))
    with pytest.raises(RequestError, match="selfdoubt calibrate"):
        params_of(chat(withhold=True), talker)
    assert params_of(chat(withhold=True), pocket).hide_abstained
    assert not params_of(chat(withhold=False), pocket, ServerSettings(hide_abstained=True)).hide_abstained


def test_texts_to_score_come_as_one_or_several():
    ScoreRequest.model_validate({"input": {"text": "a"}})
    ScoreRequest.model_validate({"input": [{"text": "a", "question": "b"}, {"text": "a", "messages": HELLO}]})
    assert "input" in complaint_of(ScoreRequest, {"input": []})[0]
