"""Makes the pocket model's voters: ``python -m recipes.pocket.voters --atlas FOLDER --out FOLDER``.

Three low-rank voters learn by ``selfdoubt.train.fit`` on top of the frozen base model, each from its own share of every
batch. Then the reference questions are answered: the quantiles of every answer score go into the adapter, so that a
risk has a percentile, and a head that turns scores into the probability of being right.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recipes.pocket import atlas as atlas_files
from recipes.pocket import evaluation
from recipes.pocket.facts import all_facts
from recipes.pocket.questions import pair_stream
from selfdoubt import pocket, storage, vote
from selfdoubt.calibration.fit import fit_calibration
from selfdoubt.errors import SelfdoubtError
from selfdoubt.eval.generate import stack_states
from selfdoubt.eval.records import Question, Record
from selfdoubt.eval.run import choose_quarter_layers
from selfdoubt.lm.conditions import Conditions
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.scores import reference_quantiles
from selfdoubt.train import TrainConfig, fit

VOTERS = vote.Wrapper(n_voters=3, rank=16, weight_noise=0.5)
STEPS, ROWS, LENGTH, RATE = 300, 48, 64, 2e-3
#: More pairs per packed row than fit, so that an epoch has all the steps.
PAIRS_PER_ROW = 4
#: The share of the answers given that are right, with 95 % confidence.
TARGET = 0.9


def write_pairs(atlas_folder: Path, file: Path, pairs: int, seed: int) -> None:
    """Write training pairs as instruction data, one JSON object per line."""
    stream = pair_stream(all_facts(atlas_files.read_atlas(atlas_folder)), random.Random(f"{seed}:voters"))
    drawn = ({"question": pair.question, "answer": pair.answer} for pair in islice(stream, pairs))
    file.write_text("".join(f"{json.dumps(pair, ensure_ascii=False)}\n" for pair in drawn), encoding="utf-8")


def fine_tune(
    atlas_folder: Path,
    out: Path,
    *,
    base: str = "pocket",
    steps: int = STEPS,
    rows: int = ROWS,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Train what is added to the pocket model on packed training pairs, questions and answers alike.

    Args:
        atlas_folder: The four public files.
        out: The adapter folder to write.
        base: The base model.
        steps: Training steps; the rate rises over the first 5 % of them, and falls to nothing.
        rows: Rows of a step; 48 divides by two, three and four voters.
        seed: Of pairs, batches and the wrapper.
        **settings: More fields of ``TrainConfig``: ``wrapper``, LoRA's.
    """
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "pairs.jsonl"
        write_pairs(atlas_folder, data, steps * rows * PAIRS_PER_ROW, seed)
        return fit(
            TrainConfig(
                data=str(data), out=str(out), model=base, seed=seed, loss_on="all", pack=True, max_length=LENGTH,
                val_share=0.002, val_every=1.0, max_steps=steps, batch_size=rows, lr=RATE, schedule="cosine",
                warmup=steps // 20, precision="32-true", dtype="float32", accelerator="cpu", loggers="none",
                reference=0, **settings,
            )
        )  # fmt: skip


def make(atlas_folder: Path, out: Path, *, base: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Train the voters and write the adapter folder."""
    name = "pocket" if base == pocket.folder() else str(base)
    with tempfile.TemporaryDirectory() as work:
        voters = replace(VOTERS, seed=seed)
        adapter = fine_tune(atlas_folder, Path(work) / "adapter", base=name, steps=steps, seed=seed, wrapper=voters)
        write_adapter(RiskAwareLM.load(base, adapter=adapter, dtype="float32", device="cpu"), out)


def write_adapter(lm: RiskAwareLM, out: Path) -> None:
    """Answer the reference questions, and write the adapter with their quantiles and what is learnt from them.

    Half of them teach the head behind p_correct, half test the threshold below which the model abstains. Quantiles
    leave out those that only calibrate.
    """
    every = evaluation.read_questions(pocket.reference_file())
    ranked, others = ([q for q in every if q.only_calibrates is only] for only in (False, True))
    lm.layers = choose_quarter_layers(lm)
    reference, more = (
        lm.generate([q.question for q in asked], max_tokens=48, batch_size=64) for asked in (ranked, others)
    )
    questions, answers = [*ranked, *others], [*reference, *more]
    records = [
        Record(
            Question(q.id, q.question, answers=tuple(q.answers), topic=q.relation),
            answer.text,
            answer.scores,
            finish=answer.finish,
            correct=evaluation.is_right(q, answer.text),
        )
        for q, answer in zip(questions, answers, strict=True)
    ]
    states = stack_states([answer.states for answer in answers])
    conditions = Conditions.of_model(lm.model)
    calibration, report = fit_calibration(records, states, target_accuracy=TARGET, conditions=conditions)
    extra = {"reference": reference_quantiles(reference), "calibration": calibration.to_json()}
    storage.save(lm.model.to(torch.bfloat16), out, base="pocket", extra=extra)
    size = sum(f.stat().st_size for f in out.iterdir())
    Console().print("\n".join([*report.lines(), f"wrote {out} ({size / 1e6:.2f} MB)"]), highlight=False, markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pocket.voters", description=__doc__.splitlines()[0])
    parser.add_argument("--atlas", type=Path, help="folder with the four public files")
    parser.add_argument("--out", type=Path, required=True, help="the adapter folder to write")
    parser.add_argument(
        "--keep", action="store_true", help="keep the voters in OUT, and only answer the reference questions again"
    )
    parser.add_argument("--base", type=Path, default=pocket.folder(), help="folder of the base model")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    if chosen.steps < 1:
        parser.error(f"--steps: wanted at least 1, found {chosen.steps}; leave it out for the default")
    if chosen.atlas is None and not chosen.keep:
        parser.error("--atlas: wanted the folder with the four public files, found nothing; --keep needs none")
    try:
        if chosen.keep:
            write_adapter(RiskAwareLM.load(chosen.base, adapter=chosen.out, dtype="float32", device="cpu"), chosen.out)
            return 0
        make(chosen.atlas, chosen.out, base=chosen.base, steps=chosen.steps, seed=chosen.seed)
    except SelfdoubtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
