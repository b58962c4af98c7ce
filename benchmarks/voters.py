"""Do voters earn their place on a real model? Voters against one LoRA, trained at equal cost on real questions.

Each arm is fine-tuned on the training questions of one set: the same rows in the same order, as many steps, as many row
passes in each. Then it answers questions of that set and of others. Heads (logistic, as ``calibrate`` fits them) learn
on one set's answers, and are tested on the same set (out of fold) and on the others. The question: does a head that
reads members' scores beat the same head without them outside its domain, by more than 0.01 PRR and with a paired
interval above zero? Control: what one more row of the plain base tells of the same answers.

    python -m benchmarks.voters --model FOLDER --data ../shared/data [--device cuda --steps 600]

What is trained or answered lies in the folder of runs and is not done again; results are written after each arm.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results, voters_runs, voters_table
from benchmarks.score_rows import METRICS, round_estimate, score_rows
from benchmarks.voters_runs import ARMS, PLAIN, TRAINING, Budget, Sample
from benchmarks.voters_table import WITHOUT
from selfdoubt.calibration import heads
from selfdoubt.calibration.arrays import number_questions
from selfdoubt.calibration.heads import CalibrationAnswers
from selfdoubt.eval.records import Record
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.scores import Score
from selfdoubt.metrics import estimate_mean
from selfdoubt.metrics.bootstrap import compare_systems

#: Arms in the order in which they are worth their time.
USUAL = (PLAIN, "lora", "vote", "vote-all")
CONTROL = "lora"
#: A text that contains an accepted answer is right; or one that is about as long as it. The first favours long answers:
#: a sentence of twenty tokens holds more names than a name alone.
JUDGES = ("contains", "f1:0.5")
#: Scores without labels that are shown, where a model has them.
LABEL_FREE = (
    "sum_nll", "mean_nll", "sum_total", "mean_total", "both_mean_total", "question_mean_nll", "sum_epistemic",
    "mean_epistemic", "question_mean_epistemic", "sum_disagreement", "base_nll", "base_gain",
)  # fmt: skip
_ON_ANSWER = ("sum_epistemic", "mean_epistemic")
_MEMBERS = ("question_mean_epistemic", *_ON_ANSWER, "mean_disagreement", "mean_spread")
_BASE = ("base_nll", "base_total", "base_gain")
#: Further scores that a head reads, next to surprisal and entropy of answer and question. "members" is the candidate of
#: ``fit_calibration``.
HEADS: dict[str, tuple[str, ...]] = {
    WITHOUT: (),
    "members": ("question_mean_epistemic",),
    "members on the answer": _ON_ANSWER,
    "all members' scores": _MEMBERS,
    "base": _BASE,
    "base and members": (*_BASE, *_MEMBERS),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(Path("~/.cache/real-models/smollm2").expanduser()))
    parser.add_argument("--name", default="135m", help="short name of the model in the results")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--known", type=Path, help="earlier answers by which samples are balanced (.jsonl.gz)")
    parser.add_argument("--runs", type=Path, default=Path("runs/voters"))
    parser.add_argument("--arms", nargs="+", choices=[PLAIN, *ARMS], default=list(USUAL))
    parser.add_argument("--train-on", nargs="+", choices=list(TRAINING), default=["webquestions"])
    parser.add_argument("--sets", nargs="+", choices=list(voters_runs.FILES), default=list(voters_runs.FILES))
    parser.add_argument("--easy", type=int, default=250, help="questions of a set that the plain model gets right")
    parser.add_argument("--others", type=int, default=250, help="further questions of a set")
    parser.add_argument("--choices", type=int, default=200, help="questions of the set with choices")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--step-rows", type=int, default=12, help="row passes of a training step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--max-tokens", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without-base", action="store_true", help="leave out what the plain base tells of answers")
    parser.add_argument(
        "--stored", action="store_true", help="measure what lies in the folder of runs, and ask nothing"
    )
    chosen = parser.parse_args(arguments)
    budget = Budget(chosen.steps, chosen.step_rows, chosen.max_tokens, chosen.batch_size, chosen.seed, chosen.lr)
    samples = {
        name: voters_runs.read_sample(name, chosen.data, chosen.known, *_sizes(name, chosen)) for name in chosen.sets
    }
    rows: list[results.Row] = []
    for trained_on in chosen.train_on:
        answers: dict[str, dict[str, list[Record]]] = {}
        for arm in chosen.arms:
            answers[arm] = gather(arm, trained_on, samples, budget, chosen)
            if chosen.stored and arm != chosen.arms[-1]:
                continue  # nothing takes long between two arms
            rows = [r for r in rows if r["trained on"] != trained_on]
            for judge in JUDGES:
                about = {"model": chosen.name, "trained on": trained_on, "judge": judge}
                rows += measure(voters_runs.judge_again(answers, judge), samples, about, chosen.draws)
            write(rows, samples, chosen)


def _sizes(name: str, chosen: argparse.Namespace) -> tuple[int, int]:
    return (0, chosen.choices) if name == "trivia" else (chosen.easy, chosen.others)


def write(rows: list[results.Row], samples: Mapping[str, Sample], chosen: argparse.Namespace) -> None:
    """Write the rows so far, and the settings that they were measured with."""
    settings = {
        k: v for k, v in vars(chosen).items() if k not in ("data", "runs", "known", "model", "name", "arms", "stored")
    }
    settings |= {"questions": {name: len(sample.questions) for name, sample in samples.items()}}
    settings |= {"arms": {name: ARMS[name].about for name in ARMS}, "balanced": chosen.known is not None}
    print(results.write("voters", rows, **settings), flush=True)


def gather(
    arm: str, trained_on: str, samples: Mapping[str, Sample], budget: Budget, chosen: argparse.Namespace
) -> dict[str, list[Record]]:
    """Return an arm's judged answers by set; trained and asked where that has not been done."""
    out = chosen.runs / PLAIN if arm == PLAIN else chosen.runs / trained_on / arm
    load = partial(RiskAwareLM.load, chosen.model, dtype="bfloat16", device=chosen.device)

    @cache
    def load_base() -> RiskAwareLM:
        return load(wrapper=None)

    @cache
    def load_arm() -> RiskAwareLM:
        if arm == PLAIN:
            return load_base()
        file = voters_runs.write_training_file(trained_on, chosen.data, chosen.runs)
        adapter = voters_runs.tune(ARMS[arm], chosen.model, file, out / "adapter", budget, chosen.device)
        voters_runs.clean(adapter)
        return load(adapter=adapter)

    answered: dict[str, list[Record]] = {}
    for name, sample in samples.items():
        if chosen.stored and not (out / f"{name}.jsonl").is_file():
            continue
        records = voters_runs.ask(load_arm, sample, out / name, budget)
        file = out / f"{name}-base.jsonl"
        if arm != PLAIN and (file.is_file() or not (chosen.without_base or chosen.stored)):
            records = voters_runs.add_base_scores(load_base, records, file, budget)
        answered[name] = records
    return answered


