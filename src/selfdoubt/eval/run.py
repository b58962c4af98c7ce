"""Asks a whole set of questions: in batches by length, over all processes of a run, going on where one was cut off."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from selfdoubt.errors import DataError
from selfdoubt.eval.generate import AnsweredBatch, EvaluationConfig, ask_batch
from selfdoubt.eval.records import Question
from selfdoubt.eval.scores.agreement import build_equivalence
from selfdoubt.eval.settings import Cost
from selfdoubt.eval.shards import Shards
from selfdoubt.lm.hidden_states import decoder_layers
from selfdoubt.lm.text.prompt import encode
from selfdoubt.members import innermost

if TYPE_CHECKING:
    from rich.progress import Progress

    from selfdoubt.lm.model import RiskAwareLM


def ask_questions(
    lm: RiskAwareLM,
    questions: Sequence[Question],
    plan: EvaluationConfig,
    out: Path,
    about: Mapping[str, Any] | None = None,
) -> AnsweredBatch | None:
    """Ask all questions; finished batches are kept in ``out`` and never asked twice.

    Batches are made of all questions before they are shared out, so that the answers are the same to the last bit
    however many processes ask, and however often they were cut off.

    Args:
        lm: The model.
        questions: With unique ids; with choices all, or none.
        plan: How to ask.
        out: The run's folder.
        about: What else the answers depend on, e.g. the model's name.

    Returns:
        All records in the order of the questions, with states and costs; None on all processes but the first.

    Raises:
        DataError: If ids come twice, or only some questions have choices.
        ConfigError: If ``out`` holds parts of another run.
    """
    _check(questions)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    order = _by_length(lm, questions, plan)
    batches = [order[i : i + plan.batch_size] for i in range(0, len(order), plan.batch_size)]
    whole = {**(about or {}), **asdict(plan), "layers": list(lm.layers), "questions": _digest(questions)}
    if rank == 0:
        parts = Shards(out, whole)
    if world > 1:
        distributed.barrier()
    if rank > 0:
        parts = Shards(out, whole)
    own = range(rank, len(batches), world)
    alike = build_equivalence(plan.clusters)
    with _progress(quiet=rank > 0) as progress:
        done = sum(len(batches[b]) for b in own if parts.has(b))
        task = progress.add_task("asking", total=sum(len(batches[b]) for b in own), completed=done)
        for b in own:
            if not parts.has(b):
                parts.put(b, ask_batch(lm, [questions[i] for i in batches[b]], plan, alike))
                progress.advance(task, len(batches[b]))
    found = {b: parts.get(b) for b in own}
    if world > 1:
        gathered: list[Any] | None = [None] * world if rank == 0 else None
        distributed.gather_object(found, gathered)
        if gathered is None:
            return None
        found = {b: asked for share in gathered for b, asked in share.items()}
    return _join(questions, batches, [found[b] for b in range(len(batches))])


def choose_quarter_layers(lm: RiskAwareLM) -> tuple[int, ...]:
    """The decoder layers at a quarter, a half and three quarters of the depth, and the last."""
    n = len(decoder_layers(innermost(lm.model)))
    return tuple(sorted({max(0, n * k // 4 - 1) for k in (1, 2, 3, 4)}))


def _check(questions: Sequence[Question]) -> None:
    if not questions:
        raise DataError("there are no questions; give a file with at least one")
    ids = [q.id for q in questions]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise DataError(f"the id {twice!r} comes twice; give every question its own")
    with_choices = sum(bool(q.choices) for q in questions)
    if with_choices not in (0, len(questions)):
        raise DataError(
            f"{with_choices} of {len(questions)} questions have choices; ask those with choices and the others apart"
        )


def _by_length(lm: RiskAwareLM, questions: Sequence[Question], plan: EvaluationConfig) -> list[int]:
    """Places of the questions, the longest prompt first: what does not fit the memory is known at once."""
    lengths = [len(encode(lm.tokenizer, plan.prompt(q), raw=plan.raw).ids) for q in questions]
    return sorted(range(len(questions)), key=lambda i: (-lengths[i], i))


def _digest(questions: Sequence[Question]) -> str:
    text = json.dumps([asdict(q) for q in questions], ensure_ascii=False, sort_keys=True)
    return f"{len(questions)}, {hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()[:16]}"


def _progress(*, quiet: bool) -> Progress:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    return progress.Progress(*columns, console=console, disable=quiet or not console.is_terminal)


def _join(
    questions: Sequence[Question], batches: Sequence[Sequence[int]], parts: Sequence[AnsweredBatch]
) -> AnsweredBatch:
    place = {i: row for row, i in enumerate(i for batch in batches for i in batch)}
    rows = [place[i] for i in range(len(questions))]
    records = [record for part in parts for record in part.records]
    states: dict[str, Tensor] = {
        name: torch.cat([part.states[name] for part in parts])[rows] for name in parts[0].states
    }
    costs: dict[str, Cost] = {}
    for part, batch in zip(parts, batches, strict=True):
        for name, cost in part.costs.items():
            total = costs.get(name, Cost(0.0, 0.0))
            passes = total.passes + cost.passes * len(batch) / len(questions)
            costs[name] = Cost(passes, total.seconds + cost.seconds)
    return AnsweredBatch([records[row] for row in rows], states, costs)
