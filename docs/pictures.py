"""Draws the pictures of the documentation: ``python docs/pictures.py`` writes ``docs/pictures``.

With names, only those. Needs the extra ``docs``. Every number in them is computed here, by the library, on the CPU in
about a minute.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

import selfdoubt
from selfdoubt import density, metrics, sample, sculpt, vote
from selfdoubt.eval import EvaluationConfig

FOLDER = Path(__file__).parent / "pictures"
INK, GREY, BLUE, ORANGE, RED, GREEN = "#222222", "#8a8a8a", "#1f6fb2", "#e69f00", "#d55e00", "#009e73"
#: Rooms of the library in the picture of its architecture: name, content, x, y, width. Arrows are below.
ROOMS: dict[str, tuple[str, float, float, float]] = {
    "cli": ("one file per command", 3.5, 6, 3.0),
    "workflow": ("evaluate, calibrate", 0.2, 5, 2.6),
    "train": ("config, loss, fit, publish", 3.1, 5, 2.7),
    "serve": ("engine, OpenAI, HTTP, Ray, chat", 6.1, 5, 3.7),
    "calibration": ("p_correct, threshold", 0.2, 4, 2.5),
    "report": ("JSON, page, pictures", 2.9, 4, 2.3),
    "eval": ("ask, judge, store a run", 5.4, 4, 2.3),
    "preparation": ("prepare", 7.9, 4, 1.9),
    "metrics": ("functions of arrays", 0.2, 3, 2.0),
    "interpret": ("risk → decisions", 2.4, 3, 1.7),
    "data": ("files, hub sets → records", 4.3, 3, 2.4),
    "lm": ("load, text, decode, score, adapters", 6.9, 3, 2.9),
    "vote, sample, sculpt, density": ("a wrapper a file", 0.2, 1.75, 3.4),
    "members": ("rows, Wrapped, kernels, targets", 3.8, 1.75, 2.9),
    "risk": ("entropies, Forecast", 6.9, 1.75, 1.5),
    "storage": ("save, load", 8.6, 1.75, 1.2),
}  # fmt: skip
ARROWS = {
    "cli": ("workflow", "train", "serve"),
    "workflow": ("calibration", "report", "eval"),
    "calibration": ("metrics",),
    "report": ("metrics",),
    "eval": ("data", "lm"),
    "train": ("data", "lm"),
    "serve": ("lm",),
    "preparation": ("lm",),
}


@contextmanager
def picture(name: str, columns: int = 1, size: tuple[float, float] = (6.4, 3.4)) -> Iterator[Any]:
    """Open axes, and write them as ``NAME.svg``."""
    settings = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9.5,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.hashsalt": "selfdoubt",
        "svg.fonttype": "path",
    }
    with mpl.rc_context(settings):
        figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained")
        yield axes
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, facecolor="white")
        plt.close(figure)


def make_gap(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return inputs on both sides of a gap, and targets whose noise grows from left to right."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat(
        [torch.rand(400, 1, generator=generator) * 1.5 - 2.5, torch.rand(400, 1, generator=generator) * 1.5 + 1]
    )
    return x, truth(x) + noise(x) * torch.randn(x.shape, generator=generator)


def truth(x: Tensor) -> Tensor:
    """Return the mean of the target."""
    return torch.sin(1.5 * x) + 0.3 * x


def noise(x: Tensor) -> Tensor:
    """Return the standard deviation of the target."""
    return 0.05 + 0.25 * torch.sigmoid(2 * x)


def build(width: int = 64, seed: int = 1) -> nn.Sequential:
    """Return a small network."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))


