"""Options and questions are what they are taken for: what is not known is never ignored."""

from __future__ import annotations

import re
from collections import deque

import numpy as np
import pytest
import torch

from selfdoubt import RiskAwareLM
from selfdoubt.errors import ConfigError, PromptError
from selfdoubt.lm.inputs import list_pairs, list_questions
from selfdoubt.lm.options import ELSEWHERE, Options, read_options
from selfdoubt.serve.engine.request import to_ask
from tests import plain
from tests.zoo import talker, tokenizer

CHAT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def lm():
    return RiskAwareLM(talker(), tokenizer())


DOORS = {
    "generate": lambda lm, **o: lm.generate("Hi", **o),
    "a list": lambda lm, **o: lm.generate(["Hi"], **o),
    "stream": lambda lm, **o: lm.stream("Hi", **o),
    "candidates": lambda lm, **o: lm.candidates("Hi", 2, **o),
    "until": lambda lm, **o: lm.generate_until("Hi", 0.5, **o),
    "engine": lambda lm, **o: to_ask(lm.front, "Hi", 1, 0, "", None, o),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("temprature", "did you mean temperature?"),
        ("Top_P", "did you mean top_p?"),
        ("max_new_tokens", "use max_tokens"),
        ("do_sample", "use temperature"),
        ("seeed", "did you mean seed?"),
        ("frobnicate", "there are max_tokens, temperature"),
    ],
)
def test_an_unknown_option_is_an_error_at_every_door(lm, door, name, nearest):
    with pytest.raises(ConfigError, match=re.escape(f"no option is called {name!r}; {nearest}")):
        DOORS[door](lm, **{name: 1})


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tokens", 2.5), ("max_tokens", "3"), ("max_tokens", True), ("seed", 1.5), ("temperature", "hot"),
     ("temperature", float("nan")), ("top_p", [1]),
     ("stop", 3), ("stop", [None]), ("stop", b"x"), ("raw", "yes")],
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_an_error_that_names_the_option(lm, door, option, value):
    with pytest.raises(ConfigError, match=rf"^{option} (must be|is)"):
        DOORS[door](lm, **{option: value})


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("option", "value", "said"),
    [("seed", 2**64, "^seed must be at least"), ("seed", 10**400, "^seed must be"), ("seed", -(2**63) - 1, "seed"),
     ("temperature", 10**400, "^temperature must be finite"), ("top_p", -(10**400), "^top_p must be")],
    ids=["seed", "large seed", "small seed", "temperature", "top_p"],
)  # fmt: skip
def test_a_number_that_no_machine_type_holds_is_an_error_in_words(lm, door, option, value, said):
    reference = {"sum_nll": [0.0, 1.0]}
    with pytest.raises(ConfigError, match=said):
        deque(DOORS[door](RiskAwareLM(lm.model, lm.tokenizer, reference=reference), **{option: value}), maxlen=0)


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63, 2**64 - 1])
def test_seeds_of_64_bits_serve_and_count_on(lm, seed):
    drawn = lm.candidates("Hi", 3, seed=seed, max_tokens=3)
    assert sorted(a.risk for a in drawn) == [a.risk for a in drawn]
    assert lm.generate("Hi", seed=seed, temperature=1.0, max_tokens=3).text in {a.text for a in drawn}


@pytest.mark.parametrize("pairs", [None, 3, "ab", b"ab", {"Hi": "a"}, {("Hi", "a")}])
def test_what_is_no_list_of_pairs_is_said_in_words(pairs):
    with pytest.raises(PromptError, match=r"^wanted a list of pairs"):
        list_pairs(pairs)


def test_none_is_left_out_and_numbers_of_numpy_count(lm):
    names = dict.fromkeys(Options.__annotations__)
    assert lm.generate("Hi", **{**names, "max_tokens": np.int64(3)}) == lm.generate("Hi", max_tokens=3)
    warm = lm.generate("Hi", max_tokens=4, temperature=np.float32(1), seed=np.int32(5))
    assert warm == lm.generate("Hi", max_tokens=4, temperature=1.0, seed=5)
    stops = np.array([warm.tokens[2].id])
    assert lm.generate("Hi", max_tokens=4, temperature=1.0, seed=5, stop=stops).tokens == warm.tokens[:2]


