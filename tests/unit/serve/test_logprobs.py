"""Log-probabilities in OpenAI's shapes; a token's bytes are exact where its text is a part of a character."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.completion_choice import Logprobs

from selfdoubt.serve.openai import logprobs
from tests import zoo


@given(st.text(min_size=1))
def test_the_bytes_of_tokens_add_up_to_those_of_the_text(text):
    words = zoo.tokenizer()
    ids = words(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert b"".join(logprobs.find_token_bytes(words, i) for i in ids) == text.encode()


def test_bytes_of_a_tokenizer_that_falls_back_to_bytes(stories):
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(stories)
    ids = words("東", add_special_tokens=False)["input_ids"]
    assert b"".join(logprobs.find_token_bytes(words, i) for i in ids).strip() == "東".encode()


def test_a_part_of_a_character_is_told_in_bytes(talker):
    answer = talker.score("It is ¥東京 there.")
    entries = [logprobs.format_chat_logprobs(talker.tokenizer, token, 3) for token in answer.tokens]
    ChoiceLogprobs(content=entries)
    assert any(e["token"].startswith("bytes:\\x") for e in entries)
    assert bytes(b for e in entries for b in e["bytes"]).decode().endswith("東京 there.")
    for token, entry in zip(answer.tokens, entries, strict=True):
        assert entry["logprob"] == token.logprob
        assert len(entry["top_logprobs"]) == 3
        tops = [t["logprob"] for t in entry["top_logprobs"]]
        assert tops == sorted(tops, reverse=True)
        for top in entry["top_logprobs"]:
            if top["bytes"] == entry["bytes"]:
                assert top["logprob"] == entry["logprob"]


def test_completions_have_the_older_shape(pocket):
    answer = pocket.generate("What is the capital of France?")
    found = logprobs.format_completion_logprobs(pocket.tokenizer, list(answer.tokens), 2)
    Logprobs(**found)
    assert "".join(found["tokens"]) == answer.text
    assert [answer.text[o:].startswith(t) for o, t in zip(found["text_offset"], found["tokens"], strict=True)]
    assert found["text_offset"] == [answer.text.index(t, max(0, o)) for o, t in
                                    zip(found["text_offset"], found["tokens"], strict=True)]  # fmt: skip
    for token, tops in zip(found["tokens"], found["top_logprobs"], strict=True):
        assert token in tops
        assert 2 <= len(tops) <= 3
    assert logprobs.format_completion_logprobs(pocket.tokenizer, list(answer.tokens), 0)["top_logprobs"] is None


def test_what_is_as_good_as_impossible_stays_a_number(talker):
    from dataclasses import replace

    token = talker.score("Paris is far").tokens[0]
    least = replace(token.alternatives[0], probability=0.0)
    entry = logprobs.format_chat_logprobs(talker.tokenizer, replace(token, logprob=-math.inf, alternatives=(least,)), 1)
    assert entry["logprob"] == -9999.0
    assert entry["top_logprobs"][0]["logprob"] == pytest.approx(-9999.0)
