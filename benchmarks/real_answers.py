"""Answers of real models to real questions: made once, kept as they come, and scored again without being made again.

One file per model, set and arm under the folder of answers, ``MODEL/SET.ARM.jsonl``: one judged record per line, with
its scores; a folder beside it, ``SET.ARM.states``, holds hidden states of each chunk of questions. A run that was cut
off goes on behind the last whole chunk.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfdoubt.data.question_sets import load_questions
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.few_shot import choose_examples
from selfdoubt.eval.generate import AnsweredBatch, ask_batch, stack_states
from selfdoubt.eval.judges.judge import judge_records
from selfdoubt.eval.judges.rules import build_judge, choose_default_judge
from selfdoubt.eval.records import Question, Record, add_scores, format_record, read_records
from selfdoubt.eval.run import resolve_config
from selfdoubt.eval.scores.agreement import build_equivalence
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.scoring import score_teacher_forced


@dataclass(frozen=True)
class QuestionSet:
    """A set of questions."""

    file: str  #: below the folder of data
    max_tokens: int = 48
    task: str | None = None  #: of TruthfulQA
    shots: int = 0  #: solved examples, where the model has no chat template
    examples: str | None = None  #: the file of the examples; None: the set itself


SETS: dict[str, QuestionSet] = {
    "webquestions": QuestionSet("webquestions/test.json", shots=4, examples="webquestions/trainmodel.json"),
    "nq": QuestionSet("nq_open/NQ-open.dev.jsonl", shots=4, examples="nq_open/NQ-open.efficientqa.dev.1.1.jsonl"),
    "trivia": QuestionSet("opentriviaqa/opentriviaqa.jsonl"),
    "squad2": QuestionSet("squad2/squad_dev_v2.0_rebuilt.json"),
    "truthfulqa": QuestionSet("truthfulqa", task="gen"),
    "mc1": QuestionSet("truthfulqa", task="mc1"),
    "mc2": QuestionSet("truthfulqa", task="mc2"),
}
#: Questions that are asked together and written together.
CHUNK = 32


@dataclass(frozen=True)
class AnswerFile:
    """The place of one model's answers to one set by one arm."""

    folder: Path
    model: str
    set: str
    arm: str

    @property
    def path(self) -> Path:
        """The file of records."""
        return self.folder / self.model / f"{self.set}.{self.arm}.jsonl"

    @property
    def states_folder(self) -> Path:
        """The folder of hidden states."""
        return self.path.with_suffix(".states")

    @property
    def costs_file(self) -> Path:
        """The file of costs: one line per chunk."""
        return self.path.with_suffix(".costs")

    def read(self) -> list[Record]:
        """Return the records; none where nothing was answered yet."""
        return read_records(self.path) if self.path.is_file() else []

    def read_states(self, ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Return hidden states in the order of the ids: ``"mean.14" -> (answers, width)``; empty if one is missing."""
        rows: dict[str, dict[str, np.ndarray]] = {}
        for file in sorted(self.states_folder.glob("*.npz")):
            with np.load(file) as arrays:
                for key in arrays.files:
                    if key != "ids":
                        rows.setdefault(key, {}).update(zip(arrays["ids"].tolist(), arrays[key], strict=True))
        whole = {key: known for key, known in rows.items() if all(i in known for i in ids)}
        return {key: np.stack([known[i] for i in ids]).astype(np.float32) for key, known in whole.items()}

    def read_seconds(self) -> dict[str, float]:
        """Return seconds per question, by kind of pass."""
        lines = self.costs_file.read_text().splitlines() if self.costs_file.is_file() else []
        chunks = [json.loads(text) for text in lines]
        names = sorted({name for chunk in chunks for name in chunk} - {"questions"})
        asked = sum(chunk["questions"] for chunk in chunks)
        return {name: sum(chunk.get(name, 0.0) for chunk in chunks) / asked for name in names}

    def append(self, batch: AnsweredBatch, first: int) -> None:
        """Write the answers to one chunk: states and costs first, so that a written record has them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ids = [record.question.id for record in batch.records]
        if batch.states:
            self.states_folder.mkdir(exist_ok=True)
            arrays: dict[str, Any] = {
                key: value.cpu().numpy().astype(np.float16) for key, value in batch.states.items()
            }
            np.savez_compressed(self.states_folder / f"{first:06d}.npz", ids=np.array(ids), **arrays)
        costs = {name: round(cost.seconds, 4) for name, cost in batch.costs.items()}
        with self.costs_file.open("a") as file:
            file.write(json.dumps({"questions": len(ids), **costs}) + "\n")
        with self.path.open("a") as file:
            file.write("".join(format_record(shorten(record)) for record in batch.records))


def shorten(record: Record) -> Record:
    """Return a record without its tokens and its passage, and with scores of five digits."""
    scores = {name: float(f"{value:.5g}") for name, value in record.scores.items()}
    question = replace(record.question, context=None)
    return replace(record, question=question, scores=scores, tokens=(), question_tokens=())


def read_set(name: str, data: Path, limit: int) -> list[Question]:
    """Return a random part of a set: the same for every model and arm."""
    chosen = SETS[name]
    options = {} if chosen.task is None else {"task": chosen.task}
    return load_questions(data / chosen.file, limit=limit, **options)  # type: ignore[arg-type]


def choose_config(lm: RiskAwareLM, name: str, data: Path, asked: Sequence[Question], **more: Any) -> EvaluationConfig:
    """Return the settings with which a model is asked a set; a model without a chat template gets solved examples."""
    chosen = SETS[name]
    config = resolve_config(EvaluationConfig(max_tokens=chosen.max_tokens, batch_size=CHUNK, **more), lm)
    if config.raw and chosen.shots:
        examples = load_questions(data / (chosen.examples or chosen.file), limit=400)
        config = replace(config, shots=tuple(choose_examples(examples, chosen.shots, asked=asked)))
    return config


def answer_set(
    lm: RiskAwareLM, file: AnswerFile, data: Path, limit: int, *, until: float | None = None, **more: Any
) -> int:
    """Ask a model what it was not asked yet.

    Args:
        lm: The model.
        file: Place of the answers.
        data: Folder of the question sets.
        limit: Number of questions.
        until: Time, as ``time.monotonic`` gives it, after which no chunk begins; None: never.
        **more: Settings of ``EvaluationConfig``, e.g. ``samples``.

    Returns:
        The number of questions that are left.
    """
    questions = read_set(file.set, data, limit)
    config = choose_config(lm, file.set, data, questions, **more)
    judge, alike = build_judge(choose_default_judge(questions)), build_equivalence(config.clusters)
    done = {record.question.id for record in file.read()}
    left = [q for q in questions if q.id not in done]
    for first in range(0, len(left), CHUNK):
        if until is not None and time.monotonic() > until:
            return len(left) - first
        batch = ask_batch(lm, left[first : first + CHUNK], config, alike)
        batch.records = judge_records(batch.records, judge)
        file.append(batch, len(done) + first)
    return 0


def rescore_set(lm: RiskAwareLM, old: AnswerFile, new: AnswerFile, data: Path, limit: int) -> None:
    """Score answers that exist with the model's present scores, teacher-forced: no token is decoded.

    Texts, verdicts and drawn samples stay, and so do scores that only they give. Answers by choice are asked again.
    """
    questions = {q.id: q for q in read_set(old.set, data, limit)}
    config = choose_config(lm, old.set, data, list(questions.values()))
    done = {record.question.id for record in new.read()}
    left = [r for r in old.read() if r.question.id in questions and r.question.id not in done]
    if left and left[0].question.choices:
        raise ValueError(f"{old.path}: answers by choice come with the scores of one choice only; ask again")
    for first in range(0, len(left), CHUNK):
        part = left[first : first + CHUNK]
        batch = AnsweredBatch()
        prompts = [config.prompt(questions[r.question.id]) for r in part]
        # An answer of no token cannot be read again: it keeps its scores.
        texts = [(i, f" {r.answer}" if config.raw else str(r.answer)) for i, r in enumerate(part) if r.answer]
        with batch.timed("answer", 1):
            pairs = [(prompts[i], text) for i, text in texts]
            scored = score_teacher_forced(lm, pairs, raw=config.raw, alternatives=0, made="greedy")
        kept = [part[i] for i, _ in texts]
        batch.records = [add_scores(r, a.scores) for r, a in zip(kept, scored, strict=True)]
        if scored and scored[0].states is not None:
            batch.states = stack_states([a.states for a in scored])
        new.append(batch, len(done) + first)


def list_files(folder: Path) -> Iterator[AnswerFile]:
    """Yield all files of answers, by model, set and arm."""
    for path in sorted(folder.glob("*/*.jsonl")):
        name, _, arm = path.stem.partition(".")
        yield AnswerFile(folder, path.parent.name, name, arm)


def parse_models(texts: Sequence[str]) -> Mapping[str, str]:
    """Return models by name from ``NAME=FOLDER``."""
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (_, sign, folder) in zip(texts, pairs, strict=True) if not (sign and folder)]
    if wrong:
        raise SystemExit(f"--models takes NAME=FOLDER, got {wrong[0]!r}; try smollm2=models/smollm2")
    return {name: folder for name, _, folder in pairs}
