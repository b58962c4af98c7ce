"""Decisions of least expected cost against a plain loop and Chow's closed form, and what is refused."""

from __future__ import annotations

import pytest
import torch

from selfdoubt.errors import ConfigError, DataError, NonFiniteError, ShapeError
from selfdoubt.interpret import REJECT, decide, error_probability

PROBS = torch.tensor([[0.95, 0.05], [0.7, 0.3], [0.1, 0.9]]).double()
COSTS = [[0.0, 3.0], [10.0, 1.0]]


def test_decisions_against_a_plain_loop():
    probs, costs = torch.randn(50, 4).softmax(-1).double(), torch.rand(4, 3).double()
    choices, prices = [], []
    for p in probs.tolist():
        each = [sum(p[k] * float(costs[k, j]) for k in range(4)) for j in range(3)]
        best = min(range(3), key=each.__getitem__)
        rejects = each[best] > 0.4
        choices.append(REJECT if rejects else best)
        prices.append(0.4 if rejects else each[best])
    decision = decide(probs, costs, reject_cost=0.4)
    assert decision.choice.tolist() == choices
    assert decision.cost.tolist() == pytest.approx(prices)
    assert REJECT in choices
    assert len(set(choices)) > 2


def test_without_costs_it_takes_the_most_probable_class_and_expects_its_error():
    probs = torch.randn(3, 5, 4).softmax(-1).double()
    decision = decide(probs)
    assert torch.equal(decision.choice, probs.argmax(-1))
    torch.testing.assert_close(decision.cost, error_probability(probs))
    assert not decision.rejected.any()


def test_two_classes_against_the_closed_form():
    # Treat (1) if 10 p + ... : not treating costs 10 p, treating 3 (1 - p) + p, equal at p = 3 / 12.
    p = torch.tensor([0.1, 0.24, 0.26, 0.9]).double()
    decision = decide(torch.stack([1 - p, p], -1), COSTS)
    assert decision.choice.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(decision.cost, torch.minimum(10 * p, 3 - 2 * p))


def test_equal_costs_take_the_first_choice_and_do_not_reject():
    decision = decide([[0.5, 0.5]], reject_cost=0.5)
    assert decision.choice.tolist() == [0]
    assert decide([[0.5, 0.5]], reject_cost=0.499).rejected.tolist() == [True]


def test_rejecting_pays_on_calibrated_probabilities():
    probs = torch.randn(20_000, 3).softmax(-1).double()
    truth = probs.multinomial(1)[:, 0]
    decision = decide(probs, reject_cost=0.3)
    costs = torch.where(decision.rejected, 0.3, (decision.choice != truth).double())
    # Costs lie in [0, 1]: their mean is further than 0.03 off with a chance of 2 exp(-36) (Hoeffding).
    assert abs(costs.mean() - decision.cost.mean()) < 0.03
    assert decision.cost.mean() < decide(probs).cost.mean()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: decide(PROBS, [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]]), ShapeError, "2 classes"),
        (lambda: decide(PROBS, [0.0, 1.0]), ShapeError, "costs.T"),
        (lambda: decide(PROBS, [[0.0, float("inf")], [1.0, 0.0]]), NonFiniteError, "values of costs"),
        (lambda: decide(PROBS, COSTS, reject_cost=float("nan")), NonFiniteError, "reject_cost"),
        (lambda: decide(PROBS * float("nan"), COSTS), NonFiniteError, "6 of 6 values of probs"),
        (lambda: decide(PROBS * 3), DataError, "softmax"),
        (lambda: decide(PROBS[:0]), ShapeError, "empty"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_negative_cost_of_rejection_is_refused_where_costs_are_errors():
    with pytest.raises(ConfigError, match=r"^reject_cost must be at least 0, got -1: "):
        decide([[0.5, 0.5]], reject_cost=-1)
    assert decide([[0.5, 0.5]], [[-3.0, 0.0], [0.0, -3.0]], reject_cost=-1).choice.tolist() == [0]
