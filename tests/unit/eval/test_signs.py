"""Signs that change a meaning: kept where they stand for it, found again, and never lost on either side."""

# ruff: noqa: RUF001
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.eval.judges.choices import find_named_choice
from selfdoubt.eval.judges.rules import Contains
from selfdoubt.eval.judges.signs import find_spans
from selfdoubt.eval.judges.text import fold, make_same_key
from selfdoubt.eval.records import Question
from selfdoubt.eval.scores.agreement import SameText


def right(accepted, answer):
    return Contains()(Question("q", "?", answers=(accepted,)), answer).correct


SAME = [
    ("서울", "서울입니다"),
    ("서울", "대한민국의 수도는 서울입니다."),
    ("서울", "서울이에요"),
    ("서울", "서울은 한국의 수도이다"),
    ("東京", "東京です"),
    ("東京", "日本の首都は東京です。"),
    ("北京", "中国的首都是北京。"),
    ("กรุงเทพ", "เมืองหลวงคือกรุงเทพครับ"),
    ("Paris", "答案是Paris。"),
    ("5", "答えは5です"),
    ("2020", "2020년에"),
    ("5", "5人"),
    ("-5", "minus 5"),
    ("-5", "-5 °C"),
    ("-5", "−5"),
    ("-5", "–5"),
    ("C++", "It's C++."),
    ("C#", "C sharp"),
    ("≥ 5", "x >= 5"),
    ("≥ 5", "at least 5"),
    ("5%", "5 percent"),
    ("5%", "5"),
    ("5", "5%"),
    ("$5", "5 dollars"),
    ("5", "$5"),
    ("$5 million", "5 million dollars"),
    ("Na+", "Na⁺"),
    ("10⁶", "10^6"),
    ("10^6", "10⁶ people"),
    ("H₂O", "H2O"),
    ("H2O", "It is H₂O."),
    ("1,000", "1000"),
    ("Paris", "the answer is Paris."),
    ("Paris", "**Paris**"),
    ("Paris", "Paris!"),
    ("5:30", "at 5:30 pm"),
    ("R&D", "R & D"),
    (".NET", "the .NET framework"),
    ("5", "$5$"),
    ("-5", "$-5$"),
    ("-5", "\\boxed{-5}"),
    ("A+", "It is A+."),
    ("Disney+", "Disney Plus"),
    ("5", "x = 5"),
    ("5", "about ~5"),
    ("5", "- 5"),
    ("5", "minus 5"),
    ("½", "1/2"),
    ("0.5", ".5"),
    ("Mr. Smith", "It is Mr Smith"),
    ("+5", "5"),
    ("5", "It is 5!"),
    ("AT&T", "AT&T Inc."),
    ("5 m2", "5 m²"),
    ("London", "- London"),
    ("I", "i"),
    ("3", "Answer: 3"),
    ("3", "(3)"),
    ("3", "[3]"),
    ("18+", "18 or more"),
    ("5", "5-10"),
    ("10", "5–10"),
    ("2020", "5/10/2020"),
    ("€5 million", "5 million €"),
    ("Seoul", "Seoul입니다"),
    ("부산", "부산에서"),
    ("C", "C/C++"),
    ("90", "90°"),
    ("Zürich", "Zurich."),
    ("No", "No-it is"),
]
DIFFERENT = [
    ("-5", "5"),
    ("5", "-5"),
    ("5", "−5 °C"),
    ("C++", "C"),
    ("C", "C++"),
    ("C#", "C"),
    ("C", "C#"),
    ("C", "C♯"),
    ("≥ 5", "≤ 5"),
    ("≤ 5", ">= 5"),
    ("≥ 5", "5"),
    ("5", "≥ 5"),
    ("5", "< 5"),
    ("Na+", "Na"),
    ("Na", "Na+"),
    ("Na", "Na⁺"),
    ("10⁶", "106"),
    ("106", "10⁶"),
    ("106", "10^6"),
    ("3.5", "35"),
    ("35", "3.5"),
    ("5", "3.5"),
    ("A+", "A"),
    ("A", "A+"),
    ("A-", "A+"),
    ("A", "A-"),
    ("O-", "O+"),
    (".NET", "net"),
    ("net", ".NET framework"),
    ("art", "party"),
    ("5:30", "530"),
    ("30", "5:30"),
    ("$5", "€5"),
    ("€5", "$5"),
    ("5%", "5$"),
    ("1/2", "12"),
    ("2", "1/2"),
    ("½", "2"),
    ("5", "±5"),
    ("5", "√5"),
    ("x", "-x"),
    ("x", "≠x"),
    ("10", "10₂"),
    ("102", "10₂"),
    ("5", "5万"),
    ("=5", "≠5"),
    ("B", "B♭"),
    ("D", "R&D"),
    ("0.5", "5"),
    (".5", "5"),
    ("1e5", "1e-5"),
    ("10^6", "10^-6"),
    ("미", "서울"),
    ("서울", "서울대학교"),
    ("5", "第55"),
    ("x+1", "x-1"),
    ("x=y", "x≠y"),
    ("c++", "c--"),
    ("Cl", "Cl-"),
    ("Cl-", "Cl"),
    ("-∞", "∞"),
    ("5 km", "-5 km"),
    ("5", "$-5$"),
    ("5", "-$5"),
    ("Paris", "Parisian"),
]


