"""The promise of a threshold, kept or broken in worlds whose accuracy is known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, binom, binomtest

from selfdoubt.calibration.threshold import (
    Grid,
    build_fixed_grid,
    build_grid,
    count_at_thresholds,
    count_least_answers,
    explain_no_threshold,
    find_passed_levels,
    find_threshold,
)
from selfdoubt.errors import ConfigError, DataError

SETS = 2000
WORLDS = 60  # simulated worlds in this file, at most: each may raise a false alarm
FALSE_ALARM = 1e-9 / WORLDS


def most_failures(confidence):
    """Where promises hold, more broken ones than this among ``SETS`` have a chance below 1e-9 / WORLDS."""
    return binom.isf(FALSE_ALARM, SETS, 1 - confidence)


class World:
    """p_correct ~ Beta(a, b); an answer with p_correct = p is right with a probability of ``slope * p + shift``."""

    def __init__(self, a, b, slope=1.0, shift=0.0):
        self.a, self.b, self.slope, self.shift = a, b, slope, shift

    def accuracy(self, thresholds):
        """Among answers with p_correct at or above each threshold: E[p | p >= t] is a ratio of Beta tails."""
        thresholds = np.asarray(thresholds)
        mean = (
            self.a / (self.a + self.b) * beta.sf(thresholds, self.a + 1, self.b) / beta.sf(thresholds, self.a, self.b)
        )
        return self.slope * mean + self.shift

    def draw(self, rng, *shape):
        p = rng.beta(self.a, self.b, shape)
        return p, rng.random(shape) < self.slope * p + self.shift


def table(p, correct, thresholds):
    """Counts of each set at each threshold, from a histogram: another way than the code under test."""
    ascending = np.asarray(thresholds)[::-1]
    place = np.searchsorted(ascending, p, side="right") + (len(ascending) + 1) * np.arange(len(p))[:, None]
    shape = len(p), len(ascending) + 1
    hits = (np.bincount(place[keep], minlength=shape[0] * shape[1]).reshape(shape) for keep in (p >= 0, correct))
    return tuple(h[:, ::-1].cumsum(1)[:, :-1] for h in hits)


def outcomes(world, rng, answers, grids, target, confidence=0.95):
    """For each grid: the share of sets with a threshold, and how many of these break the promise."""
    p, correct = world.draw(rng, SETS, answers)
    for grid in grids:
        answered, right = table(p, correct, grid.thresholds)
        ok = find_passed_levels(answered, right, target, confidence, grid.starts) > 0
        last = np.where(ok, np.arange(ok.shape[1]), -1).max(1)
        broken = (last >= 0) & (world.accuracy(grid.thresholds)[last] < target)
        yield float((last >= 0).mean()), int(broken.sum())


HONEST = {0.3: (0.6, 1.4), 0.6: (0.9, 0.6), 0.9: (4.5, 0.5)}


@pytest.mark.parametrize("answers", [50, 200, 1000])
@pytest.mark.parametrize("base", HONEST)
@pytest.mark.parametrize(("target", "confidence"), [(0.9, 0.95), (0.7, 0.8)])
def test_a_promise_is_kept_where_p_correct_is_honest(base, answers, target, confidence):
    world, rng = World(*HONEST[base]), np.random.default_rng(answers)
    assert world.accuracy(0.0) == pytest.approx(base)
    elsewhere, _ = world.draw(rng, 500)
    grids = build_grid(elsewhere, answers, target, confidence), build_fixed_grid(target)
    for found, broken in outcomes(world, rng, answers, grids, target, confidence):
        assert broken <= most_failures(confidence)
        if answers == 1000 and (base, target) != (0.3, 0.9):
            assert found > 0.95


@pytest.mark.parametrize("answers", [50, 200, 1000])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_a_promise_is_kept_where_p_correct_says_nothing(answers, confidence):
    """Everywhere a little less than the target: every threshold found is a broken promise."""
    world, rng = World(1, 1, slope=0.0, shift=0.895), np.random.default_rng(answers)
    grids = build_grid(world.draw(rng, 500)[0], answers, 0.9, confidence), build_fixed_grid(0.9)
    for found, broken in outcomes(world, rng, answers, grids, 0.9, confidence):
        assert broken == round(found * SETS) <= most_failures(confidence)
        assert answers < 1000 or broken > 0  # the test is a sharp one: it does come near


@pytest.mark.parametrize("answers", [200, 1000])
def test_a_promise_is_kept_where_the_surest_answers_are_the_worst(answers):
    world, rng = World(1, 1, slope=-0.3, shift=1.0), np.random.default_rng(answers)
    assert world.accuracy(0.0) < 0.9
    grids = build_grid(world.draw(rng, 500)[0], answers, 0.84), Grid((0.99, 0.9, 0.5), (0, 1, 2))
    for _, broken in outcomes(world, rng, answers, grids, 0.84):
        assert broken <= most_failures(0.95)


def test_the_naive_threshold_breaks_the_promise():
    """What these simulations can find: the lowest threshold at which the answers seen reach the target."""
    world, rng = World(0.9, 0.6), np.random.default_rng(0)
    thresholds = np.linspace(0.99, 0, 100)
    p, correct = world.draw(rng, SETS, 200)
    answered, right = table(p, correct, thresholds)
    ok = (right >= 0.9 * answered) & (answered > 0)
    last = np.where(ok, np.arange(100), -1).max(1)
    assert ((last >= 0) & (world.accuracy(thresholds)[last] < 0.9)).sum() > 3 * most_failures(0.95)


def test_testing_every_threshold_without_an_order_breaks_the_promise():
    """As many starts as thresholds at the full level each: why the level is shared."""
    world, rng = World(1, 1, slope=0.0, shift=0.89), np.random.default_rng(0)
    grid = build_fixed_grid(0.9)
    p, correct = world.draw(rng, SETS, 200)
    answered, right = table(p, correct, grid.thresholds)
    anywhere = (binom.sf(right - 1, answered, 0.9) <= 0.05) & (answered > 0)
    assert anywhere.any(1).sum() > most_failures(0.95)
    shared = find_passed_levels(answered, right, 0.9, 0.95, tuple(range(len(grid.thresholds))))
    assert (shared > 0).any(1).sum() <= most_failures(0.95)


def test_one_set_is_as_many_sets():
    world, rng = World(0.9, 0.6), np.random.default_rng(1)
    p, correct = world.draw(rng, 40, 300)
    p = p.round(2)  # ties, also with the thresholds
    grid = build_fixed_grid(0.8)
    answered, right = table(p, correct, grid.thresholds)
    levels = find_passed_levels(answered, right, 0.8, 0.9, grid.starts)
    for i in range(40):
        promise = find_threshold(p[i], correct[i], 0.8, 0.9)
        assert (promise is None) == (not levels[i].any())
        if promise is not None:
            place = np.flatnonzero(levels[i])[-1]
            assert promise.threshold == grid.thresholds[place]
            given = p[i] >= promise.threshold
            assert (promise.answered, promise.right) == (given.sum(), (given & correct[i]).sum())
            assert promise.coverage == given.mean()
            assert promise.bound >= 0.8


def test_a_lone_start_is_a_binomial_test_against_scipy():
    for n, k in [(29, 29), (28, 28), (100, 95), (100, 94), (0, 0)]:
        found = find_passed_levels(np.array([[n]]), np.array([[k]]), 0.9, 0.95)[0, 0] > 0
        assert found == (n > 0 and binomtest(k, n, 0.9, "greater").pvalue <= 0.05)


def test_the_bound_against_scipy():
    p, correct = np.full(200, 0.8), np.arange(200) < 190
    promise = find_threshold(p, correct, 0.9, grid=Grid((0.5,)))
    interval = binomtest(190, 200, 0.9, "greater").proportion_ci(0.95)
    assert promise.bound == pytest.approx(interval.low)


def test_what_a_passed_test_had_goes_to_the_next_and_a_failed_one_loses_it():
    good, bad = (1000, 1000), (1000, 0)
    answered, right = (np.array([x]) for x in zip(good, good, bad, good, good, good, strict=True))
    levels = find_passed_levels(answered, right, 0.9, 0.9, (0, 1, 4))[0]
    assert levels == pytest.approx([0.1 / 3, 0.2 / 3, 0, 0, 0.1 / 3, 0.1 / 3])


def test_judgements_after_the_first_failure_do_not_matter():
    rng = np.random.default_rng(0)
    p = np.linspace(1, 0, 400)
    correct = np.concatenate([np.full(100, True), rng.random(100) < 0.5, np.full(200, False)])
    promise = find_threshold(p, correct, 0.9, grid=Grid((0.8, 0.4, 0.0)))
    assert promise.threshold == 0.8
    correct[200:] = True  # now everything together would pass, had it a start of its own
    assert find_threshold(p, correct, 0.7, grid=Grid((0.9, 0.4, 0.0))).threshold == 0.0
    assert find_threshold(p, correct, 0.9, grid=Grid((0.8, 0.4, 0.0))).threshold == 0.8


def test_a_grid_from_other_answers_starts_where_enough_are_expected():
    elsewhere = np.linspace(0, 1, 1001)
    grid = build_grid(elsewhere, 1000, 0.9)
    assert grid.thresholds[-1] == 0.0
    assert 1000 * (1 - grid.thresholds[0]) >= 2 * count_least_answers(0.9) > 1000 * (1 - grid.thresholds[0] - 0.02)
    assert build_grid(elsewhere, 40, 0.9).thresholds == (0.0,)  # too few to choose among thresholds
    assert build_grid(np.full(100, 0.7), 1000, 0.9).thresholds == (0.7, 0.0)


def test_the_fixed_grid_reaches_from_above_the_target_to_everything():
    grid = build_fixed_grid(0.9)
    assert grid.thresholds[0] == pytest.approx(0.95)
    assert grid.thresholds[grid.starts[1]] == 0.9
    assert grid.thresholds[-1] == 0.0
    assert build_fixed_grid(0.999).thresholds[0] < 1
    assert build_fixed_grid(0.004).thresholds[-1] == 0.0


def test_least_answers_is_what_a_perfect_sample_needs():
    for target, confidence in [(0.9, 0.95), (0.5, 0.5), (0.99, 0.9)]:
        n = count_least_answers(target, confidence)
        assert target**n <= 1 - confidence + 1e-12 < target ** (n - 1) + 1e-12


def test_no_threshold_says_why():
    few = np.full(20, 0.9), np.full(20, True)
    assert find_threshold(*few, 0.9) is None
    assert "20 answers to test it on are too few" in explain_no_threshold(*few, 0.9)
    assert "at least 18 more judged answers are needed" in explain_no_threshold(*few, 0.9, share=0.5)
    hopeless = np.linspace(0, 1, 500), np.arange(500) % 2 == 0
    assert find_threshold(*hopeless, 0.9) is None
    assert "more answers would not help" in explain_no_threshold(*hopeless, 0.9)
    near = np.full(100, 0.9), np.arange(100) < 93
    assert find_threshold(*near, 0.9) is None
    said = explain_no_threshold(*near, 0.9)
    low = binomtest(93, 100, 0.9, "greater").proportion_ci(0.975).low  # two starts share the level
    assert f"93 of the surest 100 were right, which proves {100 * low:.3g} %" in said
    more = int(said.split("roughly ")[1].split(" ")[0])
    assert 100 < more < 400
    scaled = np.full(100 + more, 0.9), np.arange(100 + more) < 0.93 * (100 + more)
    assert find_threshold(*scaled, 0.9) is not None


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"target_accuracy": 90}, ConfigError, "the target accuracy is a share between 0 and 1 .90 % is 0.9., got 90"),
        ({"confidence": 1.0}, ConfigError, "the confidence is a share"),
        ({"p_correct": np.array([0.5, np.nan])}, DataError, "p_correct is a probability in .0, 1., got nan"),
        ({"p_correct": np.array([0.5, 1.5])}, DataError, "got 1.5"),
        ({"p_correct": np.array([]), "correct": np.array([], bool)}, DataError, "needs judged answers, got none"),
        ({"p_correct": np.array([0.5])}, DataError, "one judgement for each p_correct, got 2 and 1"),
    ],
)
def test_what_cannot_be_tested_is_said(change, error, says):
    given = {"p_correct": np.array([0.5, 0.6]), "correct": np.array([True, False]), "target_accuracy": 0.9}
    with pytest.raises(error, match=says):
        find_threshold(**(given | change))


@pytest.mark.parametrize("thresholds", [(), (0.5, 0.5), (0.1, 0.2), (1.2,), (float("nan"),)])
def test_a_grid_descends(thresholds):
    with pytest.raises(ConfigError, match="thresholds must be"):
        Grid(thresholds)
    with pytest.raises(ConfigError, match="starts are places"):
        Grid((0.5,), (1,))


def test_counts_include_the_threshold_itself():
    answered, right = count_at_thresholds(
        np.array([0.5, 0.5, 0.2]), np.array([True, False, True]), Grid((0.5, 0.2, 0.0))
    )
    assert answered.tolist() == [2, 3, 3]
    assert right.tolist() == [1, 2, 2]
