"""Conformal sets of classes against MAPIE, torch-uncertainty and a plain loop, and what is refused."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin

from selfdoubt.errors import ConfigError, DataError, NonFiniteError, ShapeError
from selfdoubt.interpret import ConformalSets
from tests import oracles

METHODS = ["lac", "aps"]


def draw(n, seed, classes=5):
    """Probabilities of a model that is too sure, and labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(n, classes, generator=generator).double()
    labels = logits.softmax(-1).multinomial(1, generator=generator)[:, 0]
    return (2 * logits).softmax(-1), labels


class Fixed(ClassifierMixin, BaseEstimator):
    """A fitted classifier of scikit-learn whose input are its probabilities."""

    def fit(self, x, y):
        self.classes_ = np.arange(x.shape[1])
        return self

    def predict_proba(self, x):
        return x

    def predict(self, x):
        return x.argmax(-1)


# MAPIE takes numpy's "higher" quantile, which is one score further where (n + 1) level is whole.
@pytest.mark.parametrize(("n", "level"), [(200, 0.9), (37, 0.8), (120, 0.95)])
def test_lac_against_mapie(n, level):
    classification = oracles.load("mapie.classification")
    (probs, labels), (new, _) = draw(n, 1), draw(100, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = classification.SplitConformalClassifier(
            Fixed().fit(probs, labels), confidence_level=level, conformity_score="lac", prefit=True
        ).conformalize(probs.numpy(), labels.numpy())
        _, sets = theirs.predict_set(new.numpy())
    ours = ConformalSets.fit(probs, labels, level=level).predict(new).numpy()
    full = sets[:, :, 0]
    assert (ours == (full | (new == new.amax(-1, keepdim=True)).numpy())).all()
    assert (ours == full).all(-1).mean() > 0.9  # they may be empty, ours hold the most probable class


@pytest.mark.parametrize(("n", "level"), [(200, 0.9), (37, 0.8), (99, 0.95)])
def test_aps_against_a_plain_loop(n, level):
    (probs, labels), (new, _) = draw(n, 3), draw(60, 4)

    def score(p, k):
        return sum(float(q) for q in p if q >= p[k])

    scores = sorted(score(p, k) for p, k in zip(probs, labels, strict=True))
    place = int(np.ceil(np.round((n + 1) * level, 9)))
    expected = [[score(p, k) <= scores[place - 1] + 1e-12 or p[k] == p.max() for k in range(5)] for p in new]
    sets = ConformalSets.fit(probs, labels, level=level, method="aps")
    assert sets.quantile == pytest.approx(scores[place - 1], abs=1e-12)
    assert sets.predict(new).tolist() == expected


def load_torch_uncertainty():
    """Its APS, with the two names that this asks of the package around it, whose ``__init__`` imports too much."""
    package = "torch_uncertainty.post_processing"
    for file, name in (("abstract", "PostProcessing"), ("calibration.temperature_scaler", "TemperatureScaler")):
        module = oracles.load_alone(f"{package}.{file}")
        setattr(sys.modules[package], name, getattr(module, name))
    return oracles.load_alone(f"{package}.conformal.aps")


def test_aps_sets_against_torch_uncertainty():
    theirs = load_torch_uncertainty()
    (probs, labels), (new, _) = draw(200, 5), draw(100, 6)
    ours = ConformalSets.fit(probs, labels, method="aps")
    oracle = theirs.ConformalClsAPS(alpha=0.1, model=torch.nn.Identity(), randomized=False, enable_ts=False)
    oracle.q_hat = torch.tensor(ours.quantile, dtype=torch.float64)  # theirs is not corrected for the number of rows
    assert torch.equal(oracle.conformal(new.log()) > 0, ours.predict(new))


@pytest.mark.parametrize("method", METHODS)
def test_sets_of_90_percent_cover_90_percent(method):
    coverages = []
    for seed in range(50):
        sets = ConformalSets.fit(*draw(199, 2 * seed), method=method)
        probs, labels = draw(500, 2 * seed + 1)
        coverages.append(sets.predict(probs).gather(-1, labels[:, None]).double().mean().item())
    # As for intervals: the mean has a standard deviation of 0.0036, so that the false alarm is below 1e-14. The most
    # probable class is in a set beyond the bound, which only adds to the coverage: here less than 0.005.
    assert 0.87 < sum(coverages) / 50 < 0.93


def test_lac_has_the_smaller_sets():
    probs, labels = draw(2000, 1)
    sizes = [ConformalSets.fit(probs, labels, method=m).predict(probs).sum(-1).double().mean() for m in METHODS]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("method", METHODS)
def test_classes_of_equal_probability_are_in_or_out_together(method):
    probs = torch.tensor([[0.25] * 4, [0.4, 0.4, 0.1, 0.1]])
    inside = ConformalSets(method, 0.5, classes=4, level=0.9, n=99).predict(probs)
    assert inside[0].all()  # all are the most probable one
    assert inside[1].tolist() == [True, True, False, False]
    # From the largest down to all that are as probable: 0.5, then 0.9, not 0.7.
    tied = ConformalSets("aps", 0.8, classes=4, level=0.9, n=99).predict([0.5, 0.2, 0.2, 0.1])
    assert tied.tolist() == [True, False, False, False]


@pytest.mark.parametrize("method", METHODS)
def test_a_map_has_a_set_per_pixel(method):
    probs = torch.randn(2, 3, 4, 5).softmax(-1)
    sets = ConformalSets(method, 0.7, classes=5, level=0.9, n=99)
    torch.testing.assert_close(sets.predict(probs).flatten(0, 2), sets.predict(probs.flatten(0, 2)))


@pytest.mark.parametrize("method", METHODS)
def test_fitted_sets_print_and_go_to_json_and_back(method):
    fitted = ConformalSets.fit(*draw(99, 0), method=method)
    assert ConformalSets.parse(json.loads(json.dumps(fitted.to_json()))) == fitted
    assert "classes=5, level=0.9, n=99" in repr(fitted)


@pytest.mark.parametrize("change", [{"method": "raps"}, {"quantile": 1.5}, {"classes": 1}, {"level": 0}, {"n": "9"}])
def test_a_broken_record_of_sets_is_refused(change):
    with pytest.raises(DataError, match="fit it again"):
        ConformalSets.parse(ConformalSets("lac", 0.5, classes=3, level=0.9, n=9).to_json() | change)


PROBS, LABELS = torch.full((20, 4), 0.25), torch.zeros(20, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ConformalSets.fit(PROBS, LABELS, level=1.0), ConfigError, r"\(0, 1\)"),
        (lambda: ConformalSets.fit(PROBS, LABELS, method="raps"), ConfigError, "'raps'"),
        (lambda: ConformalSets.fit(PROBS[:8], LABELS[:8]), DataError, "at least 9 calibration rows, got 8"),
        (lambda: ConformalSets.fit(PROBS[None], LABELS[None]), ShapeError, "flatten"),
        (lambda: ConformalSets.fit(PROBS, LABELS[:, None]), ShapeError, "one index per row"),
        (lambda: ConformalSets.fit(PROBS, LABELS.float()), ShapeError, r"labels.long\(\)"),
        (lambda: ConformalSets.fit(PROBS, LABELS + 4), DataError, r"0 .. 3, got 4"),
        (lambda: ConformalSets.fit(PROBS, LABELS - 1), DataError, r"0 .. 3, got -1"),
        (lambda: ConformalSets.fit(PROBS[:0], LABELS[:0]), ShapeError, "empty"),
        (lambda: ConformalSets.fit(PROBS * 5, LABELS), DataError, "softmax"),
        (lambda: ConformalSets.fit(PROBS * float("nan"), LABELS), NonFiniteError, "80 of 80"),
        (lambda: ConformalSets.fit(PROBS, LABELS).predict(PROBS[:, :3] * 4 / 3), ShapeError, "4 classes, got 3"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
