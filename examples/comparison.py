"""The other ways to doubt that the examples compare with, how all are trained and measured, and the tables.

An ensemble of networks and MC dropout are written out here. Two other libraries join with ``--peers``, where they are
installed: laplace-torch, which needs a trained network only, and torch-uncertainty's packed and batch ensembles.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from selfdoubt import metrics, risk

MEMBERS = 3
Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    out: Path
    seeds: int
    peers: bool


@dataclass(frozen=True)
class Row:
    """The numbers of one way on one seed."""

    arm: str
    numbers: Mapping[str, float]


@dataclass
class Clock:
    """Seconds that the blocks under ``measure_time`` took."""

    seconds: float = 0.0
    processor: float = 0.0  #: seconds of processor time, which other processes hardly change


@dataclass(frozen=True)
class Budget:
    """How a network is trained: by Adam, on random batches."""

    steps: int
    batch: int
    rate: float
    decay: float = 0.0
    seed: int = field(default=0)


def read_options(text: str | None = None, *, seeds: int = 1, parser: argparse.ArgumentParser | None = None) -> Options:
    """Read the command line that all examples share."""
    parser = parser or argparse.ArgumentParser(description=(text or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("examples/pictures"), help="folder of the picture and numbers")
    parser.add_argument("--seeds", type=int, default=seeds, help=f"seeds to measure, {seeds}")
    parser.add_argument("--peers", action="store_true", help="compare with laplace-torch and torch-uncertainty, too")
    read = parser.parse_args()
    if read.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {read.seeds}; try --seeds {seeds}")
    return Options(read.out, read.seeds, read.peers)


@contextmanager
def measure_time(clock: Clock) -> Iterator[None]:
    """Add the block's seconds to a clock."""
    start, busy = time.perf_counter(), time.process_time()
    yield
    clock.seconds += time.perf_counter() - start
    clock.processor += time.process_time() - busy


def train(model: nn.Module, x: Tensor, y: Tensor, loss: Loss, budget: Budget, **inputs: Any) -> nn.Module:
    """Train a network in place and return it in evaluation mode.

    Args:
        model: Any module; each step calls ``model(batch, **inputs)``.
        x: Inputs.
        y: Targets.
        loss: Function of the output and the targets of a batch.
        budget: Steps, rows per step, and settings of Adam.
        **inputs: Further inputs of each call, such as ``return_risk=True``.
    """
    draw = torch.Generator().manual_seed(budget.seed)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, budget.rate, weight_decay=budget.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, budget.rate, total_steps=budget.steps)
    model.train()
    rows = torch.empty(0, dtype=torch.long)
    for _ in range(budget.steps):
        while len(rows) < budget.batch:
            rows = torch.cat([rows, torch.randperm(len(x), generator=draw)])
        batch, rows = rows[: budget.batch], rows[budget.batch :]
        optimizer.zero_grad()
        torch.autograd.backward(loss(model(x[batch], **inputs), y[batch]))
        optimizer.step()
        schedule.step()
    return model.eval()


def train_networks(
    build: Callable[[], nn.Module], x: Tensor, y: Tensor, loss: Loss, budget: Budget, members: int = MEMBERS
) -> list[nn.Module]:
    """Train networks that share nothing, each with its own first weights and its own order of the data."""
    networks = []
    for member in range(members):
        seed = budget.seed * 1000 + member
        torch.manual_seed(seed)
        own_budget = Budget(budget.steps, budget.batch, budget.rate, budget.decay, seed)
        networks.append(train(build(), x, y, loss, own_budget))
    return networks


