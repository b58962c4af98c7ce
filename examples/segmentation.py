"""Segmentation of drawn fields, with three maps: where the label is noise, where the network has a guess only, and
where it looks at something new.

A scene has two fields: one ploughed along and one across. Some fields are bare, and were labelled carelessly: a coin
decides which of the two they are called, so that no amount of data would tell (aleatoric). Fields with rows both ways
never occur in training: they are out of distribution.

    python examples/segmentation.py
"""

from __future__ import annotations

import comparison as c
import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfdoubt import density, vote
from selfdoubt.forecast import Forecast

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SIZE = 24
BUDGET = c.Budget(steps=120, batch=24, rate=1e-2)


class Scenes:
    """Images ``(n, 1, 24, 24)``, their labels, and the pixels of bare fields and of new ones."""

    def __init__(self, n: int, seed: int, *, new: bool = False) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, 1, SIZE, SIZE, generator=draw) * 0.15
        self.y = torch.zeros(n, SIZE, SIZE, dtype=torch.long)
        self.bare = torch.zeros(n, SIZE, SIZE, dtype=torch.bool)
        self.new = torch.zeros(n, SIZE, SIZE, dtype=torch.bool)
        rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
        for i in range(n):
            sides = torch.randperm(2, generator=draw)
            for kind, lines in enumerate((columns % 2, rows % 2)):
                across = int(sides[kind]) * 12 + torch.randint(5, 8, (1,), generator=draw)
                down = torch.randint(6, 18, (1,), generator=draw)
                size = torch.randint(4, 6, (1,), generator=draw)
                field = (rows - down).square() + (columns - across).square() <= size**2
                is_bare = bool(torch.rand(1, generator=draw) < 0.3)
                is_new = new and kind == 0
                label = 1 + (int(torch.rand(1, generator=draw) < 0.5) if is_bare else kind)
                surface = (
                    2.0 * (columns % 2) * (rows % 2) if is_new else torch.ones(SIZE, SIZE) * 0.5 if is_bare else lines
                )
                self.x[i, 0] += torch.where(field, surface, 0.0)
                self.y[i][field] = label
                self.new[i] |= field & is_new
                self.bare[i] |= field & (is_bare and not is_new)


class Network(nn.Module):
    """A small U-Net whose output has the classes on the last axis, ``(batch, height, width, 3)``."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 12, 3, padding=1)
        self.down = nn.Conv2d(12, 24, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1)
        self.up = nn.ConvTranspose2d(24, 12, 2, stride=2)
        self.join = nn.Conv2d(24, 16, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.enter(x))
        coarse = F.relu(self.deep(F.relu(self.down(fine))))
        h = F.relu(self.join(torch.cat([fine, F.relu(self.up(self.dropout(coarse)))], 1)))
        return self.head(self.dropout(h)).movedim(1, -1)  # type: ignore[no-any-return]


def loss(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross entropy of all pixels."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


def fit_selfdoubt(data: Scenes, seed: int) -> nn.Module:
    """Train three voters, and then measure the usual features of a pixel."""
    torch.manual_seed(seed)
    wrapped = vote.Wrapper(n_voters=c.MEMBERS, output="logits", seed=seed)(Network())
    budget = c.Budget(BUDGET.steps, BUDGET.batch * c.MEMBERS, BUDGET.rate, seed=seed)
    c.train(wrapped, data.x, data.y, loss, budget)
    wrapped = density.Wrapper()(wrapped)
    density.fit(wrapped, data.x[:60].split(30))
    return wrapped


def compare(seed: int) -> tuple[list[c.Row], Scenes, Forecast]:
    """Measure all ways: mistakes per pixel, and pixels of new fields against those of others."""
    data, test, new = Scenes(150, seed), Scenes(60, seed + 1000), Scenes(60, seed + 2000, new=True)
    rows = []

    def measure(name: str, members: Tensor, doubt: Tensor, others: Tensor, seconds: float) -> None:
        row = c.measure_classes(name, members.flatten(1, -2), test.y.flatten(), doubt.flatten(), None, seconds)
        shape = test.y > 0
        numbers = {**row.numbers, "OOD": c.find_ood_auroc(doubt[shape], others[new.new])}
        numbers["seconds"] = numbers.pop("seconds")
        rows.append(c.Row(name, numbers))

    clock = c.Clock()
    with c.measure_time(clock):
        wrapped = fit_selfdoubt(data, seed)
        with torch.no_grad():
            usual, strange = wrapped.forecast(test.x), wrapped.forecast(new.x)
    for name in ("aleatoric", "epistemic", "density"):
        measure(f"vote: {name}", usual.members, getattr(usual, name), getattr(strange, name), clock.processor)

    budget = c.Budget(BUDGET.steps, BUDGET.batch, BUDGET.rate, seed=seed)
    clock = c.Clock()
    with c.measure_time(clock):
        networks = c.train_networks(Network, data.x, data.y, loss, budget)
        outputs = [c.predict_networks(networks, x) for x in (test.x, new.x)]
    measure(f"{c.MEMBERS} networks", outputs[0], *map(c.find_doubt, outputs), clock.processor)
    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        noisy = c.train(Network(dropout=0.1), data.x, data.y, loss, budget)
        outputs = [c.predict_dropout(noisy, x, 10) for x in (test.x, new.x)]
    measure("MC dropout", outputs[0], *map(c.find_doubt, outputs), clock.processor)

    # The picture: a scene of training's kind with a bare field, and one with a new field.
    bare = int(test.bare.flatten(1).any(1).nonzero()[0, 0])
    shown = Scenes(1, seed)
    shown.x, shown.y = torch.stack([test.x[bare], new.x[0]]), torch.stack([test.y[bare], new.y[0]])
    with torch.no_grad():
        return rows, shown, wrapped.forecast(shown.x)


def plot(scenes: Scenes, forecast: Forecast, options: c.Options) -> None:
    """Draw scenes, answers and the three maps."""
    assert forecast.density is not None
    answers = forecast.mean.argmax(-1)
    columns = {
        "scene": scenes.x[:, 0], "answer": answers, "aleatoric": forecast.aleatoric,
        "epistemic": forecast.epistemic, "out of distribution": forecast.density,
    }  # fmt: skip
    figure, axes = plt.subplots(2, 5, figsize=(10, 4.2))
    for row, label in enumerate(("bare: labels by a coin", "rows both ways: new")):
        for place, (title, values) in zip(axes[row], columns.items(), strict=True):
            top = 2 if title == "answer" else float(values.max())
            colours = {"scene": "gray", "answer": "viridis"}.get(title, "magma")
            place.imshow(values[row].numpy(), cmap=colours, vmin=float(values.min()), vmax=top)
            place.set_title(title if row == 0 else "", fontsize=10)
            place.set_xticks([])
            place.set_yticks([])
        axes[row, 0].set_ylabel(label, fontsize=9)
    figure.tight_layout()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "segmentation.png", dpi=75)


def main() -> None:
    """Train, compare, and draw the first seed."""
    options = c.read_options(__doc__)
    rows = []
    for seed in range(options.seeds):
        measured, scenes, forecast = compare(seed)
        rows += measured
        if seed == 0:
            plot(scenes, forecast, options)
    c.write("segmentation", rows, options, scenes=150, steps=BUDGET.steps)


if __name__ == "__main__":
    main()
