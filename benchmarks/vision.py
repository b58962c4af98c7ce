"""Doubt of small vision models: quality and time of our wrappers next to ensembles, dropout and torch-uncertainty.

Handwritten digits are learnt, digits of the same people are tested, and printed letters are out of distribution. All
ways have as many members. A seed draws the split, the letters and the first weights; within a seed the arms take turns,
so that differences to separate networks are paired. Times are of the processor, since other work may run next to it.

    python -m benchmarks.vision
    python -m benchmarks.vision --models mlp --seeds 2      # goes on with the rows that are missing
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import results
from benchmarks.seeds import compare_arms
from benchmarks.vision_arms import ARMS, MODELS, PEERS, Outcome, run_arm
from examples.comparison import Budget, load_peer, measure_classes
from examples.handwriting import read_digits

KEYS = ("model", "arm", "seed")
BASELINE = "separate"
ABOUT = {
    "plain": "one network: entropy",
    "separate": "{M} networks",
    "separate-short": "{M} networks, steps of one in all",
    "dropout": "MC dropout, {M} passes",
    "vote": "vote: a batch for each voter",
    "vote-split": "vote: one batch, split",
    "vote-fresh": "vote, finetune=False: a batch for each voter",
    "sample": "sample, dropout, {M} samples",
    "sample-default": "sample, default noise, {M} samples",
    "sculpt": "sculpt: entropy",
    "plain+vote": "vote around the trained network, no step",
    "plain+sample": "sample, dropout, around the trained network, no step",
    "plain+density": "density of the trained network",
    "sample+density": "sample, default noise; density of the trained network",
    "packed": "torch-uncertainty, packed ensemble",
    "batch": "torch-uncertainty, batch ensemble",
}


def load_layers() -> Any:
    """Return makers of torch-uncertainty's layers; None where it is missing."""
    packed = load_peer("torch_uncertainty.layers.packed")
    batch = load_peer("torch_uncertainty.layers.batch_ensemble")
    if packed is None or batch is None:
        return None
    return SimpleNamespace(
        packed=lambda m: {
            "linear": partial(packed.PackedLinear, alpha=2, num_estimators=m),
            "conv": partial(packed.PackedConv2d, alpha=2, num_estimators=m),
        },
        batch=lambda m: {
            "linear": partial(batch.BatchLinear, num_estimators=m),
            "conv": partial(batch.BatchConv2d, num_estimators=m),
        },
    )


def measure(arm: str, model: str, outcome: Outcome, seed: int, labels: Any) -> results.Row:
    """Return the row of one arm, model and seed."""
    spent = outcome.training.processor + outcome.prediction.processor
    numbers = measure_classes(arm, outcome.members, labels, outcome.doubt, outcome.strange, spent).numbers
    rounded = {name: None if math.isnan(value) else round(value, 4) for name, value in numbers.items()}
    return {
        "model": model, "arm": arm, "seed": seed, **rounded,
        "training": round(outcome.training.processor, 3), "prediction": round(outcome.prediction.processor, 3),
        "wall": round(outcome.training.seconds + outcome.prediction.seconds, 3),
    }  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """Return the rows of one device as Markdown: means over seeds, and differences to separate networks."""
    rows, settings = record["rows"], record["settings"]
    shown = []
    for model in dict.fromkeys(row["model"] for row in rows):
        times = {r["seed"]: r["seconds"] for r in rows if (r["model"], r["arm"]) == (model, BASELINE)}
        for arm in (a for a in ABOUT if any((r["model"], r["arm"]) == (model, a) for r in rows)):
            mine = [r for r in rows if (r["model"], r["arm"]) == (model, arm)]
            cells = [f"{model}: {ABOUT[arm].format(M=settings['members'])}"]
            for name in ("accuracy", "NLL", "ECE", "errors", "OOD"):
                values = [r[name] for r in mine if r[name] is not None]
                cells.append(f"{statistics.mean(values):.3f}" if values else "")
            for name in ("NLL", "OOD"):
                gap = compare_arms(rows, arm, BASELINE, name, model=model) if arm != BASELINE else None
                cells.append("" if gap is None else f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})")
            ratios = [r["seconds"] / times[r["seed"]] for r in mine if r["seed"] in times]
            cells += [
                f"{statistics.median(r['seconds'] for r in mine):.2f}",
                f"{statistics.median(ratios):.2f}x" if ratios else "",
            ]
            shown.append(cells)
    head = [
        "model: arm", "accuracy", "NLL", "ECE", "AUROC of errors", "AUROC of letters", "NLL to networks",
        "letters to networks", "seconds", "to networks",
    ]  # fmt: skip
    about = (
        f"{record['device']}; {settings['members']} members, {settings['training']} digits to learn, "
        f"{settings['steps']} steps of {settings['batch']} rows per network, means over "
        f"{len({r['seed'] for r in rows})} seeds, 95 % intervals of paired differences, medians of seconds (training "
        f"and prediction, processor time); commit {record['commit']}, torch {record['versions']['torch']}."
    )
    return results.markdown(head, shown) + "\n\n" + about


def run(
    models: list[str], arms: list[str], seeds: int, settings: dict[str, int], *, folder: Path | None, again: bool
) -> results.RowFile:
    """Measure the rows that are missing."""
    file = results.RowFile("vision", KEYS, folder, again=again, **settings)
    peers = load_layers() if set(arms) & set(PEERS) else None
    for model in models:
        for seed in range(seeds):
            data = read_digits(seed, training=settings["training"])
            budget = Budget(settings["steps"], settings["batch"], 3e-3, 1e-4, seed)
            for turn in range(len(arms)):
                arm = arms[(turn + seed) % len(arms)]
                is_missing = arm in PEERS and (peers is None or model == "encoder")
                if is_missing or file.has(model=model, arm=arm, seed=seed):
                    continue
                outcome = run_arm(arm, model, data, budget, settings["members"], peers)
                file.add(row := measure(arm, model, outcome, seed, data.test_y))
                print(row, file=sys.stderr, flush=True)
    return file


def main() -> None:
    """Measure, and renew the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--training", type=int, default=300, help="digits to learn")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=60, help="rows per step of one network, a multiple of the members")
    parser.add_argument("--results", type=Path, help="folder of the rows, without tables [default: that of all]")
    parser.add_argument("--again", action="store_true", help="measure rows that this commit has measured, too")
    read = parser.parse_args()
    if read.batch % read.members:
        parser.error(
            f"--batch must be a multiple of the {read.members} members, got {read.batch}; try {20 * read.members}"
        )
    settings = {name: getattr(read, name) for name in ("members", "training", "steps", "batch")}
    run(read.models, read.arms, read.seeds, settings, folder=read.results, again=read.again)
    if read.results is None:
        results.tables()


if __name__ == "__main__":
    main()