@pytest.mark.parametrize(("accepted", "answer"), SAME)
def test_spellings_of_the_same_are_right(accepted, answer):
    assert right(accepted, answer) is True


@pytest.mark.parametrize(("accepted", "answer"), DIFFERENT)
def test_a_lost_or_another_sign_is_wrong(accepted, answer):
    assert right(accepted, answer) is False


#: Signs in front of a number; no two of one line mean the same.
FRONT = ["", "-", "≥ ", "≤ ", "> ", "< ", "≠ ", "± ", "√"]
BEHIND = ["", "+", "++", "#", "♭", "*"]
SENTENCES = ["{}", "It is {}.", "**{}**", "The answer: {}", '"{}", he said', "答案是{}。"]


@given(
    st.sampled_from(FRONT),
    st.sampled_from(FRONT),
    st.sampled_from(["5", "3.5", "1,000", "10^6", "0.25"]),
    st.sampled_from(SENTENCES),
)
def test_a_number_is_found_behind_its_own_sign_alone(own, other, number, sentence):
    assert right(own + number, sentence.format(other + number)) == (own == other)


@given(st.sampled_from(BEHIND), st.sampled_from(BEHIND), st.sampled_from("BCFGX"), st.sampled_from(SENTENCES[:2]))
def test_a_letter_is_found_before_its_own_sign_alone(own, other, letter, sentence):
    assert right(letter + own, sentence.format(letter + other)) == (own == other)


ALPHABET = list("aAcCiIxe5019  .,:;!?-−–+#*^_/&<>=≤≥≠~()[]{}$€%°'\"½²⁺⁻⁶₂♭♯é서東ก\u0338\u0301\u00a0")
odd = st.text(st.sampled_from(ALPHABET), max_size=9) | st.text(max_size=12)


@given(odd)
def test_a_text_is_right_for_itself_and_folding_again_changes_nothing(text):
    assert right(text, text)
    assert fold(fold(text)) == fold(text)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_whole_numbers_are_equal_as_numbers_are(one, other):
    assert right(str(one), f"It is {other:,}.") == (one == other)
    assert (make_same_key(str(one)) == make_same_key(f"{other}!")) == (one == other)


def test_answers_that_differ_in_a_sign_are_not_of_one_meaning():
    pairs = [("-5", "5"), ("C++", "C"), ("3.5", "35"), ("10⁶", "106"), ("Paris.", "paris"), ("The C#", "c#")]
    assert SameText()(pairs) == [False, False, False, False, True, True]


def test_choices_that_differ_in_a_sign_are_told_apart():
    assert [find_named_choice(("-5", "5", "±5"), a) for a in ("It is 5.", "It is −5.", "± 5")] == [1, 0, 2]
    assert [find_named_choice(("C", "C++", "C#"), a) for a in ("I like C++ most", "It is C#.")] == [1, 2]


@pytest.mark.parametrize(
    ("words", "text", "found"),
    [
        ("5", "5$ and -5 and 5%", [(0, 1), (14, 15)]),
        ("5$", "5 5€ 5$", [(0, 1), (5, 7)]),
        ("서울", "서울은 서울대학교", [(0, 2)]),
        ("2020", "2020년에", [(0, 4)]),
        ("5", "5万 5人", [(3, 4)]),
    ],
)
def test_spans_leave_units_and_particles_outside(words, text, found):
    at = find_spans(words, text)
    assert [s for s, _ in at] == [s for s, _ in found]
    assert all(text[s:e].startswith(words[:1]) for s, e in at)


@pytest.mark.parametrize(
    ("gold", "answer", "wanted"),
    [
        ("2019", "the season 2019/20", True),
        ("2019", "2019/2020", True),
        ("2019/20", "2019/20", True),
        ("2019/20", "2019/21", False),
        ("1", "1/2", False),
        ("1/2", "01/02", False),
        ("<p>", "Use the <p> tag.", True),
        ("<p>", "Use the <br> tag.", False),
        ("!", "Paris!", False),
    ],
)
def test_years_of_a_season_and_names_of_tags_stand_in_a_text(gold, answer, wanted):
    assert right(gold, answer) == wanted
