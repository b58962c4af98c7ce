"""Makes the pocket model: ``python -m recipes.pocket.make --atlas FOLDER --out FOLDER``.

The folder of the atlas holds four public files, see :mod:`recipes.pocket.atlas`. The same seed and number
of steps give the same tokenizer, questions and training pairs.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from recipes.pocket import atlas as atlas_files
from recipes.pocket import evaluation, tokenizer
from recipes.pocket.answer import accuracy, greedy
from recipes.pocket.card import write_card
from recipes.pocket.encode import packed
from recipes.pocket.facts import all_facts
from recipes.pocket.model_folder import publish
from recipes.pocket.questions import pair_stream
from recipes.pocket.split import write_questions
from selfdoubt.errors import SelfdoubtError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

TOKENIZER_PAIRS = 300_000
STEPS = 2200
PROBE = 60  # questions of a category that are asked while training


def make(
    atlas_folder: Path,
    out: Path,
    *,
    steps: int = STEPS,
    minutes: float | None = None,
    seed: int = 0,
    checkpoints: Path | None = None,
    every: int = 200,
    compiled: bool = True,
    console: Console | None = None,
) -> None:
    """Train the base model and write its folder, and next to it the two files of questions."""
    from recipes.pocket.base_training import BaseTraining, new_model, train_base

    say = console or Console()
    atlas = atlas_files.read_atlas(atlas_folder)
    facts = all_facts(atlas)
    files = write_questions(atlas, seed)
    say.print(f"{len(facts):,} facts; {', '.join(f'{len(q):,} {name} questions' for name, q in files.items())}")
    drawn = pair_stream(facts, random.Random(f"{seed}:tokenizer"))
    pairs = [next(drawn) for _ in range(TOKENIZER_PAIRS)]
    pieces = tokenizer.train(text for pair in pairs for text in (pair.question, pair.answer))
    words = tokenizer.wrapped(pieces)
    model = new_model(pieces.get_vocab_size(), seed)
    training = replace(BaseTraining(), steps=steps, minutes=minutes)
    stream = packed(pieces, pair_stream(facts, random.Random(f"{seed}:training")), training.rows, training.length)
    probe = [q for c in ("known", "rare", "unseen") for q in [q for q in files["reference"] if q.category == c][:PROBE]]
    started = time.monotonic()

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=say) as bar:
        task = bar.add_task("training", total=steps)

        def after_step(step: int, loss: float) -> None:
            bar.update(task, completed=step, description=f"loss {loss:.3f}")
            if step % every == 0:
                rounded = shipped(model)
                counts = accuracy(probe, greedy(rounded, words, [q.question for q in probe]))
                shares = {c: right / asked for (c, r), (right, asked) in counts.items() if r == "all"}
                text = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
                spent = (time.monotonic() - started) / 60
                say.print(f"step {step}, {spent:.1f} min: loss {loss:.4f}; right in held-out phrasings: {text}")
                if checkpoints is not None:
                    publish(checkpoints / "latest", rounded, words, "A checkpoint of the pocket model.\n")

        done, tokens = train_base(model, stream, training, after_step=after_step, compiled=compiled)
    minutes_spent = (time.monotonic() - started) / 60
    final = shipped(model)
    questions = files["evaluation"]
    counts = accuracy(questions, greedy(final, words, [q.question for q in questions]))
    text = write_card(final, counts, steps=done, tokens=tokens, minutes=minutes_spent, seed=seed)
    publish(out, final, words, text)
    for name, asked in files.items():
        evaluation.save_questions(out.parent / f"{name}.jsonl", asked)
    say.print(f"wrote {out}, {out.parent}/evaluation.jsonl and reference.jsonl")
    for (category, relation), (right, number) in sorted(counts.items()):
        say.print(f"{category:10} {relation:13} {right / number:.3f} of {number}")


def shipped(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy in bfloat16, as it is shipped and measured."""
    import torch

    twin: LlamaForCausalLM = copy.deepcopy(model).to(torch.bfloat16).eval()  # type: ignore[arg-type]
    return twin


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pocket.make", description="Make the pocket model.")
    parser.add_argument("--atlas", type=Path, required=True, help="folder with the four public files")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; question files go next to it")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps (default {STEPS})")
    parser.add_argument("--minutes", type=float, help="learn faster, to an end after these minutes; not reproducible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoints", type=Path, help="folder for a model now and then")
    parser.add_argument("--every", type=int, default=200, help="steps between two measurements")
    chosen = parser.parse_args(arguments)
    for name in ("steps", "every"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name}: wanted at least 1, found {getattr(chosen, name)}; leave it out for the default")
    if chosen.minutes is not None and not chosen.minutes > 0:
        parser.error(f"--minutes: wanted more than 0, found {chosen.minutes:g}; leave it out for no limit")
    try:
        make(
            chosen.atlas,
            chosen.out,
            steps=chosen.steps,
            minutes=chosen.minutes,
            seed=chosen.seed,
            checkpoints=chosen.checkpoints,
            every=chosen.every,
        )
    except SelfdoubtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
