"""One rule for the best of several answers, and one for when an answer is confident enough."""

from __future__ import annotations

import pytest

from selfdoubt.lm.answer import Answer
from selfdoubt.lm.confidence import choose_best, confidence_order, is_confident


def answer(risk=1.0, percentile=None, p_correct=None, note=None):
    return Answer(
        "", (), (), {}, risk, "sum_nll", percentile, "stop", p_correct=p_correct, p_correct_note=note
    )  # fmt: skip


def test_confidence_is_the_most_trusted_number_there_is():
    assert answer(2.0, 0.25, 0.9).confidence == 0.9
    assert answer(2.0, 0.25).confidence == 0.75
    assert answer(2.0).confidence == -2.0


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (answer(5.0, 0.9, 0.8), answer(1.0, 0.1, 0.7)),  # p_correct decides, not the risk
        (answer(5.0, 0.1), answer(1.0, 0.9)),
        (answer(1.0), answer(5.0)),
        (answer(1.0, 0.5, 0.8), answer(2.0, 0.5, 0.8)),  # of equals, the least risky
        (answer(9.0, 0.9, 0.1), answer(1.0, 0.1, note="far")),  # a calibration that gives no number says least
    ],
)
def test_the_best_answer_is_the_most_confident(better, worse):
    assert choose_best([better, worse]) is better
    assert choose_best([worse, better]) is better
    assert sorted([worse, better], key=confidence_order) == [better, worse]


@pytest.mark.parametrize(
    ("confidence", "at_least", "enough"), [(0.8, 0.8, True), (0.79, 0.8, False), (None, 0.0, False), (0.0, 0.0, True)]
)
def test_an_answer_is_confident_enough_from_the_limit_on(confidence, at_least, enough):
    assert is_confident(confidence, at_least) is enough
