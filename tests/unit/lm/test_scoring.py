"""Scoring given text: where a question ends and its text begins, and what around an answer is not part of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from selfdoubt import RiskAwareLM
from selfdoubt.errors import PromptError
from selfdoubt.lm.text.prompt import encode, encode_pair, strip_answer
from tests import oracles, words
from tests.real import FOLDER
from tests.zoo import talker
from tests.zoo import tokenizer as zoo_tokenizer

PIECES = st.sampled_from([
    "Paris", "the", " is", " ", "  ", "\n", "\t", ".", "Q:", "A:", "http", "s://", "x", "東京", "é", "😀", "    return",
    "7", ")",
])  # fmt: skip
TEXTS = st.lists(PIECES, min_size=1, max_size=6).map("".join).filter(str.strip)
REAL = ("pocket", "smollm2", "qwen", "gemma")


def tokenizer(name):
    found = words.real(name) if name in REAL else words.small(name)
    if found is None:
        pytest.skip(f"there is no model folder {FOLDER / name}")
    return found


@pytest.fixture(scope="module")
def lm():
    return RiskAwareLM(talker(), zoo_tokenizer())


def decoded(own, ids):
    return own.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", [*words.LOSSLESS, *REAL])
@given(question=TEXTS, text=TEXTS)
def test_every_character_of_a_text_is_scored_and_none_of_the_questions(name, question, text):
    own = tokenizer(name)
    prompt, ids = encode_pair(own, question, text, raw=True)
    moved = question[len(question.rstrip()) :] + text
    whole = encode(own, question + text, raw=True).ids
    assume(prompt.ids + ids == whole)  # or the question is less than a token: see below
    assert own.eos_token_id not in whole
    start = len(whole) - len(own(question + text, add_special_tokens=False)["input_ids"])
    # The text's first token may begin in the question; without it, all that is scored is less than the text.
    if own.is_fast:
        spans = own(question + text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        scored = spans[len(prompt.ids) - start :]
        border = len(question.rstrip())
        if name in ("starts and ends", "ends"):  # whose offsets leave out spaces
            scored = [(a, b) for a, b in scored if b > a]
        assert all(b > border for _, b in scored)
        assert all(b <= border for _, b in spans[: len(prompt.ids) - start]) or name in ("starts and ends", "ends")
    said = decoded(own, ids)
    joined = decoded(own, own(question + text, add_special_tokens=False)["input_ids"])
    assert said.endswith(moved.lstrip()) or joined != question + text  # bytes of half a character
    rest = said.removesuffix(moved)
    assert question.rstrip().endswith(rest) or "\ufffd" in said or said.strip() == moved.strip()


@pytest.mark.parametrize(("question", "text"), [("h", "ttp://"), ("htt", "ps://x"), ("Par", "is"), ("http", "s://x")])
@pytest.mark.parametrize("name", ["byte-level", "metaspace first", "ends", "smollm2", "qwen", "gemma"])
def test_a_border_inside_a_word(name, question, text):
    own = tokenizer(name)
    prompt, ids = encode_pair(own, question, text, raw=True)
    assert prompt.ids
    assert decoded(own, ids).strip().endswith(text)
    assert question.endswith(decoded(own, ids).strip().removesuffix(text))


def test_a_question_that_is_part_of_one_token_is_read_apart_where_nothing_goes_before_it():
    own = copy.deepcopy(words.small("byte-level"))
    own.bos_token = None
    word = max((t for t in own.get_vocab() if t.isalpha() and t.isascii()), key=len)
    assert own.convert_ids_to_tokens(own(word)["input_ids"]) == [word]
    prompt, ids = encode_pair(own, word[:2], word[2:], raw=True)
    assert (decoded(own, prompt.ids), decoded(own, ids)) == (word[:2], word[2:])


@pytest.mark.parametrize("name", [*words.SMALL, *REAL])
def test_a_text_after_a_trailing_space_is_scored_from_its_first_word(name):
    own = tokenizer(name)
    question = "Q: What is the capital of France?\nA: "
    found = {text: encode_pair(own, question, f"{text} is the capital.", raw=True) for text in ("Paris", "Berlin")}
    assert found["Paris"][1] != found["Berlin"][1]
    for text, (_, ids) in found.items():
        said = decoded(own, ids).strip().lower()
        assert said.endswith(f"{text} is the capital.".lower()) or name == "word-piece"
        assert said.removesuffix(f"{text} is the capital.".lower()).strip() in ("", ":") or name == "word-piece"


@pytest.mark.parametrize("name", ["byte-level", "metaspace never", "smollm2", "qwen", "gemma", "pocket"])
@given(question=TEXTS, text=TEXTS)
def test_ids_against_lm_evaluation_harness(name, question, text):
    own = tokenizer(name)
    model = oracles.load("lm_eval.api.model").TemplateLM
    harness: Any = type("Harness", (model,), {"backend": "causal"})
    harness.__abstractmethods__ = frozenset()
    harness.tok_encode = lambda _, text, **__: own(text, add_special_tokens=False)["input_ids"]
    before, after = harness._encode_pair(object.__new__(harness), question, text)
    whole = own(question + text, add_special_tokens=False)["input_ids"]
    assume(before == whole[: len(before)])  # where they do not, the harness scores other tokens than it has read
    prompt, ids = encode_pair(own, question, text, raw=True)
    assert prompt.ids[len(prompt.ids) - len(before) :] == before
    assert ids == after


def test_paris_and_berlin_score_differently(lm):
    question = "Q: What is the capital of France?\nA: "
    paris, berlin = (lm.score(f"{c} is the capital.", question, raw=True) for c in ("Paris", "Berlin"))
    assert paris.scores["sum_nll"] != berlin.scores["sum_nll"]
    assert "".join(t.text for t in paris.tokens).strip() == paris.text == "Paris is the capital."


AROUND = ["{}\n", " {}", "\ufeff{}", "\ufeff {}\r\n", "\n\n{}\t", "{}\u00a0", "{} \ufeff"]


@pytest.mark.parametrize("around", AROUND)
def test_what_stands_around_an_answer_changes_nothing(lm, around):
    bare, found = (lm.score(text, "Which city?") for text in ("Paris is.", around.format("Paris is.")))
    assert found == bare
    assert found.text == "Paris is."
    batch = lm.score_batch([("Which city?", around.format("Paris is.")), ("Which city?", "Rome")])
    assert batch[0].scores == pytest.approx(bare.scores)


@pytest.mark.parametrize("around", ["{}\n", "\ufeff{}", "\ufeff{}\r\n", "{}  "])
@pytest.mark.parametrize("question", [None, "Which city?"])
def test_of_a_text_the_byte_order_mark_and_its_end_are_no_part(lm, around, question):
    text = "  Paris\n  is."
    bare, found = (lm.score(t, question, raw=question is not None) for t in (text, around.format(text)))
    assert found == bare
    assert found.text == text  # its indentation is


@pytest.mark.parametrize("text", ["", " \n", "\ufeff", " \ufeff\n"])
@pytest.mark.parametrize("question", [None, "Which city?"])
@pytest.mark.parametrize("raw", [True, False])
def test_an_empty_text_is_refused(lm, text, question, raw):
    with pytest.raises(PromptError, match=r"^the text to score is empty$"):
        lm.score(text, question, raw=raw)


@given(st.text(alphabet=st.sampled_from("a b\n\t\r\ufeff\u2028\u00a0."), max_size=12))
def test_stripping_twice_is_stripping_once(text):
    for joined in (False, True):
        once = strip_answer(text, joined=joined)
        assert strip_answer(once, joined=joined) == once
        assert not once or once[-1] not in "\ufeff \n"


def test_control_tokens_in_a_given_answer_are_letters():
    own = zoo_tokenizer()
    ids = encode_pair(own, "Which city?", "Paris<|end|>\n<|user|>")[1]
    assert not set(ids) & set(own.all_special_ids)
    assert own.decode(ids) == "Paris<|end|>\n<|user|>"


def test_a_text_of_which_the_tokenizer_makes_nothing_is_refused():
    with pytest.raises(PromptError, match=r"^the tokenizer makes no token of the text to score"):
        encode_pair(words.small("word-piece"), "What?", "\x07", raw=True)
