"""Asks a batch of questions in every way that a plan wants: answers, choices, samples, "is this true?"."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from selfdoubt.errors import ConfigError
from selfdoubt.eval.judges.choices import judge_mc1, judge_mc2, shares
from selfdoubt.eval.prompts import CHAT, STOP, Message, Prompting, answer_text, build_prompt, letter
from selfdoubt.eval.records import Question, Record, Sample, with_scores
from selfdoubt.eval.scores.agreement import Same, agreement_scores
from selfdoubt.eval.scores.p_true import p_true
from selfdoubt.lm.conditions import Conditions
from selfdoubt.lm.hidden_states import POSITIONS, StateKey
from selfdoubt.lm.scoring import score_teacher_forced
from selfdoubt.lm.text.prompt import encode

if TYPE_CHECKING:
    from torch import Tensor

    from selfdoubt.lm.answer import Answer
    from selfdoubt.lm.model import RiskAwareLM

Prompt = str | list[Message]


@dataclass(frozen=True)
class EvaluationConfig:
    """Everything about asking that changes what comes back.

    Raises:
        ConfigError: If a setting is out of range.
    """

    how: Prompting = CHAT
    shots: tuple[Question, ...] = ()  #: solved examples before each question
    max_tokens: int = 64
    batch_size: int = 32
    samples: int = 0  #: further answers drawn for each question
    temperature: float = 1.0  #: of the samples
    clusters: str = "exact"  #: when two samples mean the same: exact, f1:SHARE or nli:MODEL
    p_true: bool = False  #: ask the model whether its answer is true
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("max_tokens", 1), ("batch_size", 1), ("samples", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.samples == 1:
            raise ConfigError("one sample agrees with nothing; draw at least 2, or 0 for none")
        if self.samples and not self.temperature > 0:
            raise ConfigError(f"the temperature of samples must be above 0, got {self.temperature}")

    @property
    def raw(self) -> bool:
        """Whether prompts are plain text, and not a chat."""
        return self.how.style == "qa"

    def prompt(self, question: Question) -> Prompt:
        """What the model is asked."""
        return build_prompt(question, self.shots, self.how)

    def conditions(self, lm: RiskAwareLM, questions: Sequence[Question]) -> Conditions:
        """Return how the answers to these questions are made, for a calibration."""
        forms = {encode(lm.tokenizer, self.prompt(question), raw=self.raw).form for question in questions}
        return Conditions.of_model(
            lm.model,
            made="choice" if questions and questions[0].choices else "greedy",
            forms=tuple(sorted(forms)),
            stops=(STOP,) if self.raw else (),
        )


@dataclass
class AnsweredBatch:
    """What a batch of questions came to."""

    records: list[Record] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)  #: "position.layer" -> (questions, width), float32
    costs: dict[str, dict[str, float]] = field(default_factory=dict)  #: "answer" -> {"passes", "seconds"}, ...

    @contextmanager
    def timed(self, name: str, passes: float) -> Iterator[None]:
        """Book the seconds of the block; ``passes`` are model runs a question."""
        start = time.perf_counter()
        yield
        self.costs[name] = {"passes": passes, "seconds": time.perf_counter() - start}


def ask_batch(lm: RiskAwareLM, questions: Sequence[Question], plan: EvaluationConfig, alike: Same) -> AnsweredBatch:
    """Ask questions side by side.

    Args:
        lm: The model.
        questions: With choices all, or none.
        plan: How to ask.
        alike: What ``plan.clusters`` names.

    Returns:
        One record a question, in their order, unjudged but for multiple choice.
    """
    found = AnsweredBatch()
    prompts = [plan.prompt(q) for q in questions]
    if questions[0].choices:
        answers = _choose(lm, questions, prompts, plan, found)
    else:
        with found.timed("answer", 1):
            answers = lm.generate(prompts, batch_size=plan.batch_size, **_options(plan))
        found.records = [_record(q, a, plan) for q, a in zip(questions, answers, strict=True)]
    if plan.samples and not questions[0].choices:
        _draw(lm, prompts, plan, alike, found)
    if plan.p_true:
        with found.timed("p_true", 1):
            doubts = p_true(lm, [(r.question, r.answer or "") for r in found.records], plan)
        found.records = [with_scores(r, {"p_false": 1 - p}) for r, p in zip(found.records, doubts, strict=True)]
    if answers[0].states is not None:
        found.states = stack_states([a.states for a in answers])
    return found


def _options(plan: EvaluationConfig) -> dict[str, Any]:
    return {"max_tokens": plan.max_tokens, "raw": plan.raw, "stop": [STOP] if plan.raw else []}


def _record(question: Question, answer: Answer, plan: EvaluationConfig) -> Record:
    return Record(
        question,
        answer_text(answer.text, plan.how),
        scores={name: _short(value) for name, value in answer.scores.items()},
        tokens=_pairs(answer.tokens),
        question_tokens=() if plan.raw else _pairs(answer.question),  # there its words are those of the examples, too
        finish=answer.finish,
        percentile=answer.percentile,
        p_correct=None if answer.p_correct is None else _short(answer.p_correct),
        p_correct_note=answer.p_correct_note,
        abstain=answer.abstain,
    )


def _pairs(tokens: Sequence[Any]) -> tuple[tuple[str, float], ...]:
    return tuple((t.text, float(f"{t.risk:.4g}")) for t in tokens)


def _short(value: float) -> float:
    """Enough digits for any ranking; the rest is rounding noise of the machine."""
    return float(f"{value:.7g}")


def _draw(
    lm: RiskAwareLM, prompts: Sequence[Prompt], plan: EvaluationConfig, alike: Same, found: AnsweredBatch
) -> None:
    """Further answers to each question, and the scores of how much they agree."""
    n = plan.samples
    seeds = [sample_seed(plan.seed, r.question.id, i) for r in found.records for i in range(n)]
    with found.timed("samples", n):
        many = [own for own in prompts for _ in range(n)]
        drawn = lm.generate(
            many, batch_size=plan.batch_size, seeds=seeds, temperature=plan.temperature, **_options(plan)
        )
    with found.timed("agreement", 0):
        for i, record in enumerate(found.records):
            own = drawn[i * n : (i + 1) * n]
            texts = [answer_text(a.text, plan.how) for a in own]
            nlls = [a.scores["sum_nll"] for a in own]
            scores = agreement_scores(record.answer or "", texts, nlls, alike, record.question.text)
            samples = tuple(Sample(t, _short(a.risk), a.percentile) for t, a in zip(texts, own, strict=True))
            found.records[i] = replace(with_scores(record, scores), samples=samples)


def sample_seed(seed: int, question: str, number: int) -> int:
    """A seed that depends on nothing but the question: neither its place in the file nor the batch around it."""
    return zlib.crc32(f"{seed}:{question}:{number}".encode())


def _choose(
    lm: RiskAwareLM,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    plan: EvaluationConfig,
    found: AnsweredBatch,
) -> list[Answer]:
    """The most probable choice of each question, by the sum of its tokens' log-probabilities.

    A record is correct where that choice is right (the mean over questions is TruthfulQA's MC1), and its grade is the
    share of probability on right choices (the mean is MC2).
    """
    pairs = [(p, _said(q, i, plan)) for q, p in zip(questions, prompts, strict=True) for i in range(len(q.choices))]
    scored: list[Answer] = []
    with found.timed("answer", len(pairs) / len(questions)):
        for first in range(0, len(pairs), plan.batch_size):
            part = pairs[first : first + plan.batch_size]
            scored += score_teacher_forced(lm, part, raw=plan.raw, alternatives=0, made="choice")
    chosen, rest = [], iter(scored)
    for question in questions:
        own = list(islice(rest, len(question.choices)))
        logprobs = [-answer.scores["sum_nll"] for answer in own]
        best = max(range(len(own)), key=lambda i: logprobs[i])
        record = replace(
            with_scores(_record(question, own[best], plan), _choice_scores(logprobs, best)),
            answer=question.choices[best],
            correct=judge_mc1(question, logprobs).correct,
            grade=judge_mc2(question, logprobs).grade,
        )
        found.records.append(record)
        chosen.append(own[best])
    return chosen


def _said(question: Question, choice: int, plan: EvaluationConfig) -> str:
    """What the model would say to take this choice; plain text goes on after "A:", with a space."""
    text = letter(choice) if plan.how.options else question.choices[choice]
    return f" {text}" if plan.raw else text


def _choice_scores(logprobs: Sequence[float], best: int) -> dict[str, float]:
    """Doubt among the choices, as if nothing else could be said: surprisal of the chosen one, and the entropy."""
    own = shares(logprobs)
    return {
        "choice_nll": _short(0.0 - math.log(own[best])),
        "choice_entropy": _short(0.0 - math.fsum(p * math.log(p) for p in own if p > 0)),
    }


def stack_states(states: Sequence[Any]) -> dict[str, Tensor]:
    """Return the states of several answers as one tensor for each position and layer, by "position.layer"."""
    import torch

    return {
        str(StateKey(position, layer)): torch.stack([getattr(s, position)[i] for s in states])
        for i, layer in enumerate(states[0].layers)
        for position in POSITIONS
    }
