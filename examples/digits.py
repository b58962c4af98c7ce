"""Handwritten digits, and letters that the network has never met: density, vote, sample and sculpt side by side.

A small convolutional network learns scikit-learn's digits. Each wrapper is asked for a risk of digits of other people
and of printed letters: a good one ranks mistakes and letters above digits that are read well.

    python examples/digits.py
"""

from __future__ import annotations

from functools import partial

import comparison as c
import handwriting
import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfdoubt import density, risk, sample, sculpt, vote

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUDGET = c.Budget(steps=250, batch=60, rate=3e-3)
Result = tuple[c.Row, Tensor, Tensor]


def build(dropout: float = 0.0) -> nn.Module:
    """Build a network of two convolutions and two linear layers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(512, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 10),
    )  # fmt: skip


def noisy_loss(output: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    """Return the loss of the mean probabilities over ten draws of the logits (Kendall and Gal, 2017, equation 12)."""
    logp = torch.stack([sculpt.Normal.sample(output).log_softmax(-1) for _ in range(10)])
    return F.nll_loss(logp.logsumexp(0), y)


def run_selfdoubt(data: handwriting.Digits, seed: int) -> dict[str, Result]:
    """Train with each wrapper, and measure it."""
    budget = c.Budget(BUDGET.steps, BUDGET.batch, BUDGET.rate, seed=seed)
    results = {}

    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        plain = c.train(build(), data.x, data.y, F.cross_entropy, budget)
        with_density = density.Wrapper()(plain)
        density.fit(with_density, [data.x])
        (mean, usual), (_, strange) = with_density.predict(data.test_x), with_density.predict(data.letters)
    row = c.measure_classes("density", mean[None], data.test_y, usual, strange, clock.processor)
    results["density"] = row, usual, strange

    for name, wrapper in {
        "vote": vote.Wrapper(n_voters=c.MEMBERS, output="logits"),
        "sample": sample.Wrapper(n_samples=10, output="logits"),
    }.items():
        clock = c.Clock()
        with c.measure_time(clock), torch.random.fork_rng():
            torch.manual_seed(seed)
            wrapped = c.train(wrapper(build()), data.x, data.y, F.cross_entropy, budget)
            with torch.no_grad():
                test, others = wrapped.forecast(data.test_x), wrapped.forecast(data.letters)
        row = c.measure_members(name, [test.members, others.members], data.test_y, clock.processor)
        results[name] = row, test.epistemic, others.epistemic

    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        wrapped = c.train(sculpt.Wrapper()(build()), data.x, data.y, noisy_loss, budget, return_risk=True)
        outputs = []
        for x in (data.test_x, data.letters):
            prediction = wrapped.predict(x)
            outputs.append(torch.stack([sculpt.Normal.sample(tuple(prediction)).detach() for _ in range(20)]))
    doubts = [risk.total(logits) for logits in outputs]
    row = c.measure_classes("sculpt", outputs[0], data.test_y, *doubts, clock.processor)
    results["sculpt"] = row, doubts[0], doubts[1]
    return results


def run_others(data: handwriting.Digits, seed: int, *, peers: bool) -> list[c.Row]:
    """Measure the other ways with as many members and as many steps per network."""
    budget = c.Budget(BUDGET.steps, BUDGET.batch, BUDGET.rate, seed=seed)
    inputs, rows = (data.test_x, data.letters), []
    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        plain = c.train(build(), data.x, data.y, F.cross_entropy, budget)
        outputs = [c.predict_networks([plain], x) for x in inputs]
    rows.append(c.measure_members("one network: entropy", outputs, data.test_y, clock.processor))
    rows += [way(build, data.x, data.y, inputs, data.test_y, budget) for way in (c.measure_networks, c.measure_dropout)]
    if peers:
        clock = c.Clock()
        with c.measure_time(clock):
            predicted = c.predict_laplace(plain, data.x, data.y, inputs)
        if predicted is not None:
            rows.append(c.measure_members("laplace-torch", predicted, data.test_y, clock.processor))
        rows += run_torch_uncertainty(data, budget)
    return rows


def run_torch_uncertainty(data: handwriting.Digits, budget: c.Budget) -> list[c.Row]:
    """Measure torch-uncertainty's packed ensemble of the same width (Laurent et al., 2023)."""
    layers = c.load_peer("torch_uncertainty.layers.packed")
    if layers is None:
        return []
    linear = partial(layers.PackedLinear, alpha=2, num_estimators=4)
    conv = partial(layers.PackedConv2d, alpha=2, num_estimators=4, padding=1)
    torch.manual_seed(budget.seed)
    packed = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), conv(1, 16, kernel_size=3, first=True), nn.ReLU(),
        conv(16, 32, kernel_size=3, stride=2), nn.ReLU(), nn.Flatten(), linear(512, 64), nn.ReLU(),
        linear(64, 10, last=True),
    )  # fmt: skip
    clock = c.Clock()
    with c.measure_time(clock), torch.no_grad():
        with torch.enable_grad():
            c.train(packed, data.x, data.y, lambda logits, y: F.cross_entropy(logits, y.repeat(4)), budget)
        outputs = [packed(x).unflatten(0, (4, -1)) for x in (data.test_x, data.letters)]
    return [c.measure_members("torch-uncertainty, packed", outputs, data.test_y, clock.processor)]


def plot(results: dict[str, Result], data: handwriting.Digits, options: c.Options) -> None:
    """Draw how each risk is spread over digits and letters, and the images that it doubts most and least."""
    figure, axes = plt.subplots(2, 4, figsize=(11, 4.6), height_ratios=(1.1, 1))
    x = torch.cat([data.test_x, data.letters])
    for (name, (row, usual, strange)), above, below in zip(results.items(), *axes, strict=True):
        share = torch.cat([usual, strange]).argsort().argsort() / (len(usual) + len(strange))
        bins = torch.linspace(0, 1, 25).tolist()
        above.hist(share[: len(usual)].numpy(), bins, density=True, alpha=0.6, label="digits")
        above.hist(share[len(usual) :].numpy(), bins, density=True, alpha=0.6, label="letters")
        above.set_title(f"{name}: AUROC {row.numbers['OOD']:.2f}", fontsize=10)
        above.set_xlabel("rank of the risk", fontsize=8)
        above.set_yticks([])
        order = share.argsort()
        pictures = torch.cat([order[:6], order[-6:]])
        tiles = x[pictures].view(2, 6, 8, 8)
        padded = F.pad(tiles, (1, 1, 1, 1))
        below.imshow(padded.transpose(1, 2).reshape(20, 60).numpy(), cmap="gray_r")
        below.set_title("least and most risk", fontsize=8)
        below.axis("off")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    options.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out / "digits.png", dpi=75)


def main() -> None:
    """Train, compare, and draw the first seed."""
    options = c.read_options(__doc__, seeds=2)
    rows = []
    for seed in range(options.seeds):
        data = handwriting.read_digits(seed)
        results = run_selfdoubt(data, seed)
        rows += [row for row, _, _ in results.values()] + run_others(data, seed, peers=options.peers)
        if seed == 0:
            plot(results, data, options)
    c.write("digits", rows, options, training=600, test=1197, letters=600, steps=BUDGET.steps)


if __name__ == "__main__":
    main()