def measure(
    answers: Mapping[str, Mapping[str, list[Record]]], samples: Mapping[str, Sample], about: results.Row, draws: int
) -> list[results.Row]:
    """Return all rows of the arms so far: accuracy, scores without labels, heads, and heads of two arms compared."""
    rows: list[results.Row] = []
    doubts: dict[str, dict[tuple[str, str], dict[str, np.ndarray]]] = {}
    for arm, by_set in answers.items():
        of_arm = {**about, "arm": arm}
        for name, records in by_set.items():
            others = {a: answers[a][name] for a in (PLAIN, CONTROL) if a != arm and name in answers.get(a, {})}
            rows += accuracy_rows({**of_arm, "tested on": name}, records, others, samples[name].weights, draws)
            scores = {s: np.array([r.scores.get(s, math.nan) for r in records]) for s in LABEL_FREE}
            scores = {s: v for s, v in scores.items() if not np.isnan(v).all() and np.nanstd(v) > 1e-6}
            rows += score_rows({**of_arm, "tested on": name, "kind": "label-free"}, scores, records, draws)
        doubts[arm] = predict_doubts(by_set)
        for (learnt, tested), by_head in doubts[arm].items():
            place = {**of_arm, "fitted on": learnt, "tested on": tested, "kind": "head"}
            rows += score_rows(place, by_head, by_set[tested], draws, baseline=WITHOUT)
    for arm in doubts:
        if arm not in (CONTROL, PLAIN):
            for pair, by_head in doubts[arm].items():
                if pair not in doubts.get(CONTROL, {}):
                    continue
                place = {**about, "arm": arm, "fitted on": pair[0], "tested on": pair[1], "kind": "against lora"}
                sides = {a: answers[a][pair[1]] for a in (CONTROL, arm)}
                rows += compare_arms(place, sides, doubts[CONTROL][pair], by_head, draws)
    return rows


