"""Asks a batch of questions in each configured way: answers, choices, samples, "is this true?"."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.judges.choices import judge_mc1, judge_mc2, normalise_choices
from selfdoubt.eval.prompts import STOP, BuiltPrompt, extract_answer, format_letter
from selfdoubt.eval.records import Question, Record, Sample, add_scores
from selfdoubt.eval.scores.agreement import Same, agreement_scores
from selfdoubt.eval.scores.p_true import estimate_p_true
from selfdoubt.eval.settings import Cost
from selfdoubt.lm.hidden_states import POSITIONS, StateKey
from selfdoubt.lm.scoring import score_teacher_forced

if TYPE_CHECKING:
    from torch import Tensor

    from selfdoubt.lm.answer import Answer
    from selfdoubt.lm.model import RiskAwareLM


@dataclass
class AnsweredBatch:
    """The answers to a batch of questions."""

    records: list[Record] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)  #: "position.layer" -> (questions, width), float32
    costs: dict[str, Cost] = field(default_factory=dict)  #: of "answer", "samples", "agreement" and "p_true"

    @contextmanager
    def timed(self, name: str, passes: float) -> Iterator[None]:
        """Add the seconds of the block to a cost; ``passes`` are forward passes per question."""
        start = time.perf_counter()
        yield
        self.costs[name] = Cost(passes, time.perf_counter() - start)


def ask_batch(lm: RiskAwareLM, questions: Sequence[Question], config: EvaluationConfig, alike: Same) -> AnsweredBatch:
    """Ask questions side by side.

    Args:
        lm: The model.
        questions: Questions, all of them with choices, or none.
        config: Settings.
        alike: Rule that ``config.clusters`` names; see ``scores.agreement.build_equivalence``.

    Returns:
        One record per question, in their order, unjudged but for multiple choice.
    """
    batch = AnsweredBatch()
    prompts = [config.prompt(q) for q in questions]
    if questions[0].choices:
        answers = _choose(lm, questions, prompts, config, batch)
    else:
        with batch.timed("answer", 1):
            answers = lm.generate(prompts, batch_size=config.batch_size, **_options(config))
        batch.records = [_record(q, a, config) for q, a in zip(questions, answers, strict=True)]
    if config.samples and not questions[0].choices:
        _draw(lm, prompts, config, alike, batch)
    if config.p_true:
        with batch.timed("p_true", 1):
            doubts = estimate_p_true(lm, [(r.question, r.answer or "") for r in batch.records], config)
        batch.records = [add_scores(r, {"p_false": 1 - p}) for r, p in zip(batch.records, doubts, strict=True)]
    if answers[0].states is not None:
        batch.states = stack_states([a.states for a in answers])
    return batch


def _options(config: EvaluationConfig) -> dict[str, Any]:
    return {"max_tokens": config.max_tokens, "raw": config.raw, "stop": [STOP] if config.raw else []}


def _record(question: Question, answer: Answer, config: EvaluationConfig) -> Record:
    return Record(
        question,
        extract_answer(answer.text, config.how),
        scores={name: _short(value) for name, value in answer.scores.items()},
        tokens=_pairs(answer.tokens),
        question_tokens=() if config.raw else _pairs(answer.question),  # there its words are those of the examples, too
        finish=answer.finish,
        percentile=answer.percentile,
        p_correct=None if answer.p_correct is None else _short(answer.p_correct),
        p_correct_note=answer.p_correct_note,
        abstain=answer.abstain,
        p_answerable=None if answer.p_answerable is None else _short(answer.p_answerable),
    )


def _pairs(tokens: Sequence[Any]) -> tuple[tuple[str, float], ...]:
    return tuple((t.text, float(f"{t.risk:.4g}")) for t in tokens)


def _short(value: float) -> float:
    """Round to seven significant digits: enough for any ranking, without the machine's rounding noise."""
    return float(f"{value:.7g}")


