"""Ways to predict digits with doubt, which ``vision`` compares: each is trained from nothing, and then predicts.

``plain`` is one network and ``separate`` are M of them; ``separate-short`` shares the steps of one network among M.
``vote`` is our wrapper without arguments around a fresh network, whose voters read a batch each, as every network of
``separate`` does; ``vote-split`` divides the batch of ``plain`` among them, and ``vote-fresh`` has voters that share no
weights (``finetune=False``). ``sample`` trains with ``Bernoulli(0.1)``, ``sample-default`` as without arguments, and
``dropout`` with torch's dropout. ``+`` means a wrapper around a trained network, without a further step. ``packed`` and
``batch`` are torch-uncertainty's ensembles.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.comparison import Budget, Clock, measure_time, predict_dropout, predict_networks, train
from examples.handwriting import Digits
from selfdoubt import density, risk, sample, sculpt, vote
from selfdoubt.forecast import Forecast

OURS = (
    "vote", "vote-split", "vote-fresh", "sample", "sample-default", "sculpt", "plain+vote", "plain+sample",
    "plain+density", "sample+density",
)  # fmt: skip
OTHERS = ("plain", "separate", "separate-short", "dropout")
PEERS = ("packed", "batch")
ARMS = (*OTHERS, *OURS, *PEERS)
Build = Callable[..., nn.Module]


class Outcome(NamedTuple):
    """Predictions of the digits and the risks of digits and letters, with their seconds."""

    members: Tensor  #: logits ``(members, n, 10)``; their mean probabilities answer
    doubt: Tensor
    strange: Tensor
    training: Clock
    prediction: Clock


class Attention(nn.Module):
    """A transformer block over the rows of an image, normalised before each part."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        fed: Tensor = self.down(F.gelu(self.up(self.between(x))))
        return x + fed


class Encoder(nn.Module):
    """A transformer encoder that reads an image row by row."""

    def __init__(self, dropout: float = 0.0, width: int = 48) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(8, width), nn.Embedding(8, width)
        self.blocks = nn.Sequential(*(Attention(width, 4) for _ in range(2)))
        self.norm, self.dropout, self.head = nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, 8, 8)
        places = torch.arange(8, device=x.device).expand(len(rows), 8)
        h = self.blocks(self.embed(rows) + self.places(places))
        logits: Tensor = self.head(self.dropout(self.norm(h).mean(1)))
        return logits


def build_mlp(dropout: float = 0.0, linear: Callable[..., nn.Module] = nn.Linear, **_: Any) -> nn.Module:
    """Build a network of three linear layers; ``linear`` makes each, the first and the last by name."""
    return nn.Sequential(
        linear(64, 120, **_mark(linear, "first")), nn.ReLU(), *_drop(dropout),
        linear(120, 120), nn.ReLU(), *_drop(dropout), linear(120, 10, **_mark(linear, "last")),
    )  # fmt: skip


def build_cnn(
    dropout: float = 0.0,
    linear: Callable[..., nn.Module] = nn.Linear,
    conv: Callable[..., nn.Module] = nn.Conv2d,
) -> nn.Module:
    """Build a network of three convolutions and two linear layers."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        conv(1, 24, kernel_size=3, padding=1, **_mark(conv, "first")), nn.ReLU(),
        conv(24, 48, kernel_size=3, stride=2, padding=1), nn.ReLU(),
        conv(48, 48, kernel_size=3, padding=1), nn.ReLU(), nn.Flatten(), *_drop(dropout),
        linear(768, 66), nn.ReLU(), *_drop(dropout), linear(66, 10, **_mark(linear, "last")),
    )  # fmt: skip


MODELS: dict[str, Build] = {"mlp": build_mlp, "cnn": build_cnn, "encoder": Encoder}


def _mark(layer: Any, place: str) -> dict[str, bool]:
    """Return the argument that says a packed layer's place; other layers take none."""
    return {place: True} if "Packed" in getattr(layer, "func", layer).__name__ else {}


def _drop(p: float) -> list[nn.Module]:
    return [nn.Dropout(p)] if p else []


