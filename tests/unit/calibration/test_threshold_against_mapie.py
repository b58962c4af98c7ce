"""Thresholds with a guarantee, against MAPIE's ``BinaryClassificationController`` for precision (MAPIE 1.5).

Both are "learn then test": an answer is "predicted positive" where p_correct >= t, and precision is the accuracy of the
answered. At equal settings (the same thresholds in the same order, fixed-sequence testing, one start) both test the
same hypotheses, and must agree on every threshold. The differences, each with a test below:

- The p-value. Ours is the exact binomial tail. MAPIE takes the smaller of Hoeffding's and Bentkus's bound, and for
  binary losses its "Bentkus" is the same tail, which is never above Hoeffding's. But it computes the number of wrong
  answers as ``ceil(n * (1 - right / n))`` in floating point, which is one too many for some n and right: then its
  p-value is larger. It is never smaller.
- The order. Ours is fixed before the answers are seen. MAPIE's "fixed_sequence" decides on the calibration answers
  whether to walk up or down: by where the empirical risk falls, and a threshold that no answer reaches has the risk 1.
  Where it chooses our direction it chooses our threshold. A direction that depends on the answers is not covered by the
  proof of fixed-sequence testing, so ours does not do that; its ``control_fwer`` is compared in our order instead.
- Several starts. MAPIE gives every start delta / starts, spaces starts evenly, and a sequence that runs into the next
  one keeps its own level. Ours takes starts anywhere and hands the level on (Wiens's fallback): it passes at least
  all that MAPIE passes with the same starts.
- MAPIE's default, Bonferroni-Holm over 100 thresholds from 0 to 0.99, needs no order; ours needs one and pays nothing
  for the number of thresholds. Ours passes whatever plain Bonferroni passes on the same thresholds if each is a start;
  against Holm neither contains the other, so only the guarantee is compared.
- Of the passed thresholds both take the lowest: MAPIE maximises recall, which falls with t.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import stats

from selfdoubt.calibration.threshold import (
    Grid,
    build_fixed_grid,
    count_at_thresholds,
    find_passed_levels,
    find_threshold,
)
from tests import oracles

mapie = oracles.load("mapie.risk_control")
fwer = oracles.load("mapie.risk_control.fwer_control")

THRESHOLDS = tuple(np.round(np.arange(0.98, -0.001, -0.02), 2).tolist())


def answers(n, seed, *, honest=True):
    random = np.random.default_rng(seed)
    p = random.beta(3, 1.2, n)
    return p, random.random(n) < (p if honest else 0.7)


def control(p, correct, target, confidence, *, thresholds=THRESHOLDS, method="bonferroni"):
    """MAPIE's valid thresholds, its choice, and its p-values."""
    controller = mapie.BinaryClassificationController(
        lambda x: np.stack([1 - x, x], axis=1), "precision", target, confidence,
        list_predict_params=np.array(thresholds), fwer_method=method,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no threshold is valid", and "the risk is not monotonic"
        controller.calibrate(p, correct.astype(int))
    return set(controller.valid_predict_params.tolist()), controller.best_predict_param, np.ravel(controller.p_values)


def control_in_order(p, correct, target, confidence, starts=1):
    """The thresholds that MAPIE's fixed-sequence testing passes in the order of ``THRESHOLDS``."""
    p_values = control(p, correct, target, confidence)[2]
    places = fwer.control_fwer(p_values, 1 - confidence, fwer.FWERFixedSequenceTesting(n_starts=starts))
    return {THRESHOLDS[place] for place in places}


def passed(p, correct, target, confidence, grid):
    answered, right = count_at_thresholds(p, correct, grid)
    levels = find_passed_levels(answered[None], right[None], target, confidence, grid.starts)[0]
    return {t for t, level in zip(grid.thresholds, levels, strict=True) if level > 0}


@pytest.mark.parametrize(("target", "confidence"), [(0.6, 0.8), (0.7, 0.95), (0.8, 0.9), (0.85, 0.8)])
def test_equal_settings_give_equal_thresholds(target, confidence):
    grid = Grid(THRESHOLDS)
    equal = 0
    for n, seed in ((n, seed) for n in (30, 200, 1500) for seed in range(6)):
        p, correct = answers(n, seed)
        answered, right = count_at_thresholds(p, correct, grid)
        tail = stats.binom.sf(right - 1, answered, target)
        p_values = control(p, correct, target, confidence)[2]
        exact = (answered > 0) & (np.ceil(answered * (1 - right / np.maximum(answered, 1))) == answered - right)
        np.testing.assert_allclose(p_values[exact], tail[exact], rtol=1e-9, atol=1e-300)
        assert (p_values >= tail * (1 - 1e-9))[answered > 0].all()
        valid, ours = control_in_order(p, correct, target, confidence), passed(p, correct, target, confidence, grid)
        assert valid <= ours
        # MAPIE's rounding is the only reason for another result.
        rounded = ((tail <= 1 - confidence) & (p_values > 1 - confidence))[answered > 0].any()
        assert valid == ours or rounded
        equal += valid == ours and len(ours) > 0
    assert equal > 0


def test_the_whole_controller_chooses_the_same_threshold_where_it_walks_down():
    equal, chosen = 0, set()
    grid = Grid(tuple(t for t in THRESHOLDS if t <= 0.9))  # all are reached, so that the risk rises along the list
    for seed in range(8):
        p, correct = answers(3000, seed)
        promise = find_threshold(p, correct, 0.8, 0.9, grid=grid)
        best = control(p, correct, 0.8, 0.9, thresholds=grid.thresholds, method="fixed_sequence")[1]
        step = grid.thresholds[grid.thresholds.index(promise.threshold) - 1]
        assert best in (promise.threshold, step)  # a step earlier where it counts one wrong answer too many
        equal += best == promise.threshold
        chosen.add(best)
    assert equal >= 4
    assert len(chosen) > 1


def test_mapie_takes_its_direction_from_the_answers():
    """The surest answers are the worst: MAPIE starts at the bottom of the list, ours at its top, and passes nothing."""
    p = np.repeat([0.2, 0.9], 100)
    correct = np.array([True] * 100 + [True] * 50 + [False] * 50)
    valid = control(p, correct, 0.6, 0.9, thresholds=(0.8, 0.1), method="fixed_sequence")[0]
    assert valid == {0.1}
    assert passed(p, correct, 0.6, 0.9, Grid((0.8, 0.1))) == set()
    assert passed(p, correct, 0.6, 0.9, Grid((0.8, 0.1), (0, 1))) == {0.1}


def test_the_wrong_answers_are_counted_exactly_where_mapie_rounds_up():
    """Of 10 answers 7 are right: 10 * (1 - 7 / 10) is above 3, and MAPIE tests 4 wrong ones."""
    assert np.ceil(10 * (1 - 7 / 10)) == 4
    p, correct = np.full(10, 0.9), np.array([True] * 7 + [False] * 3)
    exact, next_one = stats.binom.cdf([3, 4], 10, 0.6)
    hoeffding = (0.6 / 0.3) ** 3 * (0.4 / 0.7) ** 7  # exp(-10 KL(0.3, 0.6))
    valid, _, (p_value,) = control(p, correct, 0.4, 0.9, thresholds=(0.5,))
    assert p_value == pytest.approx(min(hoeffding, next_one))
    assert exact < 0.1 < p_value
    assert not valid
    assert passed(p, correct, 0.4, 0.9, Grid((0.5,))) == {0.5}


@pytest.mark.parametrize("starts", [2, 5])
@pytest.mark.parametrize("honest", [True, False])
def test_several_starts_pass_at_least_what_mapie_passes(starts, honest):
    each, both, more = len(THRESHOLDS) // starts, 0, 0
    grid = Grid(THRESHOLDS, tuple(i * each for i in range(starts)))
    for seed in range(40):
        p, correct = answers(400, seed, honest=honest)
        valid = control_in_order(p, correct, 0.65, 0.9, starts)
        ours = passed(p, correct, 0.65, 0.9, grid)
        assert valid <= ours
        both, more = both + len(valid), more + len(ours - valid)
    assert both > 0
    assert more > 0


def test_every_threshold_a_start_passes_at_least_what_bonferroni_passes():
    grid = Grid(THRESHOLDS, tuple(range(len(THRESHOLDS))))
    for seed in range(25):
        p, correct = answers(400, seed)
        assert control(p, correct, 0.8, 0.9, method="bonferroni")[0] <= passed(p, correct, 0.8, 0.9, grid)


@pytest.mark.parametrize(("honest", "target"), [(True, 0.85), (False, 0.72)])
def test_both_keep_their_promise(honest, target):
    """The truth is known: a(t) = E[p | p >= t], or 0.7 at every t. False alarm: below 1e-9 by the binomial bound."""
    sets, confidence = 300, 0.8
    grid = build_fixed_grid(target)
    q = np.random.default_rng(99).beta(3, 1.2, 400_000)
    truth = {t: q[q >= t].mean() if honest else 0.7 for t in {*grid.thresholds, *THRESHOLDS}}
    broken = {"ours": 0, "holm": 0}
    for seed in range(sets):
        p, correct = answers(300, 1000 + seed, honest=honest)
        promise = find_threshold(p, correct, target, confidence, grid=grid)
        best = control(p, correct, target, confidence, method="bonferroni_holm")[1]
        broken["ours"] += promise is not None and truth[promise.threshold] < target
        broken["holm"] += best is not None and truth[best] < target
    most = stats.binom.ppf(1 - 1e-10, sets, 1 - confidence)
    assert max(broken.values()) <= most