def test_what_other_libraries_call_it_is_no_name_of_ours():
    assert not set(ELSEWHERE) & set(Options.__annotations__)
    assert read_options({}) == {}


@pytest.mark.parametrize("kind", ["tuple", "generator", "array", "pandas", "arrow", "data set"])
def test_a_column_or_an_array_of_questions_is_a_list(lm, kind):
    questions = ["Hi", "Hello there"]
    if kind == "pandas":
        given = pytest.importorskip("pandas").Series(questions, index=[7, 3])
    elif kind == "arrow":
        given = pytest.importorskip("pyarrow").array(questions)
    elif kind == "data set":
        given = pytest.importorskip("datasets").Dataset.from_dict({"q": questions})["q"]
    else:
        given = {"tuple": tuple(questions), "generator": iter(questions), "array": np.array(questions)}[kind]
    assert lm.generate(given, max_tokens=2) == lm.generate(questions, max_tokens=2)


def test_chats_and_lists_of_chats_stay_what_they_are(lm):
    assert lm.generate(CHAT, max_tokens=2) == lm.generate("Hi", max_tokens=2)
    assert lm.generate([CHAT, "Hi"], max_tokens=2) == lm.generate(["Hi", "Hi"], max_tokens=2)
    assert lm.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (None, "wanted a text or a list of messages with role and content, got None"),
        (3, "got 3"),
        (b"Hi", "decode it first"),
        ({"role": "user", "content": "Hi"}, "put a single message into a list"),
        ({"Hi", "Ho"}, "a set has no order"),
        (["Hi", None], "question 2: wanted a text"),
        (["Hi", float("nan")], "drop missing texts first"),
        (["Hi", b"x"], "question 2: wanted a text"),
        ([["Hi"]], "question 1: wanted a text"),
        (torch.tensor([1, 2]), "question 1: wanted a text"),
        (torch.tensor(1), "question 1: wanted a text"),
        (["x", list(range(10000))], "question 2: wanted a text"),
    ],
)
def test_what_is_no_question_is_said_in_one_short_line(prompt, said):
    with pytest.raises(PromptError, match=re.escape(said)) as raised:
        list_questions(prompt)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200


def test_a_table_is_asked_for_its_column():
    with pytest.raises(PromptError, match="give the column with the questions"):
        list_questions(pytest.importorskip("pandas").DataFrame({"question": ["Hi"]}))


@pytest.mark.parametrize("pairs", [["ab"], [("a", None)], [("a", 3)], [("a", "b", "c")], [(3, "a")]])
def test_pairs_to_score_are_pairs_of_texts(pairs):
    with pytest.raises(PromptError, match=r"^pair 1: "):
        list_pairs(pairs)


def test_every_door_says_what_it_wants():
    """In a process of its own: here, types are checked before ours are."""
    found = plain.run(
        """
from selfdoubt import RiskAwareLM
from tests import plain
from tests.zoo import talker, tokenizer
lm = RiskAwareLM(talker(), tokenizer())
calls = [
    lambda: lm.generate(None), lambda: lm.stream(None), lambda: lm.stream(["Hi"]), lambda: lm.candidates(3, 1),
    lambda: lm.generate_until(b"x", 0.5), lambda: lm.score(None), lambda: lm.score("x", 3),
    lambda: lm.score_batch(["ab"]),
    lambda: lm.candidates("Hi", 2.5), lambda: lm.candidates("Hi", None), lambda: lm.generate(["Hi"], batch_size=None),
    lambda: lm.generate_until("Hi", "0.5"), lambda: lm.generate_until("Hi", 0.5, max_tries=1.5),
    *(lambda s=s: lm.generate(["Hi"], seeds=s) for s in ([None], [0.5], ["5"], [2**64], "5")),
    lambda: lm.score("Hi", raw="no"), lambda: lm.score_batch([("Hi", "a")], alternatives=-1),
    lambda: lm.score_batch([("Hi", "a")], alternatives=1.5),
]
for call in calls:
    try:
        print("no error", call())
    except Exception as error:
        print(type(error).__name__, str(error).count("\\n"))
"""
    ).split("\n")
    assert found[:8] == ["PromptError 0"] * 8
    assert found[8:21] == ["ConfigError 0"] * 13