def accuracy_rows(
    about: results.Row,
    records: Sequence[Record],
    others: Mapping[str, Sequence[Record]],
    weights: Mapping[str, float],
    draws: int,
) -> list[results.Row]:
    """Return the accuracy over the whole set, estimated from the sample, and its paired differences to other arms'."""
    weight = np.array([weights[r.question.id] for r in records])
    right = np.array([bool(r.correct) for r in records], float)
    value, interval = round_estimate(estimate_mean((weight * right).tolist(), draws=draws))
    row: results.Row = {
        **about, "kind": "accuracy", "value": value, "interval": interval, "answers": len(records),
        "right in the sample": round(float(right.mean()), 4),
    }  # fmt: skip
    for name, theirs in others.items():
        gap = weight * (right - np.array([bool(r.correct) for r in theirs], float))
        row[f"to {name}"], row[f"to {name}, interval"] = round_estimate(estimate_mean(gap.tolist(), draws=draws))
    return [row]


def predict_doubts(by_set: Mapping[str, Sequence[Record]]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Return 1 - p_correct of each head, by the set that it was fitted on and the set that it was tested on.

    On its own set a head is fitted in five folds. The set of choices is only tested: there an answer is not generated.
    """
    arrays = {name: build_answers(records) for name, records in by_set.items()}
    doubts: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for learnt, answers in arrays.items():
        if by_set[learnt][0].question.choices:
            continue
        for head, names in name_heads(answers.names).items():
            fit = partial(heads.fit_logistic, names=names)
            inside = heads.predict_held_out(answers, heads.split_folds(answers, 5, 0), fit, 0)
            doubts.setdefault((learnt, learnt), {})[head] = 1 - inside
            whole = fit(answers, 0)
            for tested, others in arrays.items():
                if tested != learnt and set(names) <= set(others.names):
                    doubts.setdefault((learnt, tested), {})[head] = 1 - heads.predict(whole, others)
    return doubts


def build_answers(records: Sequence[Record]) -> CalibrationAnswers:
    """Return records as arrays, with the scores that all of them have and that vary; an empty answer keeps its row."""
    names = sorted(set.intersection(*(set(r.scores) for r in records if r.answer)))
    table = np.array([[r.scores.get(name, 0.0) for name in names] for r in records], np.float64)
    varies = np.ptp(table, axis=0) > 1e-6 * np.maximum(1, np.abs(table).max(0))  # one member's epistemic is rounding
    return CalibrationAnswers(
        names=tuple(name for name, v in zip(names, varies, strict=True) if v),
        scores=table[:, varies],
        states={},
        correct=np.array([bool(r.correct) for r in records]),
        questions=number_questions(records),
    )


def name_heads(names: Sequence[str]) -> dict[str, list[str]]:
    """Return the scores that each head reads; a head is left out where a score of it is missing."""
    usual = [name for name in names if _is_usual(name)]
    return {head: [*usual, *more] for head, more in HEADS.items() if set(more) <= set(names)}


def _is_usual(name: str) -> bool:
    """Return whether a score is a surprisal or an entropy of the answer or the question, as ``calibrate`` reads."""
    if name.startswith(("base_", "choice_", "rank_")):
        return False
    score = Score.parse(name)
    return str(score) != "rauq" and score.signal in ("nll", "total") and score.part in ("answer", "question")


def compare_arms(
    about: results.Row,
    sides: Mapping[str, Sequence[Record]],
    control: Mapping[str, np.ndarray],
    heads_of_arm: Mapping[str, np.ndarray],
    draws: int,
) -> list[results.Row]:
    """Return rows that compare an arm's doubts with the control's on the same questions, each with its own answers."""
    theirs, ours = sides.values()
    pairs = [(WITHOUT, name) for name in heads_of_arm]
    pairs += [("base", name) for name in ("base", "base and members") if "base" in control and name in heads_of_arm]
    rows = []
    for before, after in pairs:
        for metric in METRICS:
            compared = compare_systems(
                metric,
                [(float(d), bool(r.correct)) for d, r in zip(control[before], theirs, strict=True)],
                [(float(d), bool(r.correct)) for d, r in zip(heads_of_arm[after], ours, strict=True)],
                draws=draws,
            )
            gain, interval = round_estimate(compared.difference)
            rows.append({
                **about, "score": after, "against": f"lora: {before}", "metric": metric,
                "value": None if compared.b is None else round(compared.b, 4), "gain": gain, "gain_interval": interval,
            })  # fmt: skip
    return rows


table: Callable[[dict[str, Any]], str] = voters_table.table

if __name__ == "__main__":
    main()
