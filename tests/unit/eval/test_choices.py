"""Multiple choice: reading a choice out of an answer, MC1 and MC2."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.errors import NonFiniteError, ShapeError
from selfdoubt.eval.judges.choices import Choice, find_named_choice, judge_mc1, judge_mc2
from selfdoubt.eval.records import Question

CITIES = ("York", "New York", "Rome", "D.C.")


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        ("Rome", 2),
        ("rome.", 2),
        ("B", 1),
        ("b", 1),
        ("(C)", 2),
        ("C. Rome", 2),
        ("A) York", 0),
        ("[B] New York", 1),
        ("Answer: C", 2),
        ("The answer is C.", 2),
        ("It is New York.", 1),
        ("York it is", 0),
        ("D.C.", 3),
        ("D.C. is the capital", 3),
        ("Rome or York", None),
        ("York, not New York", None),
        ("no idea", None),
        ("", None),
        ("E", None),
        ("A city: Rome", 2),
        ("Romeo", None),
    ],
)
def test_a_choice_is_read_from_its_text_or_its_letter(answer, index):
    assert find_named_choice(CITIES, answer) == index


def test_choices_of_signs_alone_are_told_apart():
    assert [find_named_choice(("+", "-"), a) for a in ("+", " - ", "x")] == [0, 1, None]


def test_an_answer_that_names_no_choice_is_wrong_and_says_so():
    question = Question("1", "?", choices=CITIES, right=(2,))
    assert Choice()(question, "C") == (True, 1.0, None)
    assert Choice()(question, "New York") == (False, 0.0, None)
    verdict = Choice()(question, "who knows")
    assert verdict[:2] == (False, 0.0)
    assert "none of the choices" in str(verdict.note)
    assert Choice()(question, None).correct is None
    assert Choice()(Question("1", "?", answers=("x",)), "x").correct is None


def test_mc1_is_the_most_probable_choice_and_a_tie_is_wrong():
    question = Question("1", "?", choices=("a", "b", "c"), right=(1,))
    assert judge_mc1(question, [-2, -1, -3]) == (True, 1.0, None)
    assert judge_mc1(question, [-1, -2, -3]) == (False, 0.0, None)
    assert judge_mc1(question, [-1, -1, -3]).correct is False


@given(st.lists(st.floats(-50, 0), min_size=2, max_size=8), st.data())
def test_mc2_is_the_share_of_probability_on_right_choices(logprobs, data):
    right = data.draw(st.sets(st.integers(0, len(logprobs) - 1), min_size=1))
    question = Question("1", "?", choices=tuple(map(str, range(len(logprobs)))), right=tuple(sorted(right)))
    p = np.exp(np.array(logprobs))
    verdict = judge_mc2(question, logprobs)
    assert verdict.grade == pytest.approx(p[sorted(right)].sum() / p.sum(), rel=1e-9)
    assert verdict.correct == (verdict.grade > 0.5)


def test_mc2_holds_where_probabilities_vanish():
    question = Question("1", "?", choices=("a", "b"), right=(0,))
    assert judge_mc2(question, [-5000, -5000]).grade == pytest.approx(0.5)
    assert judge_mc2(question, [-9000, -5000]).grade == 0


def test_numbers_that_do_not_fit_are_refused():
    question = Question("1", "?", choices=("a", "b"), right=(0,))
    for one in (judge_mc1, judge_mc2):
        with pytest.raises(ShapeError, match="for each of 2 choices"):
            one(question, [-1.0])
        with pytest.raises(NonFiniteError, match="question 1"):
            one(question, [-1.0, float("nan")])
        with pytest.raises(ShapeError):
            one(Question("1", "?", choices=("a", "b")), [-1.0, -2.0])