def train(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], steps: int = 600, lr: float = 1e-2) -> None:
    """Train a model on ``make_gap`` in shuffled batches of 64, and leave it in evaluation mode."""
    x, y = make_gap()
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    torch.manual_seed(3)
    model.train()
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=generator)[:64]
        optimizer.zero_grad()
        loss(x[rows], y[rows]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def draw_fit(axes: Any, mean: Tensor, std: Tensor, members: Tensor | None, colour: str = BLUE) -> None:
    """Draw data, the truth, members, and a band of two standard deviations."""
    x, y = make_gap()
    grid = make_grid()
    axes.axvspan(-1, 1, color="#f3f3f3", lw=0)
    axes.plot(x[::4], y[::4], ".", color=GREY, ms=3, alpha=0.6, label="data")
    axes.plot(grid, truth(grid), "--", color=INK, lw=1, label="truth")
    low, high = (mean - 2 * std).squeeze(), (mean + 2 * std).squeeze()
    axes.fill_between(grid.squeeze(), low, high, color=colour, alpha=0.2, lw=0, label="mean ± 2 risk")
    for member in members if members is not None else ():
        axes.plot(grid, member, color=colour, lw=0.6, alpha=0.7)
    axes.plot(grid, mean, color=colour, lw=1.8)
    axes.set(xlim=(-3.5, 3.5), ylim=(-3, 3), xlabel="x")
    axes.text(0, -2.8, "no data", ha="center", color=GREY, fontsize=8)


def make_grid() -> Tensor:
    """Return inputs to draw at."""
    return torch.linspace(-3.5, 3.5, 281)[:, None]


def draw_vote() -> None:
    """Voters that are trained on shares of each batch: they agree on the data and part in the gap."""
    wrapped = vote.Wrapper(n_voters=8, finetune=False)(build())
    train(wrapped, lambda x, y: (wrapped(x, training=True) - y).square().mean(), steps=1500)
    with torch.no_grad():
        forecast = wrapped.forecast(make_grid())
    with picture("vote") as axes:
        draw_fit(axes, forecast.mean, forecast.std, forecast.members)
        axes.set_title("vote: eight voters, each of which reads an eighth of every batch")
        axes.legend(loc="upper left")


def draw_sample() -> None:
    """A network that was trained with dropout, sampled."""
    wrapped = sample.Wrapper(n_samples=20, param_filter=r"[24]\.weight", distribution=sample.Bernoulli(0.1))(build())
    train(wrapped, lambda x, y: (wrapped(x, training=True) - y).square().mean(), steps=1500)
    with torch.no_grad():
        forecast = wrapped.forecast(make_grid())
    with picture("sample") as axes:
        draw_fit(axes, forecast.mean, forecast.std, forecast.members, GREEN)
        axes.set_title("sample: twenty thinned networks of one that was trained with dropout of 0.1")
        axes.legend(loc="upper left")


def draw_sculpt() -> None:
    """A predicted spread, next to the known noise of the data."""
    wrapped = sculpt.Wrapper()(build())
    train(wrapped, lambda x, y: sculpt.Normal.nll(wrapped(x, return_risk=True), y).mean(), steps=800, lr=5e-3)
    grid = make_grid()
    with torch.no_grad():
        y, scale = wrapped(grid, return_risk=True)
    with picture("sculpt", 2, (8.2, 3.4)) as (left, right):
        draw_fit(left, y, scale, None, ORANGE)
        left.set_title("sculpt: the band follows the noise")
        left.legend(loc="upper left")
        right.axvspan(-1, 1, color="#f3f3f3", lw=0)
        right.plot(grid, noise(grid), "--", color=INK, lw=1, label="true noise")
        right.plot(grid, scale, color=ORANGE, label="predicted scale")
        right.set(xlim=(-3.5, 3.5), ylim=(0, 0.6), xlabel="x", title="its standard deviation")
        right.legend(loc="upper left")


def draw_both() -> None:
    """A sculpt inside voters: total, aleatoric and epistemic standard deviations."""
    wrapped = vote.Wrapper(n_voters=8, finetune=False)(sculpt.Wrapper()(build()))

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return sculpt.Normal.nll(wrapped(x, return_risk=True, training=True), y).mean()

    train(wrapped, loss, steps=2500)
    grid = make_grid()
    with torch.no_grad():
        forecast = wrapped.forecast(grid)
    with picture("both", 2, (8.2, 3.4)) as (left, right):
        draw_fit(left, forecast.mean, forecast.total, None)
        left.set_title("vote(sculpt(model)): the total")
        left.legend(loc="upper left")
        right.axvspan(-1, 1, color="#f3f3f3", lw=0)
        right.plot(grid, noise(grid), "--", color=INK, lw=1, label="true noise")
        right.plot(grid, forecast.total, color=BLUE, lw=1.8, label="total")
        right.plot(grid, forecast.aleatoric, color=ORANGE, label="aleatoric")
        right.plot(grid, forecast.epistemic, color=RED, label="epistemic")
        right.set(xlim=(-3.5, 3.5), ylim=(0, 1.2), xlabel="x", title="its parts")
        right.legend(loc="upper center")


def make_moons(rows: int = 400) -> tuple[Tensor, Tensor]:
    """Return two half-moons and their classes."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(rows, generator=generator) * torch.pi
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    label = torch.rand(rows, generator=generator) < 0.5
    x = torch.where(label[:, None], lower, upper) + 0.1 * torch.randn(rows, 2, generator=generator)
    return x, label.long()


def draw_density() -> None:
    """Distances of a classifier's features, over the plane."""
    x, label = make_moons()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    wrapped = density.Wrapper()(model.eval())
    density.fit(wrapped, [x])
    side = torch.linspace(-3, 4, 71), torch.linspace(-3, 3.5, 66)
    plane = torch.cartesian_prod(*side)
    with torch.no_grad():
        y, distance = wrapped(plane, return_risk=True)
    entropy = torch.distributions.Categorical(logits=y).entropy()
    titles = ("entropy of the classes: sure almost everywhere", "density: far from the data means far")
    with picture("density", 2, (8.2, 3.6)) as both:
        for axes, values, title in zip(both, (entropy, distance), titles, strict=True):
            shape = (len(side[0]), len(side[1]))
            axes.contourf(*side, values.reshape(shape).T, levels=9, cmap="Blues")
            for kind, colour in ((0, ORANGE), (1, RED)):
                axes.plot(*x[label == kind].T, ".", ms=3, color=colour)
            axes.set(title=title, xticks=[], yticks=[])


def draw_members() -> None:
    """Members are rows of one batch."""
    with picture("members", size=(7.4, 2.6)) as axes:
        colours = (BLUE, ORANGE, RED)
        for member, colour in enumerate(colours):
            for row in range(2):
                y = 2 - member * 0.9 - row * 0.38
                axes.add_patch(FancyBboxPatch((1.9, y), 1.1, 0.3, "round,pad=0.02", fc=colour, ec="none", alpha=0.25))
                axes.text(2.45, y + 0.14, f"x{row + 1}", ha="center", va="center", fontsize=9)
                axes.add_patch(FancyBboxPatch((6.4, y), 1.1, 0.3, "round,pad=0.02", fc=colour, ec="none", alpha=0.25))
                axes.text(6.95, y + 0.14, f"y{row + 1}", ha="center", va="center", fontsize=9)
            axes.text(1.75, 2 - member * 0.9 - 0.06, f"member {member + 1}", ha="right", va="center", color=colour)
            axes.annotate(
                "", (3.55, 1.06), (3.1, 2 - member * 0.9 - 0.06), arrowprops={"arrowstyle": "-", "color": GREY}
            )
            axes.annotate(
                "", (6.3, 2 - member * 0.9 - 0.06), (5.85, 1.06), arrowprops={"arrowstyle": "-", "color": GREY}
            )
        axes.add_patch(FancyBboxPatch((3.6, 0.15), 2.2, 1.9, "round,pad=0.05", fc="#f5f5f5", ec=GREY))
        axes.text(4.7, 1.5, "one model,\nfrozen weights read once", ha="center", va="center")
        axes.text(4.7, 0.6, "+ a small change\nper member", ha="center", va="center", color=BLUE)
        axes.text(7.75, 1.5, "mean: the prediction", va="center")
        axes.text(7.75, 0.7, "spread: the risk", va="center", color=RED)
        axes.set(xlim=(0.4, 9.9), ylim=(-0.4, 2.5))
        axes.axis("off")


def draw_answers() -> None:
    """Percentile, p_correct, and abstaining, on answers of the pocket model to its own questions."""
    lm = selfdoubt.RiskAwareLM.load("pocket")
    with tempfile.TemporaryDirectory() as folder:
        config = EvaluationConfig(max_tokens=16)
        run = selfdoubt.evaluate(lm, "pocket", f"{folder}/run", limit=800, config=config, states="none", draws=10)
        learnt = selfdoubt.calibrate(
            run, out=f"{folder}/adapter", target_accuracy=0.85, candidates=["question"], draws=0
        )
    correct = np.array([bool(r.correct) for r in run.records])
    risk = np.array([r.scores["sum_nll"] for r in run.records])
    p = np.array([np.nan if value is None else value for value in learnt.quality.out_of_fold])
    known = ~np.isnan(p)
    draw_percentile(np.array(lm.reference["sum_nll"]), float(np.median(risk[~correct])))
    draw_p_correct(p[known], correct[known])
    draw_abstain(p[known], correct[known], learnt)


def draw_percentile(reference: np.ndarray, risk: float) -> None:
    """A risk, and its rank among those of reference answers."""
    share = float((reference < risk).mean())
    with picture("percentile") as axes:
        axes.plot(reference, np.linspace(0, 1, len(reference)), color=BLUE)
        axes.plot([risk, risk, 0], [0, share, share], "--", color=RED, lw=1)
        axes.plot(risk, share, "o", color=RED)
        text = f"an answer of risk {risk:.1f}:\nriskier than {share:.0%} of the reference answers"
        axes.annotate(text, (risk, share), (risk + 0.3, share - 0.17), color=RED)
        axes.set(
            xlim=(0, float(reference[-2])),
            ylim=(0, 1.02),
            xlabel="risk of an answer (here its surprisal sum_nll), nats",
        )
        axes.set_ylabel("share of reference answers\nwith a lower risk")
        axes.set_title("percentile: the rank of a risk")


def draw_p_correct(p: np.ndarray, correct: np.ndarray) -> None:
    """Answers of about equal p_correct, and how many of them are right."""
    table = metrics.reliability(p, correct, bins=8)
    filled = table.answers > 0
    with picture("p_correct") as axes:
        axes.plot([0, 1], [0, 1], "--", color=GREY, lw=1, label="what the number promises")
        axes.bar(
            table.confidence[filled],
            table.accuracy[filled],
            width=0.07,
            color=BLUE,
            alpha=0.75,
            label="share that is right",
        )
        for x, y, n in zip(table.confidence[filled], table.accuracy[filled], table.answers[filled], strict=True):
            axes.text(x, y + 0.02, str(n), ha="center", fontsize=7.5, color=GREY)
        axes.set(xlim=(0, 1), ylim=(0, 1.12), xlabel="p_correct, by heads that had not seen the answer", ylabel="right")
        axes.set_title(f"p_correct: a probability, checked on {len(p)} answers (numbers: answers per bar)")
        axes.legend(loc="upper left")


def draw_abstain(p: np.ndarray, correct: np.ndarray, learnt: selfdoubt.workflow.CalibrationResult) -> None:
    """Accuracy against coverage, and the threshold of the guarantee."""
    curve = metrics.accuracy_coverage(1 - p, correct)
    promise = learnt.quality.promise
    assert promise is not None
    with picture("abstain") as axes:
        axes.plot(curve.coverage, curve.accuracy, color=BLUE)
        answered = p >= promise.threshold
        coverage, accuracy = answered.mean(), correct[answered].mean()
        axes.axhline(promise.target_accuracy, color=GREY, lw=1, ls="--")
        axes.text(0.01, promise.target_accuracy - 0.035, f"asked for: {promise.target_accuracy:.0%}", color=GREY)
        axes.plot(coverage, accuracy, "o", color=RED)
        text = (
            f"shown where p_correct >= {promise.threshold:.2f}:\n{coverage:.0%} answered, {accuracy:.0%} of these right"
        )
        axes.annotate(text, (coverage, accuracy), (coverage - 0.3, accuracy - 0.22), color=RED)
        axes.set(
            xlim=(0, 1),
            ylim=(float(curve.accuracy[-1]) - 0.05, 1.01),
            xlabel="coverage: share of questions answered, the surest first",
        )
        axes.set_ylabel("accuracy of these")
        axes.set_title("abstain: answer less, and be right more often")


def draw_architecture() -> None:
    """Rooms of the library, and arrows from each to what it uses."""
    with picture("architecture", size=(9.4, 6.2)) as axes:
        axes.add_patch(FancyBboxPatch((0.05, 1.6), 9.9, 1.0, "round,pad=0.02", fc="#eef4fa", ec=BLUE, lw=1))
        axes.text(9.9, 2.68, "core: torch only", ha="right", color=BLUE, fontsize=8.5)
        for name, (content, x, y, width) in ROOMS.items():
            axes.add_patch(FancyBboxPatch((x, y), width, 0.62, "round,pad=0.02", fc="white", ec=GREY, lw=1, zorder=2))
            axes.text(x + width / 2, y + 0.42, name, ha="center", va="center", weight="bold", fontsize=9, zorder=3)
            axes.text(
                x + width / 2, y + 0.18, content, ha="center", va="center", color="#555555", fontsize=7.5, zorder=3
            )
        for user, used in ((user, used) for user, rooms in ARROWS.items() for used in rooms):
            _, x, y, width = ROOMS[user]
            _, to_x, to_y, to_width = ROOMS[used]
            start, end = x + width / 2, to_x + to_width / 2
            style = {"arrowstyle": "->", "color": GREY, "lw": 1, "shrinkA": 0, "shrinkB": 0}
            axes.annotate(
                "",
                (0.25 * start + 0.75 * end, to_y + 0.65),
                (0.75 * start + 0.25 * end, y - 0.03),
                arrowprops=style,
                zorder=1,
            )
        for x in (3.25, 8.35):  # interpret and lm use the core
            axes.annotate("", (x, 2.63), (x, 2.97), arrowprops={"arrowstyle": "->", "color": BLUE, "lw": 1.4})
        axes.text(
            5,
            1.15,
            "the seam: one tensor of logits, (members, batch, ..., classes)",
            ha="center",
            color=INK,
            fontsize=9,
            style="italic",
        )
        axes.set(xlim=(0, 10), ylim=(1, 6.75))
        axes.axis("off")


PICTURES: dict[str, Callable[[], None]] = {
    "members": draw_members,
    "answers": draw_answers,
    "vote": draw_vote,
    "sample": draw_sample,
    "sculpt": draw_sculpt,
    "both": draw_both,
    "density": draw_density,
    "architecture": draw_architecture,
}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for chosen in sys.argv[1:] or PICTURES:
        PICTURES[chosen]()
