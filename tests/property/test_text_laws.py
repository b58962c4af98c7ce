"""Text that comes piece by piece is the text that the tokenizer decodes at once, whatever the tokenizer and the ids."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from selfdoubt.lm.prefill import run_to_end
from selfdoubt.lm.text.detokenizer import Detokenizer, TextsBetween, detokenize_in_chunks
from selfdoubt.lm.text.stops import StopFinder
from tests.speakers import KINDS, words

SCRIPTS = "aé ⠓⠑⠇⠇⠕東京😀\u0301\ufffd\n  .'"


def of_kind(kind):
    if words(kind) is None:
        pytest.skip(f"the model folder of {kind} is not here; see SELFDOUBT_REAL_MODELS")
    return words(kind)


@st.composite
def ids_of(draw, tokenizer):
    """Runs of any tokens, of bytes, of half characters, of control tokens, and of real text."""
    known = len(tokenizer)
    raw = [i for i in range(min(known, 300)) if re.fullmatch("<0x..>", tokenizer.convert_ids_to_tokens(i))]
    part = st.one_of(
        st.lists(st.integers(0, known - 1), max_size=12),
        st.lists(st.integers(0, known + 3), max_size=3),
        st.sampled_from([[i] for i in tokenizer.all_special_ids]),
        st.text(SCRIPTS, max_size=8).map(lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])),
        *([st.lists(st.sampled_from(raw), max_size=24)] if raw else []),
        *([st.binary(max_size=30).map(lambda b: [raw[x] for x in b])] if len(raw) == 256 else []),
    )
    ids = [i for one in draw(st.lists(part, max_size=6)) for i in one]
    return ids[draw(st.integers(0, 3)) :]


def decoded(tokenizer, ids):
    if not tokenizer.is_fast:  # sentencepiece itself refuses what it does not know
        ids = [i for i in ids if i < len(tokenizer)]
    return tokenizer.decode(ids) if ids else ""


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_pieces_add_up_to_what_is_decoded_at_once(kind, data):
    tokenizer = of_kind(kind)
    ids = data.draw(ids_of(tokenizer))
    pieces = Detokenizer(tokenizer)
    found = ""
    for n, token in enumerate(ids, 1):
        found += pieces.add(token)
        assert found + pieces.flush() == decoded(tokenizer, ids[:n])  # at whatever length it ends
    assert "".join(run_to_end(detokenize_in_chunks(tokenizer, ids))) == decoded(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_text_after_a_text_has_the_space_that_parts_them(kind, data):
    tokenizer = of_kind(kind)
    before = tokenizer("a capital of", add_special_tokens=False)["input_ids"]
    if kind in ("llama", "gemma-like"):  # its last token is no part of a run of bytes
        before += tokenizer.convert_tokens_to_ids(["▁the", "▁Paris"])
    ids = data.draw(ids_of(tokenizer))
    together = decoded(tokenizer, before + ids)
    assert decoded(tokenizer, before) + "".join(run_to_end(detokenize_in_chunks(tokenizer, ids, before))) == together


@pytest.mark.parametrize("kind", KINDS)
def test_many_pieces_cost_the_same_each(kind):
    tokenizer = of_kind(kind)
    ids = (tokenizer("a ⠓⠑ 東京. def f(x) 😀", add_special_tokens=False)["input_ids"] * 2000)[:6000]
    seen = 0

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, part, **options):
            nonlocal seen
            seen += len(part)
            return tokenizer.decode(part, **options)

    assert "".join(run_to_end(detokenize_in_chunks(Counting(), ids))) == tokenizer.decode(ids)
    assert seen < 60 * len(ids)


@pytest.mark.parametrize("kind", ["llama", "gemma-like"])
def test_a_run_of_bytes_gives_each_token_the_characters_that_it_completes(kind):
    tokenizer = of_kind(kind)
    raw = {byte: tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)}
    run = [raw[byte] for byte in "⠓é\n".encode()]
    word = tokenizer.convert_tokens_to_ids("Paris")
    assert run_to_end(detokenize_in_chunks(tokenizer, [word, *run, word])) == [
        "Paris",
        "",
        "",
        "⠓",
        "",
        "é",
        "\n",
        "Paris",
    ]
    pieces = Detokenizer(tokenizer)
    assert [pieces.add(i) for i in [word, *run, word]] == ["Paris", *[""] * len(run), "⠓é\nParis"]
    assert run_to_end(detokenize_in_chunks(tokenizer, [word, *run, raw[0xFF], word])) == [
        "Paris",
        *["\ufffd"] * 7,
        "Paris",
    ]


@pytest.mark.parametrize("kind", ["llama", "unigram", "wordpiece"])
def test_a_token_among_others_has_its_space(kind):
    tokenizer = of_kind(kind)
    between = TextsBetween(tokenizer)
    ids = tokenizer("the capital of the yen", add_special_tokens=False)["input_ids"]
    assert "".join(between[i] for i in [ids[0], *ids])[len(between[ids[0]]) :].strip() == tokenizer.decode(ids).strip()
    assert any(between[i].startswith(" ") for i in ids)


def naive(stops, pieces):
    """Where the answer is cut and after which piece, and how much of the text is certain after each piece before."""
    text = ""
    certain: list[int] = []
    for n, piece in enumerate(pieces):
        text += piece
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            return min(found), n, certain
        certain.append(len(text) - max((k for s in stops for k in range(len(s)) if text.endswith(s[:k])), default=0))
    return None, None, certain


@given(
    st.lists(st.text("ab", min_size=1, max_size=7), max_size=4),
    st.lists(st.text("abc", max_size=5), max_size=30),
)
@example(["aab", "ab"], ["a", "aab"])
@example(["abab"], ["aba", "abab"])
@example(["aaaa" * 50], ["a" * 7] * 40)
def test_stops_are_found_where_and_when_a_search_of_the_whole_text_finds_them(stops, pieces):
    cut, at, certain = naive(stops, pieces)
    finder = StopFinder(stops)
    found: list[int] = []
    for n, piece in enumerate(pieces):
        twin = finder.fork()
        place = finder.feed(piece)
        assert twin.feed(piece) == place
        if place is not None:
            assert (place, n) == (cut, at)
            assert found == certain
            return
        found.append(finder.length - finder.partial)
    assert cut is None
    assert found == certain


def test_the_length_of_a_stop_that_never_comes_costs_nothing():
    class Counted(str):
        __slots__ = ()
        looked = 0

        def __getitem__(self, place):
            Counted.looked += 1
            return str.__getitem__(self, place)

    stop = Counted("ab" * 125_000)
    finder = StopFinder([stop])
    for _ in range(1000):
        assert finder.feed("abac") is None
    assert Counted.looked < 40_000
