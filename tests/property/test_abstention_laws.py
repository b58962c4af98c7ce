"""Laws of abstaining that hold for any answers and any decisions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt import metrics
from selfdoubt.metrics.utility import PRICES
from tests.strategies import judged_answers, seeds

prices = st.sampled_from([0.0, 0.3, *PRICES, 50.0])


def decide(seed, n):
    return np.random.default_rng(seed).random(n) < 0.5


@given(answers=judged_answers(), seed=seeds)
def test_the_index_is_the_utility_at_price_one(answers, seed):
    abstain = decide(seed, len(answers[1]))
    assert metrics.omniscience_index(abstain, answers[1]) == metrics.utility(abstain, answers[1], price=1)


@given(answers=judged_answers(), seed=seeds, price=prices)
def test_a_higher_price_is_never_worth_more(answers, seed, price):
    abstain = decide(seed, len(answers[1]))
    assert metrics.utility(abstain, answers[1], price=price + 1) <= metrics.utility(abstain, answers[1], price=price)


@given(answers=judged_answers(), price=prices)
def test_the_best_threshold_is_at_least_all_nothing_and_the_rule(answers, price):
    risk, correct = answers
    best = metrics.find_best_threshold(risk, correct, price=price)
    p = 1 - risk / (1 + risk.max())
    for abstain in (np.zeros_like(correct), np.ones_like(correct), metrics.abstain_at_price(p, price)):
        assert best.utility >= metrics.utility(abstain, correct, price=price) - 1e-12


@given(answers=judged_answers(both=True), price=prices)
def test_no_order_beats_the_best_order(answers, price):
    """Under a perfect ranking all right answers are given and no wrong one: the share of right answers."""
    risk, correct = answers
    assert metrics.find_best_threshold((~correct).astype(float), correct, price=price).utility == correct.mean()
    assert metrics.find_best_threshold(risk, correct, price=price).utility <= correct.mean()


@given(answers=judged_answers(both=True), seed=seeds)
def test_abstaining_from_one_more_wrong_answer_helps_everywhere(answers, seed):
    _, correct = answers
    abstain = decide(seed, len(correct))
    abstain[np.flatnonzero(~correct)[0]] = False
    more = abstain.copy()
    more[np.flatnonzero(~correct)[0]] = True
    for price in (0.3, *PRICES):
        assert metrics.utility(more, correct, price=price) > metrics.utility(abstain, correct, price=price)
    assert metrics.hallucination_rate(more, correct) < metrics.hallucination_rate(abstain, correct)
    assert metrics.abstention_recall(more, correct) > metrics.abstention_recall(abstain, correct)
    assert metrics.abstention_f1(more, correct) > metrics.abstention_f1(abstain, correct)


@pytest.mark.parametrize("name", metrics.ABSTENTION_METRICS)
@given(answers=judged_answers(), seed=seeds)
def test_the_order_of_the_file_changes_nothing(name, answers, seed):
    _, correct = answers
    abstain = decide(seed, len(correct))
    order = np.random.default_rng(seed).permutation(len(correct))
    values = [metrics.estimate_abstention(a, c, draws=2)[name].value for a, c in (
        (abstain, correct), (abstain[order], correct[order]))]  # fmt: skip
    assert values[0] == values[1]
