"""One-dimensional regression with a gap: noise of the data and lack of data are two different doubts.

The data are sin(3x) with noise that grows from left to right, and there are none between -0.4 and 0.6. A sculpt inside
voters gives both kinds: ``aleatoric`` follows the noise, ``epistemic`` grows where no data are.

    python examples/regression.py
"""

from __future__ import annotations

import math

import comparison as c
import matplotlib
import torch
from torch import Tensor, nn

from selfdoubt import sculpt, vote
from selfdoubt.forecast import Forecast

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GAP = (-0.4, 0.6)
BUDGET = c.Budget(steps=900, batch=90, rate=1e-2, decay=0.01)


def find_noise(x: Tensor) -> Tensor:
    """Return the standard deviation of the data's noise."""
    return 0.05 + 0.15 * (x + 1.5) / 3


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points to the left and to the right of the gap."""
    generator = torch.Generator().manual_seed(seed)
    left, right = GAP[0] + 1.5, 1.5 - GAP[1]
    place = torch.rand(n, 1, generator=generator) * (left + right)
    x = torch.where(place < left, place - 1.5, GAP[1] + place - left)
    return x, torch.sin(3 * x) + find_noise(x) * torch.randn(n, 1, generator=generator)


def build(dropout: float = 0.0) -> nn.Module:
    """Build a network of two hidden layers."""
    return nn.Sequential(
        nn.Linear(1, 64), nn.Tanh(), nn.Dropout(dropout), nn.Linear(64, 64), nn.Tanh(), nn.Dropout(dropout),
        nn.Linear(64, 1),
    )  # fmt: skip


def fit_selfdoubt(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Train five voters that share no weights around a network that predicts its own noise."""
    torch.manual_seed(seed)
    inner = sculpt.Wrapper(distribution=sculpt.Normal)(build())
    wrapped = vote.Wrapper(n_voters=5, finetune=False, seed=seed)(inner)
    budget = c.Budget(BUDGET.steps, 5 * BUDGET.batch, BUDGET.rate, BUDGET.decay, seed)
    return c.train(wrapped, x, y, lambda out, y: sculpt.Normal.nll(out, y).mean(), budget, return_risk=True)


def compare(seed: int, *, peers: bool) -> tuple[list[c.Row], Forecast, tuple[Tensor, Tensor], Tensor]:
    """Measure all ways on one draw of the data."""
    x, y = draw(200, seed)
    test_x, test_y = draw(500, seed + 1000)
    inside = torch.linspace(GAP[0] + 0.2, GAP[1] - 0.2, 100)[:, None]
    grid = torch.linspace(-2.2, 2.2, 300)[:, None]
    rows = []

    clock = c.Clock()
    with c.measure_time(clock):
        wrapped = fit_selfdoubt(x, y, seed)
        with torch.no_grad():
            test, gap, picture = (wrapped.forecast(points) for points in (test_x, inside, grid))
    name = "vote(sculpt)"
    rows.append(c.measure_values(name, test.mean, test.total, test_y, test.epistemic, gap.epistemic, clock.processor))

    mse = nn.functional.mse_loss
    budget = c.Budget(BUDGET.steps, BUDGET.batch, BUDGET.rate, BUDGET.decay, seed)
    clock = c.Clock()
    with c.measure_time(clock):
        networks = c.train_networks(build, x, y, mse, budget, members=5)
        outputs = [c.predict_networks(networks, points) for points in (x, test_x, inside)]
    rows.append(measure_members("5 networks", outputs, y, test_y, clock.processor))
    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        noisy = c.train(build(dropout=0.1), x, y, mse, budget)
        outputs = [c.predict_dropout(noisy, points, 20) for points in (x, test_x, inside)]
    rows.append(measure_members("MC dropout", outputs, y, test_y, clock.processor))
    if peers:
        clock = c.Clock()
        with c.measure_time(clock):
            torch.manual_seed(seed)
            plain = c.train(build(), x, y, mse, budget)
            predicted = c.predict_laplace(plain, x, y, [test_x, inside], kind="regression")
        if predicted is not None:
            (mean, std), (_, others) = predicted
            rows.append(c.measure_values("laplace-torch", mean, std, test_y, std, others, clock.processor))
    return rows, picture, (x, y), grid


def measure_members(name: str, outputs: list[Tensor], y: Tensor, test_y: Tensor, seconds: float) -> c.Row:
    """Measure members that predict no noise: it is taken as constant, as large as their errors on the training data."""
    noise = (outputs[0].mean(0) - y).square().mean()
    std = (outputs[1].var(0, correction=0) + noise).sqrt()
    doubts = [members.std(0, correction=0) for members in outputs[1:]]
    return c.measure_values(name, outputs[1].mean(0), std, test_y, *doubts, seconds)


def plot(forecast: Forecast, data: tuple[Tensor, Tensor], grid: Tensor, options: c.Options) -> None:
    """Draw the prediction with both kinds of uncertainty, and beneath it the two beside the truth."""
    x = grid[:, 0].numpy()
    mean, total, epistemic, aleatoric = (
        part[:, 0].numpy() for part in (forecast.mean, forecast.total, forecast.epistemic, forecast.aleatoric)
    )
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.6), sharex=True, height_ratios=(2, 1))
    above.fill_between(x, mean - 2 * total, mean + 2 * total, color="tab:orange", alpha=0.35, label="± 2 total")
    above.fill_between(
        x, mean - 2 * aleatoric, mean + 2 * aleatoric, color="tab:blue", alpha=0.35, label="± 2 aleatoric"
    )
    above.plot(x, mean, color="tab:blue", label="mean")
    above.plot(*(part[:, 0].numpy() for part in data), ".", color="black", markersize=3, label="data")
    above.plot(x, [math.sin(3 * value) for value in x], "--", color="gray", linewidth=1, label="truth")
    above.set_ylim(-2.6, 2.6)
    above.legend(ncols=5, fontsize=8, loc="upper center")
    below.plot(x, epistemic, color="tab:orange", label="epistemic")
    below.plot(x, aleatoric, color="tab:blue", label="aleatoric")
    seen = (x > -1.5) & (x < 1.5)
    below.plot(
        x[seen], find_noise(grid)[:, 0].numpy()[seen], "--", color="gray", linewidth=1, label="noise of the data"
    )
    below.set_ylim(0, 0.8)
    below.legend(ncols=3, fontsize=8, loc="upper center")
    for axes in (above, below):
        axes.axvspan(*GAP, color="gray", alpha=0.12)
    figure.tight_layout()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "regression.png", dpi=90)


def main() -> None:
    """Train, compare, and draw the first seed."""
    options = c.read_options(__doc__, seeds=2)
    rows = []
    for seed in range(options.seeds):
        measured, forecast, data, grid = compare(seed, peers=options.peers)
        rows += measured
        if seed == 0:
            plot(forecast, data, grid, options)
    c.write("regression", rows, options, points=200, steps=BUDGET.steps)


if __name__ == "__main__":
    main()
