"""Tabular regression with intervals that cover as often as they say.

The data are scikit-learn's diabetes: ten measurements of 442 patients, and how far the illness had come a year later
(Efron et al., 2004). A sculpt inside voters predicts a value and how far it may be off; ``ConformalIntervals`` makes of
both intervals that hold 90 of 100 targets, wide where the risk is high, whatever the network has learnt.

That is a mean over splits, each of which covers more or less. The width is the 109th smallest of 120 scores,
so the share of new patients that it covers has a Beta(109, 12) distribution over splits, and the number of covered ones
among 122 is beta-binomial (Vovk, 2012, "Conditional validity of inductive conformal predictors").

    python examples/tabular.py
"""

from __future__ import annotations

import math

import comparison as c
import matplotlib
import torch
from scipy import stats
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

from selfdoubt import interpret, sculpt, vote
from selfdoubt.interpret import ConformalIntervals, Interval

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUDGET = c.Budget(steps=200, batch=40, rate=5e-3, decay=0.1)
TRAINING, CALIBRATION, UNIT = 200, 120, 77.0


def read_patients(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return three parts of the patients: to train, to calibrate and to test."""
    measured, progress = load_diabetes(return_X_y=True)
    x = torch.tensor(measured, dtype=torch.float32) * len(measured) ** 0.5
    y = (torch.tensor(progress, dtype=torch.float32)[:, None] - 152) / UNIT
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([TRAINING, CALIBRATION, len(x) - TRAINING - CALIBRATION])
    return [(x[part], y[part]) for part in parts]


def build(dropout: float = 0.0) -> nn.Module:
    """Build a network of two hidden layers."""
    return nn.Sequential(
        nn.Linear(10, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 32), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(32, 1),
    )  # fmt: skip


def expect_share(calibration: int, test: int, level: float = 0.9) -> tuple[float, float]:
    """Return the ends between which the covered share of a split's test rows lies 95 times of 100."""
    rank = math.ceil((calibration + 1) * level)
    low, high = stats.betabinom(test, rank, calibration + 1 - rank).ppf([0.025, 0.975])
    return float(low) / test, float(high) / test


def measure(name: str, interval: Interval, mean: Tensor, y: Tensor, seconds: float) -> c.Row:
    """Measure intervals: their coverage and mean width, in the data's own unit."""
    numbers = {
        "RMSE": UNIT * float((mean - y).square().mean().sqrt()),
        "in 90 %": float(interval.contains(y).float().mean()),
        "width": UNIT * float(interval.width.mean()),
        "seconds": seconds,
    }
    return c.Row(name, numbers)


def compare(seed: int, *, peers: bool) -> tuple[list[c.Row], Interval, Tensor, Tensor]:
    """Measure the intervals of all ways on one split."""
    (x, y), (kept_x, kept_y), (test_x, test_y) = read_patients(seed)
    rows = []
    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        wrapped = vote.Wrapper(n_voters=5, seed=seed)(sculpt.Wrapper()(build()))
        budget = c.Budget(BUDGET.steps, 5 * BUDGET.batch, BUDGET.rate, BUDGET.decay, seed)
        c.train(wrapped, x, y, lambda out, y: sculpt.Normal.nll(out, y).mean(), budget, return_risk=True)
        with torch.no_grad():
            kept, (mean, risk) = wrapped.predict(kept_x), wrapped.predict(test_x)
    trusting = interpret.parametric_interval(mean, risk, level=0.9)
    calibrated = ConformalIntervals.fit(kept.mean, kept_y, kept.risk, level=0.9).predict(mean, risk)
    rows.append(measure("vote(sculpt), as it says", trusting, mean, test_y, clock.processor))
    rows.append(measure("vote(sculpt), calibrated", calibrated, mean, test_y, clock.processor))
    budget = c.Budget(BUDGET.steps, BUDGET.batch, BUDGET.rate, BUDGET.decay, seed)
    clock = c.Clock()
    with c.measure_time(clock):
        networks = c.train_networks(build, x, y, nn.functional.mse_loss, budget, members=5)
        outputs = [c.predict_networks(networks, given) for given in (x, test_x)]
    rows.append(measure_members("5 networks", outputs, y, test_y, clock.processor))
    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        noisy = c.train(build(dropout=0.1), x, y, nn.functional.mse_loss, budget)
        outputs = [c.predict_dropout(noisy, given, 20) for given in (x, test_x)]
    rows.append(measure_members("MC dropout", outputs, y, test_y, clock.processor))
    if peers:
        clock = c.Clock()
        with c.measure_time(clock):
            torch.manual_seed(seed)
            plain = c.train(build(), x, y, nn.functional.mse_loss, budget)
            predicted = c.predict_laplace(plain, x, y, [test_x], kind="regression")
        if predicted is not None:
            center, std = predicted[0]
            trusting = interpret.parametric_interval(center, std, level=0.9)
            rows.append(measure("laplace-torch", trusting, center, test_y, clock.processor))
    return rows, calibrated, mean, test_y


def measure_members(name: str, outputs: list[Tensor], y: Tensor, test_y: Tensor, seconds: float) -> c.Row:
    """Measure members that predict no noise: it is taken as large as their errors on the training data."""
    noise = (outputs[0].mean(0) - y).square().mean()
    std = (outputs[1].var(0, correction=0) + noise).sqrt()
    mean = outputs[1].mean(0)
    return measure(name, interpret.parametric_interval(mean, std, level=0.9), mean, test_y, seconds)


def plot(interval: Interval, mean: Tensor, y: Tensor, options: c.Options) -> None:
    """Draw the intervals of the test's patients, in the order of their predictions."""
    order = mean[:, 0].argsort()
    low, high = (152 + UNIT * end[order, 0].numpy() for end in (interval.low, interval.high))
    middle, target = (152 + UNIT * part[order, 0].numpy() for part in (mean, y))
    inside = (target >= low) & (target <= high)
    figure, axes = plt.subplots(figsize=(8, 3.6))
    rows = torch.arange(len(order)).numpy()
    axes.vlines(rows, low, high, color="tab:blue", alpha=0.35, label="90 % interval")
    axes.plot(rows, middle, color="tab:blue", label="prediction")
    axes.plot(rows[inside], target[inside], ".", color="black", markersize=4, label="target inside")
    axes.plot(rows[~inside], target[~inside], "x", color="tab:red", label="target outside")
    low, high = expect_share(CALIBRATION, len(rows))
    expected = f"{100 * low:.0f} to {100 * high:.0f} % in 95 of 100 splits"
    axes.set_title(f"{inside.mean():.0%} of {len(rows)} patients lie inside ({expected})", fontsize=10)
    axes.set_xlabel("patients, by their prediction")
    axes.set_ylabel("progress of the illness")
    axes.legend(fontsize=8, ncols=4, loc="upper left")
    figure.tight_layout()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "tabular.png", dpi=75)


def main() -> None:
    """Train, compare, and draw the first seed."""
    options = c.read_options(__doc__, seeds=20)
    rows = []
    for seed in range(options.seeds):
        measured, interval, mean, y = compare(seed, peers=options.peers)
        rows += measured
        if seed == 0:
            plot(interval, mean, y, options)
    band = [round(end, 3) for end in expect_share(CALIBRATION, len(y))]
    c.write("tabular", rows, options, training=TRAINING, calibration=CALIBRATION, steps=BUDGET.steps, band=band)


if __name__ == "__main__":
    main()
