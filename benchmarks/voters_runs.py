"""What is trained and answered for ``benchmarks.voters``: each part lies in a folder of runs and is not done again."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfdoubt import sample, vote
from selfdoubt.data.question_sets import load_questions
from selfdoubt.data.questions import Question
from selfdoubt.errors import DataError
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.judges.judge import judge_records
from selfdoubt.eval.judges.rules import build_judge
from selfdoubt.eval.prompts import Prompting, build_prompt
from selfdoubt.eval.records import Record, add_scores, read_records, save_records
from selfdoubt.eval.run import ask_questions, resolve_config
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.train import TrainConfig, fit

#: The instruction of every prompt, in training and evaluation alike: shorter than the template's usual one.
INSTRUCTION = "Answer briefly."
HOW = Prompting("chat", INSTRUCTION, system=True)
FILES = {
    "webquestions": "webquestions/test.json",
    "nq": "nq_open/NQ-open.dev.jsonl",
    "trivia": "opentriviaqa/opentriviaqa.jsonl",
}
#: Names of the runs of ``real_runs`` in which the plain model answered these sets.
KNOWN_RUNS = {"webquestions": "wq.plain", "nq": "nq.plain"}
#: Files that are learnt from. NQ-open has no training file here, and the questions of EfficientQA are others.
TRAINING = {"webquestions": "webquestions/trainmodel.json", "nq": "nq_open/NQ-open.efficientqa.dev.1.1.jsonl"}


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune the base, at the cost of the others: as many steps, and row passes in each."""

    about: str
    settings: Mapping[str, Any]  #: fields of ``TrainConfig``
    row_share: float = 1.0  #: rows of a step, as a share of the usual number
    steps: float = 1.0  #: steps, as times the usual number: not at equal cost where it is not 1


def _voters(**settings: Any) -> dict[str, Any]:
    return {"wrapper": vote.Wrapper(**{"n_voters": 3, "rank": 16, "weight_noise": 0.03, **settings})}


_QV = "q_proj|v_proj"
_LORA = {"lora_r": 48, "lora_alpha": 48.0, "lora_targets": _QV}


def _samples(noise: sample.Normal | sample.Bernoulli) -> dict[str, Any]:
    return {"wrapper": sample.Wrapper(n_samples=5, distribution=noise), **_LORA}


_ALL_LINEAR = r"(q|k|v|o|gate|up|down)_proj\.weight$"
ARMS: dict[str, Arm] = {
    "lora": Arm(
        "one LoRA of rank 48 on q and v: as many trainable parameters as three voters of rank 16",
        {"wrapper": None, **_LORA},
    ),
    "vote": Arm("three voters of rank 16 on q and v, each with its share of every batch (split)", _voters()),
    "vote-all": Arm(
        "the same, each voter with all rows of every batch (repeat), a third as many rows", {
            **_voters(), "voter_batch": "repeat",
        }, row_share=1 / 3,
    ),
    "vote-wide": Arm(
        "three voters of rank 16 on all linear layers of the decoder, split",
        _voters(param_filter=_ALL_LINEAR),
    ),
    "vote-rank": Arm("three voters of rank 64 on q and v, split", _voters(rank=64)),
    "vote-noise": Arm("three voters of rank 16 on q and v, initial noise 0.2 (the default), split",
                      _voters(weight_noise=0.2)),
    "vote-long": Arm("as vote, three times the steps", _voters(), steps=3.0),
    "sample": Arm(
        "one LoRA of rank 48 on q and v, five samples of normal noise of 0.1 (the default)",
        _samples(sample.Normal(0.1)),
    ),
    "sample-dropout": Arm(
        "the same, samples of dropout of 0.1", _samples(sample.Bernoulli(0.1)),
    ),
    "lora-long": Arm(
        "as lora, three times the steps",
        {"wrapper": None, **_LORA}, steps=3.0,
    ),
}  # fmt: skip
PLAIN = "plain"
Load = Callable[[], RiskAwareLM]


@dataclass(frozen=True)
class Budget:
    """Numbers that decide how long a run takes."""

    steps: int
    step_rows: int
    max_tokens: int
    batch_size: int
    seed: int
    lr: float


@dataclass(frozen=True)
class Sample:
    """Questions of a set, each with its weight: the number of the set's questions that it stands for, mean 1."""

    questions: tuple[Question, ...]
    weights: Mapping[str, float]  #: by question id


def draw_sample(
    questions: Sequence[Question], easy: frozenset[str] | None, n_easy: int, n_others: int, seed: int
) -> Sample:
    """Draw questions at random, those that the plain model answered right before more often than the others.

    A small model answers few questions right: drawn evenly, most of a small sample would be wrong answers, and
    intervals wide. With the weights a mean over the sample estimates the mean over the set (Horvitz and Thompson,
    1952).

    Args:
        questions: The set.
        easy: Texts of the questions that were answered right; None draws evenly.
        n_easy: Number to draw of these.
        n_others: Number to draw of the others; of all, drawn evenly, their sum.
        seed: Seed of the draw.
    """
    draw = random.Random(seed)
    if easy is None:
        strata = [(list(questions), n_easy + n_others)]
    else:
        groups = [[q for q in questions if (q.text in easy) is right] for right in (True, False)]
        strata = list(zip(groups, (n_easy, n_others), strict=True))
    weights: dict[str, float] = {}
    for group, n in strata:
        chosen = draw.sample(group, min(n, len(group)))
        weights |= {q.id: len(group) / len(chosen) for q in chosen}
    total = sum(weights.values())
    weights = {name: weight * len(weights) / total for name, weight in weights.items()}
    return Sample(tuple(q for q in questions if q.id in weights), weights)


