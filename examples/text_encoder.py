"""A transformer encoder that reads a question and says what it asks for, and where it has no idea.

The questions are those that ship with this package: about the country of a town, its time zone, a currency, ... The
encoder learns five kinds of them. Questions of all other kinds (capitals, continents) are out of distribution, and the
risk should rank them above the rest.

    python examples/text_encoder.py --peers
    python examples/text_encoder.py --data opentriviaqa.jsonl        # or other questions with a column "category"
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections import Counter
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import comparison as c
import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfdoubt import density, risk, vote

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BUDGET = c.Budget(steps=150, batch=30, rate=3e-3, decay=0.01)
CLASSES, LENGTH, WORDS = 5, 16, 2000
KNOWN, OTHERS = 4000, 1000  # texts of a large file that are read: of classes to learn, and of others


class Texts(NamedTuple):
    """Words of texts ``(n, LENGTH)``, their classes, and texts of classes that were withheld."""

    names: list[str]
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    test_texts: list[str]
    others: Tensor
    other_texts: list[str]


class Encoder(nn.Module):
    """A transformer encoder over words; its mean state names the class."""

    def __init__(self, dropout: float = 0.0, width: int = 32) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS + 2, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        h = self.norm(self.layers(h))
        used = (x != 0).unsqueeze(-1)
        return self.head((h * used).sum(1) / used.sum(1))  # type: ignore[no-any-return]


class PackedEncoder(nn.Module):
    """The same network as a packed ensemble of torch-uncertainty (Laurent et al., 2023).

    It gives logits ``(members * batch, classes)``.

    Words and places are shared; all behind them is divided among the members.
    """

    def __init__(self, layers: Any, members: int = 4, width: int = 32) -> None:
        super().__init__()
        packed = {"alpha": 2, "num_estimators": members}
        self.words, self.places = nn.Embedding(WORDS + 2, width), nn.Embedding(LENGTH, width)
        self.first = layers.PackedLinear(width, width, first=True, **packed)
        self.layer = layers.PackedTransformerEncoderLayer(
            width, 4, dim_feedforward=64, dropout=0.0, batch_first=True, norm_first=True, **packed
        )
        self.norm = layers.PackedLayerNorm(width, **packed)
        self.head = layers.PackedLinear(width, CLASSES, last=True, **packed)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.words(x) + self.places(torch.arange(x.shape[1])))
        h = self.norm(self.layer(h))
        used = (x != 0).unsqueeze(-1)
        return self.head((h * used).sum(1) / used.sum(1))  # type: ignore[no-any-return]


def read_own_questions() -> list[tuple[str, str]]:
    """Return the questions of this package, with the relation that each asks for."""
    texts = [
        (files("selfdoubt.pocket") / name).read_text(encoding="utf-8")
        for name in ("evaluation.jsonl", "reference.jsonl")
    ]
    rows = [json.loads(row) for text in texts for row in text.splitlines()]
    return [(row["question"], row["relation"]) for row in rows]


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Return questions with their categories, from a file of JSON lines."""
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(row["question"], row["category"]) for row in rows]


