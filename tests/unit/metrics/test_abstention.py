"""Metrics of abstaining: by hand, against scikit-learn and the published definitions, and what is refused."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from selfdoubt import metrics
from selfdoubt.errors import ConfigError, MetricError
from selfdoubt.metrics.abstention import ABSTENTION_METRICS
from selfdoubt.metrics.utility import PRICES


@pytest.fixture
def unchecked():
    """As users run it: without the check of shapes in signatures, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


#: 5 right, 2 wrong, 1 abstained from although right, 4 abstained from and wrong.
ABSTAIN = np.array([False] * 7 + [True] * 5)
CORRECT = np.array([True] * 5 + [False] * 2 + [True] + [False] * 4)


def decisions(n=400, seed=0):
    """A p_correct that is calibrated, judgements drawn from it, and decisions by it."""
    random = np.random.default_rng(seed)
    p = random.random(n)
    return p, p < 0.4, random.random(n) < p


def test_by_hand():
    assert metrics.omniscience_index(ABSTAIN, CORRECT) == 3 / 12
    assert metrics.hallucination_rate(ABSTAIN, CORRECT) == 2 / 7
    assert metrics.abstention_precision(ABSTAIN, CORRECT) == 4 / 5
    assert metrics.abstention_recall(ABSTAIN, CORRECT) == 4 / 6
    assert metrics.abstention_f1(ABSTAIN, CORRECT) == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert [metrics.utility(ABSTAIN, CORRECT, price=c) for c in (0, 1, 2.5)] == [5 / 12, 3 / 12, 0]


def test_the_index_and_the_rate_are_those_of_the_paper():
    """Jackson et al. (2025): 100 (c - i) / (c + p + i + a) and i / (p + i + a); nothing is judged partially right."""
    _, abstain, correct = decisions()
    c, i, a = sum(correct & ~abstain), sum(~correct & ~abstain), sum(abstain)
    assert 100 * metrics.omniscience_index(abstain, correct) == pytest.approx(100 * (c - i) / (c + i + a))
    assert metrics.hallucination_rate(abstain, correct) == pytest.approx(i / (i + a))


def test_precision_recall_and_f1_against_scikit_learn():
    _, abstain, correct = decisions()
    for ours, theirs in (
        (metrics.abstention_precision, precision_score),
        (metrics.abstention_recall, recall_score),
        (metrics.abstention_f1, f1_score),
    ):
        assert ours(abstain, correct) == pytest.approx(theirs(~correct, abstain))


@pytest.mark.parametrize("price", PRICES)
def test_the_best_threshold_by_trying_all(price):
    p, _, correct = decisions(60)
    p = np.round(p, 1)  # with ties
    worths = {t: metrics.utility(p < t, correct, price=price) for t in np.unique(p)}
    best = metrics.find_best_threshold(1 - p, correct, price=price)
    assert best.utility == pytest.approx(max(0, *worths.values()))
    assert best.threshold is not None
    assert metrics.utility(1 - p > best.threshold, correct, price=price) == pytest.approx(best.utility)
    assert best.coverage == np.mean(1 - p <= best.threshold)


def test_answering_nothing_is_best_where_answers_cost_more_than_they_bring():
    assert metrics.find_best_threshold([0.1, 0.2], [False, True], price=9) == (0.0, None, 0.0)


@pytest.mark.parametrize("price", [0.0, 0.5, *PRICES])
def test_the_rule_of_a_calibrated_p_is_the_best_in_the_limit(price):
    """For p uniform on [0, 1] the rule is worth 1 / (2 (1 + price)) a question: int_t^1 p - (1 - p) price dp."""
    n = 200_000
    p = (np.arange(n) + 0.5) / n
    # Of neighbours in p as many are right as p says: exact to 1 / n each.
    correct = np.diff(np.floor(np.concatenate([[0], np.cumsum(p)]) + 0.5)) > 0
    rule = metrics.abstain_at_price(p, price)
    exact = 1 / (2 * (1 + price))
    assert metrics.utility(rule, correct, price=price) == pytest.approx(exact, abs=1e-4)
    assert metrics.find_best_threshold(1 - p, correct, price=price).utility == pytest.approx(exact, abs=1e-4)


def test_what_is_undefined_is_an_error_and_never_a_number():
    everything = [True, True, True], [False, False, False]
    for metric, abstain, correct, why in (
        (metrics.hallucination_rate, everything[1], everything[0], "all questions are answered right"),
        (metrics.abstention_precision, everything[1], everything[0], "nothing was abstained from"),
        (metrics.abstention_recall, everything[0], everything[0], "no answer is wrong"),
        (metrics.abstention_f1, everything[1], everything[0], "nothing was abstained from, and no answer is wrong"),
    ):
        with pytest.raises(MetricError, match=f"{metric.__name__} is not defined: {why}"):
            metric(abstain, correct)
        estimate = metrics.estimate_abstention(abstain, correct, draws=10)[metric.__name__]
        assert estimate.value is None
        assert estimate.note.startswith(why)


@pytest.mark.parametrize(
    ("abstain", "correct", "why"),
    [
        ([0.2, 0.3], [True, False], "abstain must hold booleans"),
        ([True, False], [None, False], "correct must hold booleans"),
        ([True, False], [True], "two lists of one length"),
        ([True], [True], "at least 2"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_counted_is_refused(abstain, correct, why):
    with pytest.raises(MetricError, match=why):
        metrics.omniscience_index(np.array(abstain), np.array(correct))


@pytest.mark.parametrize("price", [-1, float("nan"), float("inf")])
def test_a_price_is_a_number(price):
    with pytest.raises(ConfigError, match="price must be"):
        metrics.utility(ABSTAIN, CORRECT, price=price)
    with pytest.raises(ConfigError, match="price must be"):
        metrics.abstain_at_price([0.5], price)


@pytest.mark.parametrize("p", [1.1, -0.1, float("nan")])
def test_a_probability_is_one(p):
    with pytest.raises(MetricError, match="p_correct must be a probability"):
        metrics.abstain_at_price([0.5, p], 1)


def test_intervals_are_those_of_the_draws_of_each_question():
    """The counts of a draw say all: the same numbers as the metric of the drawn answers, draw by draw."""
    _, abstain, correct = decisions(80)
    estimates = metrics.estimate_abstention(abstain, correct, price=4, draws=100, seed=3)
    assert estimates.keys() == {*ABSTENTION_METRICS, "utility"}
    for name in ABSTENTION_METRICS:
        function = getattr(metrics, name)
        slow = metrics.bootstrap_interval(
            lambda a, c, f=function: f(a > 0.5, c), abstain.astype(float), correct, draws=100, seed=3
        )
        quick = estimates[name]
        assert (quick.value, quick.low, quick.high) == pytest.approx((slow.value, slow.low, slow.high))


def test_the_best_utility_is_chosen_on_each_draw():
    p, _, correct = decisions(80)
    quick = metrics.estimate_best_utility(1 - p, correct, price=4, draws=100, seed=3)
    slow = metrics.bootstrap_interval(
        lambda r, c: metrics.find_best_threshold(r, c, price=4).utility, 1 - p, correct, draws=100, seed=3
    )
    assert (quick.value, quick.low, quick.high) == pytest.approx((slow.value, slow.low, slow.high))
