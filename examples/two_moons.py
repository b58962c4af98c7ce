"""Two moons: a map of where a classifier has a reason for its answer.

A small network separates two half circles of points. ``vote`` makes five voters of it; ``density`` measures how far
each point's features are from those of the training points. One call returns both, with the entropy that the classes
themselves leave where the moons meet.

    python examples/two_moons.py
"""

from __future__ import annotations

from functools import partial

import comparison as c
import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import make_moons
from torch import Tensor, nn

from selfdoubt import density, vote
from selfdoubt.forecast import Forecast

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUDGET = c.Budget(steps=500, batch=60, rate=1e-2)


def draw(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points of both moons."""
    points, moons = make_moons(n, noise=0.15, random_state=seed)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(moons)


def build(dropout: float = 0.0) -> nn.Module:
    """Build a network of two hidden layers."""
    return nn.Sequential(
        nn.Linear(2, 48), nn.ReLU(), nn.Dropout(dropout), nn.Linear(48, 48), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(48, 2),
    )  # fmt: skip


def fit_selfdoubt(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Train five voters, and then measure where their features usually are."""
    torch.manual_seed(seed)
    voters = vote.Wrapper(n_voters=5, finetune=False, output="logits", seed=seed)(build())
    budget = c.Budget(BUDGET.steps, 5 * BUDGET.batch, BUDGET.rate, seed=seed)
    c.train(voters, x, y, F.cross_entropy, budget)
    wrapped = density.Wrapper()(voters)
    density.fit(wrapped, [x])
    return wrapped


def compare(seed: int, *, peers: bool) -> tuple[list[c.Row], Forecast, tuple[Tensor, Tensor]]:
    """Measure all ways on one draw; points on a circle around the moons are of another kind."""
    x, y = draw(200, seed)
    test_x, test_y = draw(1000, seed + 1000)
    angle = torch.linspace(0, 6.28, 300)
    around = torch.stack([0.5 + 3 * angle.cos(), 0.25 + 2.5 * angle.sin()], 1)
    rows = []
    clock = c.Clock()
    with c.measure_time(clock):
        wrapped = fit_selfdoubt(x, y, seed)
        with torch.no_grad():
            test, others, picture = (wrapped.forecast(points) for points in (test_x, around, make_grid()))
    measure = partial(c.measure_classes, y=test_y, seconds=clock.processor)
    rows.append(measure("vote: epistemic", test.members, doubt=test.epistemic, others=others.epistemic))
    rows.append(measure("vote: density", test.members, doubt=test.density, others=others.density))

    budget = c.Budget(BUDGET.steps, BUDGET.batch, BUDGET.rate, seed=seed)
    rows.append(c.measure_networks(build, x, y, (test_x, around), test_y, budget, members=5))
    rows.append(c.measure_dropout(build, x, y, (test_x, around), test_y, budget, passes=20))
    if peers:
        clock = c.Clock()
        with c.measure_time(clock):
            torch.manual_seed(seed)
            plain = c.train(build(), x, y, F.cross_entropy, budget)
            predicted = c.predict_laplace(plain, x, y, [test_x, around])
        if predicted is not None:
            rows.append(c.measure_members("laplace-torch", predicted, test_y, clock.processor))
    return rows, picture, (x, y)


def make_grid(across: int = 120, high: int = 90) -> Tensor:
    """Return the points of a map, ``(across * high, 2)``."""
    rows, columns = torch.linspace(-2.2, 2.7, high), torch.linspace(-3, 4, across)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).flatten(0, 1)


def plot(forecast: Forecast, data: tuple[Tensor, Tensor], options: c.Options) -> None:
    """Draw maps of the answer and of three kinds of doubt."""
    assert forecast.density is not None
    maps = {
        "probability of the second moon": forecast.mean.softmax(-1)[:, 1],
        "aleatoric: the classes overlap, nats": forecast.aleatoric,
        "epistemic: the voters disagree, nats": forecast.epistemic,
        "density: distance from the data": forecast.density,
    }
    figure, axes = plt.subplots(2, 2, figsize=(8, 6), sharex=True, sharey=True)
    points, moons = data
    for place, (title, values) in zip(axes.flat, maps.items(), strict=True):
        colours = "RdBu_r" if title.startswith("probability") else "viridis"
        shown = place.imshow(
            values.view(90, 120).numpy(), origin="lower", extent=(-3, 4, -2.2, 2.7), aspect="auto", cmap=colours
        )
        place.scatter(*points.T.numpy(), c=moons.numpy(), cmap="RdBu_r", s=5, edgecolors="white", linewidths=0.3)
        place.set_title(title, fontsize=9)
        figure.colorbar(shown, ax=place)
    figure.tight_layout()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "two_moons.png", dpi=65)


def main() -> None:
    """Train, compare, and draw the first seed."""
    options = c.read_options(__doc__, seeds=2)
    rows = []
    for seed in range(options.seeds):
        measured, forecast, data = compare(seed, peers=options.peers)
        rows += measured
        if seed == 0:
            plot(forecast, data, options)
    c.write("two_moons", rows, options, points=200, steps=BUDGET.steps)


if __name__ == "__main__":
    main()