def split(pairs: list[tuple[str, str]], seed: int) -> Texts:
    """Split texts of the most frequent classes, and withhold those of all others; long texts lose their end.

    A word has a number: 0 is padding, 1 a word that is not among the most frequent of the training texts.
    """
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs = [pairs[i] for i in order]
    names = [name for name, _ in Counter(name for _, name in pairs).most_common(CLASSES)]
    known = [pair for pair in pairs if pair[1] in names][:KNOWN]
    train, test = known[: len(known) // 2], known[len(known) // 2 :]
    others = [pair for pair in pairs if pair[1] not in names][:OTHERS]
    counts = Counter(word for text, _ in train for word in find_words(text))
    numbers = {word: i + 2 for i, (word, _) in enumerate(counts.most_common(WORDS))}

    def encode(part: list[tuple[str, str]]) -> Tensor:
        x = torch.zeros(len(part), LENGTH, dtype=torch.long)
        for row, (text, _) in enumerate(part):
            ids = [numbers.get(word, 1) for word in find_words(text)[:LENGTH]] or [1]
            x[row, : len(ids)] = torch.tensor(ids)
        return x

    y, test_y = (torch.tensor([names.index(name) for _, name in part]) for part in (train, test))
    texts = [text for text, _ in test]
    return Texts(names, encode(train), y, encode(test), test_y, texts, encode(others), [text for text, _ in others])


def find_words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def compare(data: Texts, seed: int, *, peers: bool) -> tuple[list[c.Row], Tensor, Tensor]:
    """Measure all ways on one split; the risks of the first are returned, too."""
    budget = c.Budget(BUDGET.steps, BUDGET.batch, BUDGET.rate, BUDGET.decay, seed)
    inputs, build = (data.test_x, data.others), Encoder
    rows = []
    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        wrapped = vote.Wrapper(n_voters=c.MEMBERS, finetune=False, output="logits", seed=seed)(build())
        wide = c.Budget(BUDGET.steps, c.MEMBERS * BUDGET.batch, BUDGET.rate, BUDGET.decay, seed)
        c.train(wrapped, data.x, data.y, F.cross_entropy, wide)
        wrapped = density.Wrapper()(wrapped)
        density.fit(wrapped, [data.x])
        with torch.no_grad():
            usual, strange = (wrapped.forecast(x) for x in inputs)
    measure = partial(c.measure_classes, members=usual.members, y=data.test_y, seconds=clock.processor)
    rows += [
        measure(f"vote: {name}", doubt=getattr(usual, name), others=getattr(strange, name))
        for name in ("total", "epistemic", "density")
    ]
    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        plain = c.train(build(), data.x, data.y, F.cross_entropy, budget)
        outputs = [c.predict_networks([plain], x) for x in inputs]
    rows.append(c.measure_members("one network: entropy", outputs, data.test_y, clock.processor))
    clock = c.Clock()
    with c.measure_time(clock):
        networks = c.train_networks(build, data.x, data.y, F.cross_entropy, budget)
        outputs = [c.predict_networks(networks, x) for x in inputs]
    rows += measure_both(f"{c.MEMBERS} networks", outputs, data.test_y, clock.processor)
    clock = c.Clock()
    with c.measure_time(clock):
        torch.manual_seed(seed)
        noisy = c.train(build(dropout=0.1), data.x, data.y, F.cross_entropy, budget)
        outputs = [c.predict_dropout(noisy, x, 10) for x in inputs]
    rows += measure_both("MC dropout", outputs, data.test_y, clock.processor)
    if peers:
        rows += run_peers(plain, data, budget)
    return rows, usual.total, strange.total


def run_peers(plain: nn.Module, data: Texts, budget: c.Budget) -> list[c.Row]:
    """Measure laplace-torch's last-layer posterior of the plain network, and torch-uncertainty's packed ensemble."""
    inputs, rows = (data.test_x, data.others), []
    clock = c.Clock()
    with c.measure_time(clock):
        predicted = c.predict_laplace(plain, data.x, data.y, inputs)
    if predicted is not None:
        rows += measure_both("laplace-torch", predicted, data.test_y, clock.processor)
    layers = c.load_peer("torch_uncertainty.layers.packed")
    if layers is not None:
        torch.manual_seed(budget.seed)
        packed, clock = PackedEncoder(layers), c.Clock()
        with c.measure_time(clock):
            c.train(packed, data.x, data.y, lambda logits, y: F.cross_entropy(logits, y.repeat(4)), budget)
            outputs = [c.predict_networks([packed], x)[0].unflatten(0, (4, -1)) for x in inputs]
        rows += measure_both("torch-uncertainty, packed", outputs, data.test_y, clock.processor)
    return rows


def measure_both(name: str, outputs: list[Tensor], y: Tensor, seconds: float) -> list[c.Row]:
    """Measure members of another way by the entropy of their mean, and by their disagreement."""
    kinds = {"total": risk.total, "epistemic": risk.epistemic}
    return [
        c.measure_classes(f"{name}: {kind}", outputs[0], y, find(outputs[0]), find(outputs[1]), seconds)
        for kind, find in kinds.items()
    ]


def plot(data: Texts, usual: Tensor, strange: Tensor, path: Path) -> None:
    """Draw how the entropy is spread, and write the surest and the least sure texts next to it."""
    figure, axes = plt.subplots(figsize=(8, 3.8))
    bins = torch.linspace(0, float(torch.cat([usual, strange]).max()), 25).tolist()
    axes.hist(usual.numpy(), bins, density=True, alpha=0.6, label=f"{CLASSES} classes it has learnt")
    axes.hist(strange.numpy(), bins, density=True, alpha=0.6, label="other classes")
    axes.set_ylim(top=1.75 * axes.get_ylim()[1])  # room for the texts
    axes.set_xlabel("total uncertainty, nats")
    axes.set_yticks([])
    order = usual.argsort().tolist()
    for title, x, side, rows in (("surest:", 0.02, "left", order[:5]), ("least sure:", 0.98, "right", order[-5:])):
        texts = [textwrap.shorten(data.test_texts[i], 44, placeholder=" ...") for i in rows]
        place: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "ha": side, "fontsize": 8}
        axes.text(x, 0.97, "\n".join([title, *texts]), **place)
    axes.legend(fontsize=8, loc="upper center")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)


def main() -> None:
    """Train, compare, and draw the first seed."""
    parser = argparse.ArgumentParser(description="A transformer encoder with doubt.")
    parser.add_argument("--data", type=Path, help="JSON lines with question and category")
    options, rest = c.read_options(parser=parser, seeds=2), parser.parse_args()
    if rest.data is not None and not rest.data.is_file():
        parser.error(f"there is no file {rest.data}; leave --data out for the questions of this package")
    pairs = read_own_questions() if rest.data is None else read_questions(rest.data)
    name = "text_encoder" if rest.data is None else f"text_encoder-{rest.data.stem}"
    rows = []
    for seed in range(options.seeds):
        data = split(pairs, seed)
        measured, usual, strange = compare(data, seed, peers=options.peers)
        rows += measured
        if seed == 0:
            print(f"{len(data.x)} texts to learn, {len(data.test_x)} to test, {len(data.others)} of other classes")
            plot(data, usual, strange, options.out / f"{name}.png")
    c.write(name, rows, options, steps=BUDGET.steps, data=rest.data.name if rest.data else "pocket")


if __name__ == "__main__":
    main()
