"""Normal forms and overlap against other people's implementations, and what counts as declining."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.eval.judges.text import declines, find_places, fold, normalise, rouge_l, token_f1

WORDS = [
    "the",
    "a",
    "An",
    "cat",
    "Cat.",
    "sat,",
    "on",
    "mat",
    "U.S.",
    "1,000",
    "well-known",
    "can't",
    "über",
    "東京",
    "the-end",
    "--",
]
texts = st.lists(st.sampled_from(WORDS), min_size=0, max_size=8).map(" ".join)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Eiffel Tower", "eiffel tower"),  # lower case, no article
        ("  an   apple\n a day ", "apple day"),  # white space
        ("U.S.A.", "usa"),  # punctuation goes and leaves no gap
        ("theatre and another", "theatre and another"),  # articles are whole words
        ("well-known", "wellknown"),
        ("Łódź\u2019s", "łódź\u2019s"),  # ASCII punctuation alone; letters stay
    ],
)
def test_the_normal_form_follows_squads_rules(text, normal):
    assert normalise(text) == normal


def test_an_answer_of_an_article_alone_is_not_an_empty_answer():
    assert normalise("A") == "a" != normalise("")
    assert token_f1("", "A") == 0


@given(texts, texts)
def test_exact_match_and_f1_against_torchmetrics(one, other):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.functional.text import squad
    if not all(_official(t) for t in (one, other)):  # of nothing but articles and signs: see the test above
        return
    target = {"answers": {"answer_start": [0], "text": [other]}, "id": "1"}
    theirs = squad({"prediction_text": one, "id": "1"}, target)
    assert token_f1(one, other) == pytest.approx(float(theirs["f1"]) / 100, abs=1e-6)
    assert (normalise(one) == normalise(other)) == (float(theirs["exact_match"]) == 100)


def _official(text):
    from torchmetrics.functional.text.squad import _normalize_text

    return _normalize_text(text)


@given(texts, texts)
def test_rouge_l_against_the_package_of_its_authors(one, other):
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    theirs = scorer.RougeScorer(["rougeL", "rougeLsum"]).score(one, other)
    assert rouge_l(one, other) == pytest.approx(theirs["rougeL"].fmeasure, abs=1e-12)
    assert rouge_l(one, other) == pytest.approx(theirs["rougeLsum"].fmeasure, abs=1e-12)  # one line: the same


@given(texts, texts)
def test_overlap_is_symmetric_and_one_for_equal_texts(one, other):
    for measure in (token_f1, rouge_l):
        assert 0 <= measure(one, other) == measure(other, one) <= 1
    assert token_f1(one, one) == 1


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("Łódź", "lodz"),
        ("São Tomé & Príncipe", "sao tome principe"),
        ("Straße", "strasse"),
        ("Ærøskøbing", "aeroskobing"),
        ("İstanbul", "istanbul"),
        ("Côte d\u2019Ivoire", "cote d ivoire"),
        ("Côte d'Ivoire", "cote d ivoire"),
        ("Washington, D.C.", "washington dc"),
        ("U.S.-born", "us born"),
        ("It ends in 5.", "it ends in 5"),
        ("3.5 of 1,000,000", "3.5 of 1000000"),
        ("1,2,3", "1 2 3"),
        ("ガ", "ガ"),  # the mark is part of the letter
        ("हिन्दी", "हिन्दी"),
        ("The Who", "the who"),
    ],
)
def test_folding_brings_spellings_together(text, folded):
    assert fold(text) == folded


@given(st.text(max_size=30))
def test_folding_twice_changes_nothing_more(text):
    assert fold(fold(text)) == fold(text)


@pytest.mark.parametrize(
    ("words", "text", "found"),
    [
        ("paris", "it is paris", [6]),
        ("paris", "parisville", []),
        ("5", "3.5", []),
        ("5", "55 5", [3]),
        ("", "anything", []),
        ("巴黎", "答案是巴黎", [3]),
        ("c", "abc c", [4]),
    ],
)
def test_names_are_found_as_whole_words_where_words_have_spaces(words, text, found):
    assert find_places(words, text) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "...",
        None,
        "unanswerable",
        "Unanswerable.",
        "I don't know.",
        "I don\u2019t know",
        "i do not know who that is",
        "Unknown",
        "I'm not sure.",
        "I am not sure",
        "Not sure",
        "No answer",
        "no answer.",
        "None",
        "N/A",
        "I have no comment.",
        "I have no idea.",
        "The passage does not say.",
        "The text doesn't mention it",
        "There is not enough information to answer.",
        "IDK",
        "It is impossible to say.",
        "It cannot be determined.",
        "The question cannot be answered from the passage.",
        "Sorry, I don't know.",
        "The answer is not given.",
        "not in the passage",
        "The answer is unknown.",
        "Nobody knows.",
    ],
)
def test_declining_is_recognised(text):
    assert declines(text)


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "I'm not sure, but I think it is Paris.",
        "No",
        "No, it is not.",
        "The Unknown Soldier",
        "Unknown Pleasures",
        "None of them did, Paris did",
        "Know",
        "It is impossible to lick your elbow.",
        "not Paris",
        "Passau",
        "I know: Paris",
        "I don't know, maybe Paris",
    ],
)
def test_an_answer_does_not_decline(text):
    assert not declines(text)