def run_arm(arm: str, model: str, data: Digits, budget: Budget, members: int, peers: Any = None) -> Outcome:
    """Train and predict once.

    Args:
        arm: One of ``ARMS``.
        model: One of ``MODELS``.
        data: Digits and letters.
        budget: Steps, and rows per step of one network.
        members: Number of networks, voters or passes.
        peers: A namespace with torch-uncertainty's layers, for ``PEERS``.
    """
    build, torch_seed = MODELS[model], budget.seed * 1000
    torch.manual_seed(torch_seed)
    spent, clock = Clock(), Clock()
    wide = Budget(budget.steps, budget.batch * members, budget.rate, budget.decay, budget.seed)
    inputs = (data.test_x, data.letters)
    if arm in OTHERS:
        with measure_time(spent):
            networks = _train_others(arm, build, data, budget, members)
        with measure_time(clock):
            outputs = [
                predict_dropout(networks[0], x, members) if arm == "dropout" else predict_networks(networks, x)
                for x in inputs
            ]
        doubts = [risk.total(y) if len(y) == 1 else risk.epistemic(y) for y in outputs]
    elif arm in PEERS:
        layers = peers.packed(members) if arm == "packed" else peers.batch(members)
        network = build(**layers)
        with measure_time(spent):
            if arm == "packed":
                train(network, data.x, data.y, partial(_repeated_loss, members), budget)
            else:
                train(network, data.x, data.y, F.cross_entropy, wide)
        with measure_time(clock), torch.no_grad():
            repeated = [x if arm == "packed" else x.repeat(members, 1) for x in inputs]
            outputs = [network(x).unflatten(0, (members, -1)) for x in repeated]
        doubts = [risk.epistemic(y) for y in outputs]
    else:
        with measure_time(spent):
            wrapped = _train_ours(arm, build, data, budget, wide, members)
        with measure_time(clock), torch.no_grad():
            forecasts = [wrapped.forecast(x) for x in inputs]
            outputs = [_choose_members(arm, f) for f in forecasts]
        doubts = [_choose_risk(arm, f, y) for f, y in zip(forecasts, outputs, strict=True)]
    return Outcome(outputs[0], doubts[0], doubts[1], spent, clock)


def _train_others(arm: str, build: Build, data: Digits, budget: Budget, members: int) -> list[nn.Module]:
    count = members if arm.startswith("separate") else 1
    steps = budget.steps // members if arm == "separate-short" else budget.steps
    networks = []
    for member in range(count):
        seed = budget.seed * 1000 + member
        torch.manual_seed(seed)
        network = build(dropout=0.1 if arm == "dropout" else 0.0)
        short = Budget(steps, budget.batch, budget.rate, budget.decay, seed)
        networks.append(train(network, data.x, data.y, F.cross_entropy, short))
    return networks


def _train_ours(arm: str, build: Build, data: Digits, budget: Budget, wide: Budget, members: int) -> Any:
    name, kinds = arm.rpartition("+")[2], dict[str, Any](output="logits")
    wrappers: dict[str, Any] = {
        "vote": vote.Wrapper(n_voters=members, **kinds),
        "vote-split": vote.Wrapper(n_voters=members, **kinds),
        "vote-fresh": vote.Wrapper(n_voters=members, finetune=False, **kinds),
        "sample": sample.Wrapper(n_samples=members, distribution=sample.Bernoulli(0.1), **kinds),
        "sample-default": sample.Wrapper(n_samples=members, **kinds),
        "sculpt": sculpt.Wrapper(),
        "density": density.Wrapper(),
    }
    wrapper, network = wrappers[name], build()
    if "+" in arm:
        inside = wrappers["sample-default"](network) if arm.startswith("sample+") else network
        train(inside, data.x, data.y, F.cross_entropy, budget)
        wrapped = wrapper(inside)
        if name == "density":
            density.fit(wrapped, torch.split(data.x, 200))
        return wrapped
    wrapped = wrapper(network)
    if arm == "sculpt":
        train(wrapped, data.x, data.y, _noisy_loss, budget, return_risk=True)
    else:
        train(wrapped, data.x, data.y, F.cross_entropy, wide if arm in ("vote", "vote-fresh") else budget)
    return wrapped


def _choose_members(arm: str, forecast: Forecast, draws: int = 20) -> Tensor:
    """Return the logits whose mean probabilities answer: the voters', the base's, or draws of a sculpt."""
    if arm == "sculpt":
        assert forecast.scale is not None
        return torch.stack([sculpt.Normal.sample((forecast.mean, forecast.scale)) for _ in range(draws)])
    return forecast.members if forecast.base is None else forecast.base[None]


def _choose_risk(arm: str, forecast: Forecast, logits: Tensor) -> Tensor:
    """Return the risk of a prediction: disagreement, the distance, or the entropy under a sculpt's noise."""
    if arm.endswith("density"):
        assert forecast.density is not None
        return forecast.density
    return risk.total(logits) if arm == "sculpt" else risk.epistemic(forecast.members)


def _noisy_loss(output: tuple[Tensor, Tensor], y: Tensor, draws: int = 10) -> Tensor:
    """Return the loss of mean probabilities over draws of the logits (Kendall and Gal, 2017, equation 12)."""
    logp = torch.stack([sculpt.Normal.sample(output).log_softmax(-1) for _ in range(draws)])
    return F.nll_loss(logp.logsumexp(0), y)


def _repeated_loss(members: int, logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y.repeat(members))
