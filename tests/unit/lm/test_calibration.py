"""The head as it is applied: by hand, against scikit-learn's curve, through JSON, and with what cannot be."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.errors import LoadError, NonFiniteError
from selfdoubt.lm.calibration import FAR, Calibration, StateHead, read_calibration, transform_score
from selfdoubt.lm.conditions import Conditions, Origin
from selfdoubt.lm.hidden_states import AnswerStates
from tests.plain import run

LOGISTIC = Calibration(
    "logistic",
    ("sum_nll", "mean_total"),
    weights=(-1.5, -0.5),
    linear=(-0.25, 0.125),
    bias=0.75,
    ranges=((0.0, 4.0), (0.1, 2.0)),
    state=StateHead(3, "first", (0.5, -1.0, 0.25)),
    threshold=0.6,
    promise={"target_accuracy": 0.9},
)
ISOTONIC = Calibration("isotonic", ("sum_nll",), knots=((0.5, 0.9), (1.0, 0.8), (3.0, 0.1)))
SCORES = {"sum_nll": 1.25, "mean_total": 0.5, "other": 9.0}


def states(hidden, layers=(1, 3)):
    rows = torch.zeros(len(layers), len(hidden))
    rows[-1] = torch.tensor(hidden)
    return AnswerStates(layers, rows * 7, rows, rows * 11)


def test_a_logistic_head_by_hand():
    logit = (
        0.75 - 1.5 * math.log(1.26) - 0.5 * math.log(0.51) - 0.25 * 1.25 + 0.125 * 0.5 + 0.5 * 2 - 1.0 * 1 + 0.25 * 4
    )
    found = LOGISTIC.p_correct(SCORES, states([2.0, 1.0, 4.0]))
    assert found == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-12)


def test_an_isotonic_head_is_linear_between_its_knots_and_flat_just_outside():
    for x, p in [(0.0, 0.9), (0.5, 0.9), (0.75, 0.85), (1.0, 0.8), (2.0, 0.45), (3.0, 0.1), (3.2, 0.1)]:
        assert ISOTONIC.p_correct({"sum_nll": x}) == pytest.approx(p)
    xs = np.random.default_rng(0).uniform(0, 3.2, 100)
    ours = [ISOTONIC.p_correct({"sum_nll": float(x)}) for x in xs]
    assert ours == pytest.approx(np.interp(xs, *np.array(ISOTONIC.knots).T))
    assert replace(ISOTONIC, knots=((1.0, 0.3),)).p_correct({"sum_nll": 0.5}) == 0.3


@given(st.sampled_from(LOGISTIC.features), st.floats(0, 1e9))
def test_a_score_surer_than_all_that_was_seen_counts_as_the_surest_that_was(name, below):
    plain = replace(LOGISTIC, state=None)
    low, _ = plain.ranges[plain.features.index(name)]
    assert plain.p_correct(SCORES | {name: low - below}) == plain.p_correct(SCORES | {name: low})


@given(st.sampled_from([*((LOGISTIC, n) for n in LOGISTIC.features), (ISOTONIC, "sum_nll")]), st.floats(0.11, 1e9))
def test_a_score_more_doubtful_than_all_that_was_seen_has_no_number(head_and_name, above):
    head, name = head_and_name
    head = replace(head, state=None)
    low, high = dict(zip(head.features, head.ranges or ((0.5, 3.0),), strict=True))[name]
    scores = SCORES | {name: high + above * (high - low)}
    assert head.p_correct(scores) is None
    assert head.estimate(scores, None, Origin("greedy"), "stop", [0.0]).note == FAR
    assert head.p_correct(SCORES | {name: high + 0.09 * (high - low)}) == head.p_correct(SCORES | {name: high})


def test_a_hidden_state_far_from_all_that_were_seen_has_no_number_and_none_counts_as_surer_than_the_surest():
    head = replace(LOGISTIC, state=StateHead(3, "first", (0.5, -1.0, 0.25), 2.0, (0.0, 1.0, 2.0), (1.0, 2.0, 0.0), 2.0))
    assert head.p_correct(SCORES, states([2.0, 0.0, 4.0])) == head.p_correct(SCORES, states([3.0, -0.5, 4.0]))
    assert head.p_correct(SCORES, states([0.0, 1.0, 999.0])) is not None  # the third never varied
    for far in ([5.0, 1.0, 2.0], [-5.0, 1.0, 2.0], [0.0, 10.0, 2.0]):
        assert head.p_correct(SCORES, states(far)) is None
        assert head.estimate(SCORES, states(far), Origin("greedy"), "stop", []).note == FAR


def test_what_is_missing_gives_none_and_is_withheld():
    assert LOGISTIC.p_correct({"sum_nll": 1.0}, states([0.0, 0.0, 0.0])) is None
    assert LOGISTIC.p_correct(SCORES) is None
    assert LOGISTIC.p_correct(SCORES, states([0.0, 0.0, 0.0], layers=(1, 2))) is None
    assert LOGISTIC.abstains(None) is True


def test_an_answer_at_the_threshold_is_given():
    assert LOGISTIC.abstains(0.6) is False
    assert LOGISTIC.abstains(0.5999) is True
    assert replace(LOGISTIC, threshold=None).abstains(0.1) is None
    assert replace(LOGISTIC, threshold=0.0).abstains(0.0) is False


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_p_correct_is_a_probability_however_far_a_state_is(hidden, score):
    p = LOGISTIC.p_correct({"sum_nll": score, "mean_total": score}, states([hidden, -hidden, 0.0]))
    assert (p is None) == (score > 2.19)
    assert p is None or 0.0 <= p <= 1.0


@given(st.floats(0, 10), st.floats(0, 10))
def test_transformed_keeps_the_order(a, b):
    assert (transform_score(a) <= transform_score(b)) == (a <= b) or abs(a - b) < 1e-12
    assert math.isfinite(transform_score(-a))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_an_error(bad):
    with pytest.raises(NonFiniteError, match=f"the score sum_nll is {bad}"):
        ISOTONIC.p_correct({"sum_nll": bad})
    with pytest.raises(NonFiniteError, match="the hidden state of layer 3 is not finite"):
        LOGISTIC.p_correct(SCORES, states([bad, 0.0, 0.0]))


def test_a_state_of_another_width():
    with pytest.raises(LoadError, match="reads hidden states of width 3, and this model's are 2 wide; run"):
        LOGISTIC.p_correct(SCORES, states([1.0, 2.0]))


FULL = replace(
    LOGISTIC,
    state=StateHead(3, "first", (0.5, -1.0, 0.25), 2.0, (0.0, 1.0, 2.0), (1.0, 2.0, 0.0), 2.5),
    conditions=Conditions(
        "sampled", 0.7, 0.9, ("chat", "raw:12"), ("\n",), 64, ({"method": "vote", "alpha": 1.0},), {"w": (1.0, -2.0)}
    ),
)


@pytest.mark.parametrize("head", [LOGISTIC, ISOTONIC, FULL])
def test_a_card_brings_back_the_same_head(head):
    manifest = json.loads(json.dumps({"calibration": head.to_json()}))
    assert read_calibration(manifest) == head
    assert read_calibration({"format": 1}) is None


BROKEN = [
    {"kind": "magic"},
    {"features": ["sum_nll"]},
    {"weights": [1.0, math.nan]},
    {"linear": [1.0]},
    {"bias": "much"},
    {"ranges": [[0.0, 1.0]]},
    {"state": {"layer": 3, "position": "last", "weights": [1.0]}},
    {"state": {"layer": 3, "position": "first", "weights": [math.inf]}},
    {"threshold": 1.5},
    {"threshold": "high"},
    {"unknown": 1},
    {"kind": "isotonic"},
    {"kind": "isotonic", "features": ["sum_nll"], "knots": [[1.0, 0.5], [0.0, 0.9]]},
    {"state": {"layer": 3, "position": "first", "weights": [1.0], "center": [1.0], "spread": []}},
    {"state": {"layer": 3, "position": "first", "weights": [1.0], "reach": math.nan}},
    {"conditions": []},
    {"conditions": {"made": "somehow"}},
    {"conditions": {"made": "greedy", "forms": "chat"}},
    {"conditions": {"made": "greedy", "cut": True}},
    {"conditions": {"made": "greedy", "unknown": 1}},
    {"conditions": {"made": "greedy", "wrappers": [1]}},
    {"conditions": {"made": "greedy", "base": {"w": [math.nan]}}},
    {"conditions": {"made": "greedy", "temperature": "hot"}},
]


def test_a_broken_card_says_what_to_do():
    """In an interpreter of its own: the checks of types under pytest would find some of this first."""
    code = """
import json, sys
from selfdoubt.errors import LoadError
from selfdoubt.lm.calibration import Calibration
good, broken = json.loads(sys.argv[1])
Calibration.from_json(good)
for entry in [*({**good, **b} for b in broken), {"kind": "logistic"}, []]:
    try:
        print(Calibration.from_json(entry))
    except LoadError as error:
        print(str(error).startswith("the calibration cannot be read ("), str(error).endswith("calibrate` again"))
"""
    said = run(code, json.dumps([LOGISTIC.to_json(), BROKEN])).splitlines()
    assert said == ["True True"] * (len(BROKEN) + 2)
