"""Answers of models with tokenizers of every kind: their text is what is decoded, and stops cut it where they begin."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdoubt.lm.decode import TokenEvent
from selfdoubt.lm.generation import AnswerInProgress
from selfdoubt.lm.text.prompt import encode
from selfdoubt.lm.token_table import ScoredId
from selfdoubt.serve.openai.params import decode_ids
from tests.speakers import speaker, words

KINDS = ("byte-level", "llama", "gemma-like", "wordpiece", "unigram")


def before(kind):
    """Ids of a text whose last token is a word."""
    ids = list(words(kind)("a is the", add_special_tokens=False)["input_ids"])
    if kind in ("llama", "gemma-like"):
        ids += words(kind).convert_tokens_to_ids(["▁the", "▁Paris"])
    return ids


def decoded_after(kind, ids):
    whole = words(kind).decode([*before(kind), *ids])
    assert whole.startswith(words(kind).decode(before(kind)))
    return whole[len(words(kind).decode(before(kind))) :]


def scored(token):
    return ScoredId(token, -1.0, 0.5, 0.5, 0.0, 0.0, 0.0, None, 0.0, ())


def answered(kind, ids, stops=(), finish="length"):
    """The answer of these ids, and the tokens that each step let go; the steps end with the answer."""
    progress = AnswerInProgress(speaker(kind).front, [], stops, before=before(kind))
    released = []
    for n, token in enumerate(ids, 1):
        last = n == len(ids) and finish == "length"
        released.append(progress.add(TokenEvent(0, scored(token), "length" if last else None)))
        if progress.finish is not None:
            return progress.answer, released
    released.append(progress.add(TokenEvent(0, None, "stop", end=scored(2))))
    return progress.answer, released


def some_ids(kind):
    known = len(words(kind))
    return st.lists(st.integers(3, known + 1) | st.integers(known - 20, known - 1), min_size=1, max_size=25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("finish", ["length", "stop"])
@given(st.data())
@settings(max_examples=40)
def test_an_answer_is_what_the_whole_decodes_to_behind_its_prompt(kind, finish, data):
    ids = data.draw(some_ids(kind))
    answer, released = answered(kind, ids, finish=finish)
    assert [t.id for t in answer.tokens] == ids
    assert answer.text == decoded_after(kind, ids) == "".join(t.text for t in answer.tokens)
    assert [t for step in released for t in step] == [*answer.tokens]


def as_it_stands(kind, ids):
    """The text after some tokens without what the next one may turn into a character."""
    text = decoded_after(kind, ids)
    return text.removesuffix("\ufffd") if kind == "byte-level" else text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("finish", ["length", "stop"])
@given(st.data())
@settings(max_examples=100)
def test_a_stop_cuts_the_text_where_it_begins_as_soon_as_the_text_holds_it(kind, finish, data):
    ids = data.draw(some_ids(kind))
    whole = decoded_after(kind, ids)
    start = data.draw(st.integers(0, len(whole)))
    stops = [whole[start : start + data.draw(st.integers(1, 6))] or "x", "a never", whole + "東"]
    if any("\ufffd" in stop for stop in stops[:1]):
        stops = stops[1:]
    cut, steps, text = None, len(ids), whole
    for n in range(1, len(ids) + 1):
        text = as_it_stands(kind, ids[:n]) if n < len(ids) else whole
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            cut, steps = min(found), n
            break
    answer, released = answered(kind, ids, stops, finish)
    assert answer.text == text[:cut]
    assert answer.finish == (finish if cut is None else "stop")
    assert len(released) == steps + (cut is None and finish == "stop")
    assert [t.id for t in answer.tokens] == ids[: len(answer.tokens)]
    assert "".join(t.text for step in released for t in step) == answer.text
    if cut is not None and answer.tokens:  # nothing of the stop is let go
        assert answer.tokens[-1].text or answer.tokens[-1].id >= len(words(kind))


def test_a_stop_that_begins_with_a_character_of_several_tokens_keeps_none_of_them():
    ids = [332, 99, 3]
    assert decoded_after("byte-level", ids) == "条<|assistant|>"
    answer, _ = answered("byte-level", ids, ["条<|"], "length")
    assert (answer.text, answer.tokens, answer.finish) == ("", (), "stop")


@pytest.mark.parametrize("kind", ["llama", "gemma-like"])
def test_a_stop_of_bytes_ends_the_answer_with_its_last_byte(kind):
    """A line feed is a byte there: nobody needs to wait for the next token."""
    paris, feed, *flower = words(kind).convert_tokens_to_ids(["▁Paris", "<0x0A>", "<0xE2>", "<0x9C>", "<0xBF>"])
    answer, released = answered(kind, [paris, feed, paris], ["\n"])
    assert (answer.text, answer.finish, len(released)) == (" Paris", "stop", 2)
    answer, released = answered(kind, [paris, *flower, *flower, feed, paris], ["✿\n"])
    assert (answer.text, answer.finish, len(released)) == (" Paris✿", "stop", 8)
    assert [t.text for t in answer.tokens] == [" Paris", "", "", "✿"]


@pytest.mark.parametrize("kind", ["llama", "gemma-like", "unigram", "wordpiece"])
def test_a_stop_that_begins_with_a_space_is_met_at_once(kind):
    ids = [i for i in before(kind) if decoded_after(kind, [i]).startswith(" ")]
    stop = decoded_after(kind, ids[-1:])
    answer, _ = answered(kind, ids[-1:] * 2, [stop])
    assert (answer.text, answer.tokens, answer.finish) == ("", (), "stop")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_generated_answers_in_chats_and_completions(kind, seed):
    options = {"temperature": 1.0, "seed": seed, "max_tokens": 24}
    for chat in (True, False):
        lm = speaker(kind, chat=chat)
        answer = lm.generate("a is the", **options)
        ids = [t.id for t in answer.tokens]
        prompt = encode(lm.tokenizer, "a is the").ids
        whole = lm.tokenizer.decode([*prompt, *ids])
        assert answer.text == (lm.tokenizer.decode(ids) if chat else whole[len(lm.tokenizer.decode(prompt)) :])
        stream = lm.stream("a is the", **options)
        assert [*stream] == [*answer.tokens]
        assert stream.answer == answer


@pytest.mark.parametrize("kind", KINDS)
def test_scored_text_has_the_pieces_of_the_text(kind):
    lm = speaker(kind)
    text = "a is the" if kind == "wordpiece" else "a the ⠓ 東é is"
    tokens = lm.score(text).tokens
    found = "".join(t.text for t in tokens)
    starts_with_bos = lm.tokenizer.bos_token_id is not None
    assert found == text if starts_with_bos else text.endswith(found) and found.startswith(" ")


@pytest.mark.parametrize("kind", KINDS)
def test_alternatives_stand_as_they_would_in_the_text(kind):
    lm = speaker(kind)
    prompt = encode(lm.tokenizer, "a is the", raw=True).ids
    seen = 0
    for seed in range(20):
        ids, text = [*prompt], lm.tokenizer.decode(prompt)
        for token in lm.generate("a is the", raw=True, temperature=1.0, max_tokens=8, seed=seed).tokens:
            for other in token.alternatives:
                there = lm.tokenizer.decode([*ids, other.id])
                if there.startswith(text) and "\ufffd" not in text[-1:] + there[-1:] + other.text:
                    assert other.text == there[len(text) :]
                    seen += other.text.startswith(" ")
            ids.append(token.id)
            text = lm.tokenizer.decode(ids)
    assert seen or kind == "byte-level"


def test_tokens_beyond_the_vocabulary_are_without_text_in_every_tokenizer():
    """A model may have more rows than its tokenizer has tokens, and sentencepiece raises at them."""
    lm = speaker("sentencepiece")
    known = len(lm.tokenizer)
    answers = [lm.generate("Paris is a", temperature=1.5, seed=seed, max_tokens=14) for seed in range(5)]
    named = [o for a in answers for t in (*a.tokens, *a.question) for o in t.alternatives]
    assert any(o.id >= known for o in named)
    assert all(o.text == "" for o in named if o.id >= known)
    assert decode_ids(lm.front, [5, known, 6]).ids == [5, known, 6]
