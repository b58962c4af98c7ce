"""Asks a whole set of questions in batches by length, over all processes of a run; an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from selfdoubt.data.questions import Question
from selfdoubt.errors import ConfigError, DataError, PromptError
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.generate import AnsweredBatch, ask_batch
from selfdoubt.eval.progress import build_progress
from selfdoubt.eval.prompts import STOP
from selfdoubt.eval.scores.agreement import build_equivalence
from selfdoubt.eval.settings import Cost, Run
from selfdoubt.eval.shards import Shards
from selfdoubt.lm.conditions import Conditions
from selfdoubt.lm.hidden_states import find_decoder_layers
from selfdoubt.lm.text.prompt import encode
from selfdoubt.wrapping import innermost

if TYPE_CHECKING:
    from selfdoubt.lm.model import RiskAwareLM


def ask_questions(
    lm: RiskAwareLM,
    questions: Sequence[Question],
    config: EvaluationConfig,
    out: Path,
    run: Run | None = None,
) -> AnsweredBatch | None:
    """Ask all questions; finished batches are stored in ``out`` and never asked twice.

    Batches are made of all questions before they are shared out, so that the answers are the same to the last bit
    however many processes ask, and however often they were cut off.

    Args:
        lm: The model.
        questions: Questions with unique ids; all of them with choices, or none.
        config: Settings; ``resolve_config`` fills in those that depend on the model.
        out: Folder of the run.
        run: Further settings that the answers depend on: the model's name, the data, ...

    Returns:
        All records in the order of the questions, with states and costs; None on all processes but the first.

    Raises:
        DataError: If ids come twice, or only some questions have choices.
        ConfigError: If ``out`` holds shards of another run.
    """
    check_questions(questions)
    config = resolve_config(config, lm)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo")
    order = _by_length(lm, questions, config)
    batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
    whole = {
        **({} if run is None else run.to_json()),
        **asdict(config),
        "layers": list(lm.layers),
        "questions": digest_questions(questions),
    }
    if rank == 0:
        shards = Shards(out, whole)
    if world > 1:
        distributed.barrier()
    if rank > 0:
        shards = Shards(out, whole)
    share = range(rank, len(batches), world)
    alike = build_equivalence(config.clusters)
    with build_progress(quiet=rank > 0) as progress:
        done = sum(len(batches[b]) for b in share if shards.has(b))
        task = progress.add_task("asking", total=sum(len(batches[b]) for b in share), completed=done)
        for b in share:
            if not shards.has(b):
                shards.put(b, ask_batch(lm, [questions[i] for i in batches[b]], config, alike))
                progress.advance(task, len(batches[b]))
    answered = {b: shards.get(b) for b in share}
    if world > 1:
        gathered: list[Any] | None = [None] * world if rank == 0 else None
        distributed.gather_object(answered, gathered)
        if gathered is None:
            return None
        answered = {b: asked for part in gathered for b, asked in part.items()}
    return _join(questions, batches, [answered[b] for b in range(len(batches))])


def resolve_config(config: EvaluationConfig, lm: RiskAwareLM) -> EvaluationConfig:
    """Return a config whose style and place of the instruction are decided, as the model's chat template allows."""
    style, system = config.how.style, config.how.system
    if style == "auto":
        style = "qa" if lm.tokenizer.chat_template is None else "chat"
    if system is None:
        system = style == "chat" and _takes_system(lm)
    return replace(config, how=replace(config.how, style=style, system=system))


def _takes_system(lm: RiskAwareLM) -> bool:
    """Return whether the chat template has a place for a system message."""
    if lm.tokenizer.chat_template is None:
        return False
    try:
        both = encode(lm.tokenizer, [{"role": "system", "content": "~"}, {"role": "user", "content": "?"}]).ids
    except PromptError:
        return False
    return both != encode(lm.tokenizer, "?").ids


def describe_conditions(lm: RiskAwareLM, questions: Sequence[Question], config: EvaluationConfig) -> Conditions:
    """Return the conditions under which the answers to these questions are made, for a calibration."""
    config = resolve_config(config, lm)
    forms = {encode(lm.tokenizer, config.prompt(question), raw=config.raw).form for question in questions}
    return Conditions.of_model(
        lm.model,
        made="choice" if questions and questions[0].choices else "greedy",
        forms=tuple(sorted(forms)),
        stops=(STOP,) if config.raw else (),
    )


def choose_layers(lm: RiskAwareLM, text: str) -> tuple[int, ...]:
    """Return decoder layers by name (auto, none, all, or numbers like "3,7"), with the one that a calibration reads.

    Raises:
        ConfigError: If the text is something else.
    """
    if text == "auto":
        layers = choose_quarter_layers(lm)
    elif text == "none":
        layers = ()
    elif text == "all":
        layers = tuple(range(len(find_decoder_layers(innermost(lm.model)))))
    else:
        try:
            layers = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise ConfigError(f"--states must be auto, none, all or numbers like 3,7, got {text!r}") from None
    return tuple(sorted({*lm.layers, *layers}))


def choose_quarter_layers(lm: RiskAwareLM) -> tuple[int, ...]:
    """Return the decoder layers at a quarter, a half and three quarters of the depth, and the last."""
    n = len(find_decoder_layers(innermost(lm.model)))
    return tuple(sorted({max(0, n * k // 4 - 1) for k in (1, 2, 3, 4)}))


def check_questions(questions: Sequence[Question]) -> None:
    """Check that questions can be asked in one run.

    Raises:
        DataError: If there are none, an id comes twice, or only some have choices.
    """
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


def _by_length(lm: RiskAwareLM, questions: Sequence[Question], config: EvaluationConfig) -> list[int]:
    """Return the indices of the questions, the longest prompt first: a lack of memory shows at once."""
    lengths = [len(encode(lm.tokenizer, config.prompt(q), raw=config.raw).ids) for q in questions]
    return sorted(range(len(questions)), key=lambda i: (-lengths[i], i))


def digest_questions(questions: Sequence[Question]) -> str:
    """Return the number of questions and a hash of all of them: another digest, other questions."""
    text = json.dumps([asdict(q) for q in questions], ensure_ascii=False, sort_keys=True)
    return f"{len(questions)}, {hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()[:16]}"


def _join(
    questions: Sequence[Question], batches: Sequence[Sequence[int]], answered: Sequence[AnsweredBatch]
) -> AnsweredBatch:
    place = {i: row for row, i in enumerate(i for batch in batches for i in batch)}
    rows = [place[i] for i in range(len(questions))]
    records = [record for part in answered for record in part.records]
    states: dict[str, Tensor] = {
        name: torch.cat([part.states[name] for part in answered])[rows] for name in answered[0].states
    }
    costs: dict[str, Cost] = {}
    for part, batch in zip(answered, batches, strict=True):
        for name, cost in part.costs.items():
            total = costs.get(name, Cost(0.0, 0.0))
            passes = total.passes + cost.passes * len(batch) / len(questions)
            costs[name] = Cost(passes, total.seconds + cost.seconds)
    return AnsweredBatch([records[row] for row in rows], states, costs)
