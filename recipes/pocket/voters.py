"""Makes the pocket model's voters: ``python -m recipes.pocket.voters --atlas FOLDER --out FOLDER``.

Three low-rank voters learn beside the frozen base model, each from its own share of every batch. Then the reference
questions are answered: the quantiles of every answer score go into the adapter, so that a risk has a percentile, and a
head that turns scores into the probability of being right.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from recipes.pocket import atlas as atlas_files
from recipes.pocket import evaluation
from recipes.pocket.encode import Rows, packed
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

VOTERS = vote.Wrapper(n_voters=3, rank=16, weight_noise=0.5)
STEPS, ROWS, LENGTH, RATE = 300, 48, 64, 2e-3
#: Of the answers that are given, so many are right, with 95 % confidence.
TARGET = 0.9


def rows_of(atlas_folder: Path, tokenizer: Any, seed: int, rows: int = ROWS) -> Iterator[Rows]:
    """Packed training pairs without end; ``ROWS`` divides by two, three and four voters."""
    facts = all_facts(atlas_files.read(atlas_folder))
    return packed(tokenizer.backend_tokenizer, pair_stream(facts, random.Random(f"{seed}:voters")), rows, LENGTH)


def inputs_of(rows: Rows) -> dict[str, Any]:
    """What a model is called with to read packed rows."""
    return {
        "input_ids": rows.ids,
        "position_ids": rows.positions,
        "attention_mask": rows.mask(),
        "use_cache": False,
    }


def loss_of(model: nn.Module, rows: Rows) -> Tensor:
    """Mean surprisal of one training pass, questions and answers alike: each voter reads its own rows."""
    logits: Tensor = model(**inputs_of(rows)).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows.targets().flatten())


def fine_tune(
    model: nn.Module,
    stream: Iterator[Rows],
    *,
    steps: int = STEPS,
    rate: float = RATE,
    loss: Callable[[nn.Module, Rows], Tensor] = loss_of,
) -> float:
    """Train what trains of a model, in place; returns the mean loss of the last tenth of the steps."""
    model.train()
    learner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        learner, lambda step: min(1.0, (step + 1) / warmup) * (1 - step / steps)
    )
    losses = []
    for _ in track(range(steps), description="fine-tuning"):
        found = loss(model, next(stream))
        learner.zero_grad()
        found.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        learner.step()
        schedule.step()
        losses.append(found.item())
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def make(atlas_folder: Path, out: Path, *, base: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Train the voters and write the adapter folder."""
    torch.manual_seed(seed)
    plain = RiskAwareLM.load(base, wrapper=None, dtype="float32", device="cpu")
    wrapped = VOTERS(plain.model)
    loss = fine_tune(wrapped, rows_of(atlas_folder, plain.tokenizer, seed), steps=steps)
    Console().print(f"loss {loss:.4f}")
    refer(RiskAwareLM(wrapped, plain.tokenizer), out)


def refer(lm: RiskAwareLM, out: Path) -> None:
    """Answer the reference questions, and write the adapter with their quantiles and what is learnt from them.

    Half of them teach the head behind p_correct, half test the threshold below which an answer is withheld. Quantiles
    leave out those that only calibrate.
    """
    every = evaluation.read(pocket.reference_file())
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
    """The command line; returns the exit code."""
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
            refer(RiskAwareLM.load(chosen.base, adapter=chosen.out, dtype="float32", device="cpu"), chosen.out)
            return 0
        make(chosen.atlas, chosen.out, base=chosen.base, steps=chosen.steps, seed=chosen.seed)
    except SelfdoubtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