def read_known(file: Path | None, run: str | None) -> tuple[frozenset[str], frozenset[str]] | None:
    """Return the texts of all questions of an earlier run, and of those answered right; None without such a run."""
    if file is None or run is None:
        return None
    with gzip.open(file, "rt", encoding="utf-8") as text:
        rows = [row for row in map(json.loads, text) if row["run"] == run]
    return frozenset(r["question"] for r in rows), frozenset(r["question"] for r in rows if r["correct"])


def read_sample(name: str, data: Path, known: Path | None, n_easy: int, n_others: int) -> Sample:
    """Read a set's questions that no arm learns from, and draw the sample that all arms are asked."""
    learnt = {q.text for file in TRAINING.values() for q in load_questions(data / file)}
    questions = [q for q in load_questions(data / FILES[name]) if q.text not in learnt]
    before = read_known(known, KNOWN_RUNS.get(name))
    if before is not None:
        questions = [q for q in questions if q.text in before[0]]
    return draw_sample(questions, before and before[1], n_easy, n_others, seed=0)


def write_training_file(name: str, data: Path, out: Path) -> Path:
    """Write a set's training rows as chats with the instruction; of several right answers the first is learnt."""
    file = out / f"train-{name}.jsonl"
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        chats = [
            [*build_prompt(q, how=HOW), {"role": "assistant", "content": q.answers[0]}]
            for q in load_questions(data / TRAINING[name])
            if q.answers
        ]
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return file


def tune(arm: Arm, model: str, file: Path, out: Path, budget: Budget, device: str) -> Path:
    """Train an arm on the base, as all are trained, unless it lies in ``out``; return the adapter folder."""
    if (out / "selfdoubt.json").is_file() or (out / "adapter_config.json").is_file():
        return out
    settings = dict(arm.settings)
    if settings["wrapper"] is not None:
        settings["wrapper"] = replace(settings["wrapper"], seed=budget.seed)
    steps = round(budget.steps * arm.steps)
    return fit(
        TrainConfig(
            data=str(file), out=str(out), model=model, seed=budget.seed, max_length=96, val_share=0.01, val_every=1.0,
            epochs=1000, max_steps=steps, batch_size=round(budget.step_rows * arm.row_share), lr=budget.lr,
            schedule="cosine", warmup=steps // 20, dtype="bfloat16", accelerator="cpu" if device == "cpu" else "gpu",
            loggers="csv", reference=0, progress=False, **settings,
        )
    )  # fmt: skip


def ask(load: Load, sample: Sample, out: Path, budget: Budget) -> list[Record]:
    """Ask a sample, unless its answers lie next to ``out``, and judge them: by ``contains``, or by choice.

    Args:
        load: Loads the model, where it is needed.
        sample: The questions.
        out: Folder of the batches that are done; the answers are written next to it, with the suffix ``.jsonl``.
        budget: Numbers that decide how long a run takes.

    Raises:
        DataError: If the stored answers are those of other questions.
    """
    file = out.with_suffix(".jsonl")
    if not file.is_file():
        config = EvaluationConfig(how=HOW, max_tokens=budget.max_tokens, batch_size=budget.batch_size)
        answered = ask_questions(load(), sample.questions, config, out)
        assert answered is not None  # one process asks
        judge = build_judge("choice" if sample.questions[0].choices else "contains")
        save_records(file, judge_records(answered.records, judge))
    records = read_records(file)
    if [r.question.id for r in records] != [q.id for q in sample.questions]:
        raise DataError(f"{file} holds answers to other questions than this run asks; give another folder of --runs")
    return records


def judge_again(answers: Mapping[str, Mapping[str, list[Record]]], judge: str) -> dict[str, dict[str, list[Record]]]:
    """Return the records of all arms and sets with the verdicts of another judge; choices keep theirs."""
    chosen = build_judge(judge)
    return {
        arm: {
            name: records
            if records[0].question.choices
            else judge_records([replace(r, correct=None, grade=None, note=None) for r in records], chosen)
            for name, records in by_set.items()
        }
        for arm, by_set in answers.items()
    }


def add_base_scores(load: Load, records: Sequence[Record], file: Path, budget: Budget) -> list[Record]:
    """Add what the plain base thinks of the same answers, unless ``file`` holds it: the cost of one more row.

    ``base_nll`` and ``base_total`` are the sums of surprisal and entropy under the base, nats; ``base_gain`` is
    log p(answer) - log p_base(answer): how much more probable the answer is than under the base, one draw from the
    divergence between the two.
    """
    if not file.is_file():
        base = load()
        config = resolve_config(EvaluationConfig(how=HOW), base)
        order = sorted(range(len(records)), key=lambda i: -len(records[i].answer or ""))
        scores: dict[int, dict[str, float]] = {}
        for first in range(0, len(order), budget.batch_size):
            rows = [i for i in order[first : first + budget.batch_size] if (records[i].answer or "").strip()]
            pairs = [(config.prompt(records[i].question), records[i].answer or "") for i in rows]
            for i, answer in zip(rows, base.score_batch(pairs, alternatives=0) if rows else [], strict=True):
                nll, total = answer.scores["sum_nll"], answer.scores["sum_total"]
                scores[i] = {"base_nll": nll, "base_total": total, "base_gain": nll - records[i].scores["sum_nll"]}
        save_records(file, [add_scores(r, scores.get(i, {})) for i, r in enumerate(records)])
    return read_records(file)


def clean(out: Path) -> None:
    """Remove checkpoints and logs of a finished training, but not its losses."""
    for part in (out / "run").glob("*.ckpt"):
        part.unlink()
    shutil.rmtree(out / "run" / "data", ignore_errors=True)