def _draw(
    lm: RiskAwareLM, prompts: Sequence[BuiltPrompt], config: EvaluationConfig, alike: Same, batch: AnsweredBatch
) -> None:
    """Draw further answers to each question, and add the scores of how much they agree."""
    n = config.samples
    seeds = [derive_seed(config.seed, r.question.id, i) for r in batch.records for i in range(n)]
    with batch.timed("samples", n):
        many = [prompt for prompt in prompts for _ in range(n)]
        drawn = lm.generate(
            many, batch_size=config.batch_size, seeds=seeds, temperature=config.temperature, **_options(config)
        )
    with batch.timed("agreement", 0):
        for i, record in enumerate(batch.records):
            answers = drawn[i * n : (i + 1) * n]
            texts = [extract_answer(a.text, config.how) for a in answers]
            nlls = [a.scores["sum_nll"] for a in answers]
            scores = agreement_scores(record.answer or "", texts, nlls, alike, record.question.text, record.scores)
            samples = tuple(Sample(t, _short(a.risk), a.percentile) for t, a in zip(texts, answers, strict=True))
            batch.records[i] = replace(add_scores(record, scores), samples=samples)


def derive_seed(seed: int, question: str, number: int) -> int:
    """Return the seed of a drawn answer: it depends on the question, not on its place or the batch around it."""
    return zlib.crc32(f"{seed}:{question}:{number}".encode())


def _choose(
    lm: RiskAwareLM,
    questions: Sequence[Question],
    prompts: Sequence[BuiltPrompt],
    config: EvaluationConfig,
    batch: AnsweredBatch,
) -> list[Answer]:
    """Choose the most probable choice of each question, by the sum of its tokens' log-probabilities.

    A record is correct where that choice is right (the mean over questions is TruthfulQA's MC1), and its grade is the
    share of probability on right choices (the mean is MC2).
    """
    pairs = [
        (p, _choice_text(q, i, config)) for q, p in zip(questions, prompts, strict=True) for i in range(len(q.choices))
    ]
    scored: list[Answer] = []
    with batch.timed("answer", len(pairs) / len(questions)):
        for first in range(0, len(pairs), config.batch_size):
            part = pairs[first : first + config.batch_size]
            scored += score_teacher_forced(lm, part, raw=config.raw, alternatives=0, made="choice")
    chosen, rest = [], iter(scored)
    for question in questions:
        answers = list(islice(rest, len(question.choices)))
        logprobs = [-answer.scores["sum_nll"] for answer in answers]
        best = max(range(len(answers)), key=lambda i: logprobs[i])
        record = replace(
            add_scores(_record(question, answers[best], config), _choice_scores(logprobs, best)),
            answer=question.choices[best],
            correct=judge_mc1(question, logprobs).correct,
            grade=judge_mc2(question, logprobs).grade,
        )
        batch.records.append(record)
        chosen.append(answers[best])
    return chosen


def _choice_text(question: Question, choice: int, config: EvaluationConfig) -> str:
    """Return a choice as the model would write it; in plain text it follows "A:" with a space."""
    text = format_letter(choice) if config.how.options else question.choices[choice]
    return f" {text}" if config.raw else text


def _choice_scores(logprobs: Sequence[float], best: int) -> dict[str, float]:
    """Return surprisal of the chosen choice and entropy of all, in nats, normalised over the choices."""
    probabilities = normalise_choices(logprobs)
    return {
        "choice_nll": _short(0.0 - math.log(probabilities[best])),
        "choice_entropy": _short(0.0 - math.fsum(p * math.log(p) for p in probabilities if p > 0)),
    }


def stack_states(states: Sequence[Any]) -> dict[str, Tensor]:
    """Return the states of several answers as one tensor for each position and layer, by "position.layer"."""
    import torch

    return {
        str(StateKey(position, layer)): torch.stack([getattr(s, position)[i] for s in states])
        for i, layer in enumerate(states[0].layers)
        for position in POSITIONS
    }