@torch.no_grad()
def predict_networks(networks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return each network's output, ``(members, batch, ...)``."""
    return torch.stack([network(x) for network in networks])


@torch.no_grad()
def predict_dropout(model: nn.Module, x: Tensor, passes: int) -> Tensor:
    """Return the outputs of several passes with the dropout layers left on, ``(passes, batch, ...)`` (MC dropout)."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    torch.manual_seed(0)
    outputs = torch.stack([model(x) for _ in range(passes)])
    model.eval()
    return outputs


def measure_classes(arm: str, members: Tensor, y: Tensor, doubt: Tensor, others: Tensor | None, seconds: float) -> Row:
    """Measure predictions of classes.

    Args:
        arm: Name of the way.
        members: Logits, ``(members, n, classes)``; their mean probabilities are the prediction.
        y: The right classes.
        doubt: The risk of each prediction, ``(n,)``.
        others: The risk of inputs of another kind; None where there are none.
        seconds: Seconds of processor time, of training and prediction.
    """
    logp = risk.mix(members).log_softmax(-1)
    top, chosen = logp.exp().max(-1)
    right = (chosen == y).numpy()
    numbers = {
        "accuracy": float(right.mean()),
        "NLL": float(F.nll_loss(logp, y)),
        "ECE": metrics.ece(top.numpy().clip(0, 1), right),
        "errors": find_auroc(doubt, torch.tensor(~right)),
    }
    if others is not None:
        numbers["OOD"] = find_ood_auroc(doubt, others)
    return Row(arm, {**numbers, "seconds": seconds})


def find_doubt(logits: Tensor) -> Tensor:
    """Return the members' disagreement, or one network's entropy, nats; classes are on the last axis."""
    return risk.total(logits) if len(logits) == 1 else risk.epistemic(logits)


def measure_members(arm: str, outputs: Sequence[Tensor], y: Tensor, seconds: float) -> Row:
    """Measure members' logits of usual inputs, ``(members, n, classes)``, and of others, by their disagreement."""
    doubts = [find_doubt(logits) for logits in outputs]
    return measure_classes(arm, outputs[0], y, doubts[0], doubts[1] if len(doubts) > 1 else None, seconds)


def measure_networks(
    build: Callable[[], nn.Module],
    x: Tensor,
    y: Tensor,
    inputs: Sequence[Tensor],
    test_y: Tensor,
    budget: Budget,
    members: int = MEMBERS,
) -> Row:
    """Train a plain ensemble of classifiers, and measure it on usual inputs and on others, the first and the second."""
    clock = Clock()
    with measure_time(clock):
        networks = train_networks(build, x, y, F.cross_entropy, budget, members)
        outputs = [predict_networks(networks, given) for given in inputs]
    return measure_members(f"{members} networks", outputs, test_y, clock.processor)


def measure_dropout(
    build: Callable[..., nn.Module],
    x: Tensor,
    y: Tensor,
    inputs: Sequence[Tensor],
    test_y: Tensor,
    budget: Budget,
    passes: int = 10,
) -> Row:
    """Train ``build(dropout=0.1)``, and measure MC dropout of it, as ``measure_networks`` measures an ensemble."""
    clock = Clock()
    with measure_time(clock):
        torch.manual_seed(budget.seed)
        noisy = train(build(dropout=0.1), x, y, F.cross_entropy, budget)
        outputs = [predict_dropout(noisy, given, passes) for given in inputs]
    return measure_members("MC dropout", outputs, test_y, clock.processor)


def measure_values(
    arm: str, mean: Tensor, std: Tensor, y: Tensor, doubt: Tensor, others: Tensor | None, seconds: float
) -> Row:
    """Measure predictions of values that are ``Normal(mean, std)``; ``doubt`` and ``others`` as in the classes'."""
    gap = (y - mean).abs()
    numbers = {
        "RMSE": float(gap.square().mean().sqrt()),
        "NLL": float((0.5 * (gap / std).square() + std.log() + 0.5 * math.log(2 * math.pi)).mean()),
        "in 90 %": float((gap <= 1.6449 * std).float().mean()),
    }
    if others is not None:
        numbers["OOD"] = find_ood_auroc(doubt, others)
    return Row(arm, {**numbers, "seconds": seconds})


def find_auroc(doubt: Tensor, positive: Tensor) -> float:
    """Return how well a risk ranks the positive rows above the others: 1 always, 1/2 as chance; NaN without both."""
    if positive.all() or not positive.any():
        return math.nan
    return metrics.auroc(doubt.flatten().double().numpy(), ~positive.numpy())


def find_ood_auroc(usual: Tensor, others: Tensor) -> float:
    """Return how well a risk ranks inputs of another kind above usual ones."""
    return find_auroc(torch.cat([usual, others]), torch.arange(len(usual) + len(others)) >= len(usual))


def average(rows: Sequence[Row]) -> list[Row]:
    """Return one row per arm: means over seeds, of the seeds that have the number."""
    arms = dict.fromkeys(row.arm for row in rows)
    means = []
    for arm in arms:
        same = [row.numbers for row in rows if row.arm == arm]
        table = {name: [n[name] for n in same if not math.isnan(n[name])] for name in same[0]}
        means.append(Row(arm, {name: float(np.mean(n)) if n else math.nan for name, n in table.items()}))
    return means


def write(name: str, rows: Sequence[Row], options: Options, **settings: Any) -> None:
    """Print the table of mean numbers, and write it with its settings as ``NAME.json``."""
    means = average(rows)
    print(make_table(means))
    options.out.mkdir(parents=True, exist_ok=True)
    record = {
        "settings": {"seeds": options.seeds, **settings},
        "rows": [{"arm": r.arm, **{k: _round(v) for k, v in r.numbers.items()}} for r in means],
    }
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def make_table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table; a number that a row lacks is left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row.numbers))
    cells = [["", *names], ["---", *["---:"] * len(names)]]
    for row in rows:
        shown = [_round(row.numbers.get(name, math.nan)) for name in names]
        cells.append([row.arm, *("" if v is None else f"{v:.1f}" if n == "seconds" else f"{v:.3f}"
                                 for n, v in zip(names, shown, strict=True))])  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _round(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def load_peer(name: str) -> Any:
    """Return a module of another library, or None with a message where it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        print(f"{name.partition('.')[0]} is left out: {error}")
        return None


def predict_laplace(
    model: nn.Module, x: Tensor, y: Tensor, inputs: Sequence[Tensor], *, kind: str = "classification"
) -> list[Tensor] | None:
    """Return samples of a last-layer Laplace posterior (Daxberger et al., 2021), by laplace-torch.

    Args:
        model: A trained network.
        x: Its training inputs.
        y: Its training targets.
        inputs: Inputs to predict.
        kind: "classification" or "regression".

    Returns:
        For each of ``inputs``: logits ``(20, batch, classes)``, or mean and standard deviation ``(2, batch, 1)``; None
        where laplace-torch is missing.
    """
    laplace = load_peer("laplace")
    if laplace is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = laplace.Laplace(copy.deepcopy(model), kind, subset_of_weights="last_layer", hessian_structure="full")
        fitted.fit(DataLoader(TensorDataset(x, y), batch_size=256))
        if kind == "regression":
            _fit_noise_and_prior(fitted)
        else:
            fitted.optimize_prior_precision(method="marglik")
        torch.manual_seed(0)
        outputs = []
        for given in inputs:
            if kind == "regression":
                mean, variance = fitted(given)
                outputs.append(torch.stack([mean, (variance.squeeze(-1) + fitted.sigma_noise**2).sqrt()]).detach())
            else:
                outputs.append(fitted.predictive_samples(given, n_samples=20).clamp_min(1e-12).log().detach())
        return outputs


def _fit_noise_and_prior(fitted: Any, steps: int = 200) -> None:
    """Maximise the marginal likelihood in the noise's and the prior's size, as laplace-torch's own example does."""
    prior, noise = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([prior, noise], 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (-fitted.log_marginal_likelihood(prior.exp(), noise.exp())).backward()
        optimizer.step()
    fitted.prior_precision, fitted.sigma_noise = prior.detach().exp(), noise.detach().exp()
