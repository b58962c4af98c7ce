"""What a risk is worth: how well each score finds wrong answers, at what cost, in the domain and outside.

The pocket base is fine-tuned on the same rows in the same order (plain LoRA, three voters, five samples, a scale
branch), with three seeds, then asked the same random part of the committed evaluation questions, all in held-out
phrasings. Some of them are also answered ten more times, for semantic entropy. Seeds are pooled; intervals are 95 %
bootstrap intervals over questions, and differences are paired.

    python -m benchmarks.quality [--atlas FOLDER] [--runs runs/quality]

What is trained or answered lies in the folder of runs and is not done again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from benchmarks import quality_tables, results
from benchmarks.score_rows import BASELINE, score_rows
from recipes.pocket import evaluation, voters
from selfdoubt import pocket, sample, sculpt, targets
from selfdoubt.calibration.fit import fit_calibration
from selfdoubt.data import question_sets
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.generate import AnsweredBatch
from selfdoubt.eval.judges.judge import judge_records
from selfdoubt.eval.judges.verdict import Judge, Verdict
from selfdoubt.eval.records import Question, Record
from selfdoubt.eval.run import ask_questions
from selfdoubt.lm.adapters.adapter import save_adapter
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.lm.scores import reference_quantiles
from selfdoubt.train.config import WrapperSettings

ARMS = ("plain", "vote", "sample", "sculpt")
#: Arms that are also asked again and again, and about their own answers.
PEERS = ("plain", "vote")
HEADS = ("score", "answer", "question", "members", "state")
#: Accuracy of the surest 1, 8, 9 and 35 %, and of all.
SUREST = ("accuracy_at_1", "accuracy_at_8", "accuracy_at_9", "accuracy_at_35", "accuracy")


@dataclass(frozen=True)
class Found:
    """An arm's answers of all seeds."""

    records: list[Record]
    category: list[str]
    seed: list[int]
    states: list[dict[str, Tensor]]  #: a seed each
    seconds: float  #: one answer, mean
    passes: dict[str, float]  #: seconds of each kind of pass, as times one answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atlas", type=Path, default=Path("../shared/data/atlas"))
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step-rows", type=int, default=24, help="rows of a training step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--sampled", type=int, default=300, help="questions answered ten more times")
    parser.add_argument("--draws", type=int, default=1000)
    chosen = parser.parse_args()
    rows: list[results.Row] = []
    accuracy: dict[str, Any] = {}
    for arm in ARMS:
        found = gather(arm, chosen, chosen.questions)
        accuracy[arm] = accuracies(found)
        rows += label_free(arm, found, chosen.draws)
        if arm in PEERS:
            again = gather(arm, chosen, chosen.sampled, peers=True)
            rows += label_free(arm, again, chosen.draws, only=(BASELINE, "mean_nll", *quality_tables.PEERS))
            rows += heads(arm, found, again, chosen.draws)
        print(arm, accuracy[arm], flush=True)
    settings = {name: value for name, value in vars(chosen).items() if name not in ("atlas", "runs")}
    print(results.write("quality", rows, **settings, accuracy=accuracy))


#: What each arm adds to the base; LoRA goes beneath all but voters.
WRAPPERS: dict[str, WrapperSettings | None] = {
    "plain": None,
    "vote": voters.VOTERS,
    "sample": sample.Wrapper(distribution=sample.Bernoulli(0.1)),
    "sculpt": sculpt.Wrapper(),
}


def tune(arm: str, out: Path, atlas: Path, steps: int, rows: int, seed: int) -> None:
    """Train an arm on the pocket base as all are trained, and write its adapter."""
    settings = WRAPPERS[arm]
    wrapper = settings and replace(settings, seed=seed)
    lora: dict[str, Any] = {"lora_r": 16, "lora_alpha": 16.0, "lora_targets": targets.DECODER_FILTER}
    voters.fine_tune(atlas, out, steps=steps, rows=rows, seed=seed, wrapper=wrapper, **lora)


def gather(arm: str, chosen: argparse.Namespace, limit: int, *, peers: bool = False) -> Found:
    """An arm's answers with all seeds; trained and asked where that has not been done."""
    questions = question_sets.load_questions("pocket", limit=limit)
    judge = strict()
    plan = EvaluationConfig(max_tokens=48, batch_size=50, samples=10 if peers else 0, p_true=peers)
    category = {q.id: q.category for q in evaluation.read_questions(pocket.evaluation_file())}
    parts: list[AnsweredBatch] = []
    for seed in chosen.seeds:
        out = chosen.runs / f"{arm}-{seed}"
        if not (out / "adapter" / "selfdoubt.json").is_file():
            tune(arm, out / "adapter", chosen.atlas, chosen.steps, chosen.step_rows, seed)
        lm = RiskAwareLM.load("pocket", adapter=out / "adapter", dtype="float32", device="cpu")
        lm.layers = () if peers else (1, 2, 3, 4)
        if not lm.reference:
            asked_once = [q for q in evaluation.read_questions(pocket.reference_file()) if not q.only_calibrates]
            reference = [q.question for q in asked_once[::2]]
            answers = lm.generate(reference, max_tokens=48, batch_size=64)
            save_adapter(lm.model, out / "adapter", base="pocket", extra={"reference": reference_quantiles(answers)})
            lm.reference = reference_quantiles(answers)
        asked = ask_questions(lm, questions, plan, out / ("peers" if peers else "answers"))
        assert asked is not None  # one process asks
        parts.append(AnsweredBatch(judge_records(asked.records, judge), asked.states, asked.costs))
    records = [r for part in parts for r in part.records]
    seconds = sum(part.costs["answer"].seconds for part in parts)
    passes = {
        name: sum(part.costs[name].seconds for part in parts) / seconds for name in parts[0].costs if name != "answer"
    }
    return Found(
        records,
        [category[r.question.id] for r in records],
        [seed for seed, part in zip(chosen.seeds, parts, strict=True) for _ in part.records],
        [part.states for part in parts],
        seconds / len(records),
        passes,
    )


def strict() -> Judge:
    """The pocket's own judge: the whole sentence must be right, not only the name in it."""
    known = {q.id: q for q in evaluation.read_questions(pocket.evaluation_file())}

    def judge(question: Question, answer: str | None) -> Verdict:
        return Verdict(evaluation.is_right(known[question.id], answer or ""))

    return judge


def accuracies(found: Found) -> dict[str, float]:
    """Share of right answers by category; in ``invented`` there is no right answer."""
    right: dict[str, list[bool]] = {}
    for category, record in zip(found.category, found.records, strict=True):
        right.setdefault(category, []).append(bool(record.correct))
    whole = {name: round(float(np.mean(own)), 3) for name, own in sorted(right.items())}
    return whole | {"all": round(float(np.mean([bool(r.correct) for r in found.records])), 3)}


def domains(found: Found) -> dict[str, np.ndarray]:
    """Which answers are looked at: all, each relation with enough mistakes, and subjects that nobody taught."""
    topic = np.array([r.question.topic for r in found.records])
    category = np.array(found.category)
    return {
        "all": np.ones(len(topic), bool),
        "country": topic == "country",
        "time zone": topic == "time zone",
        "never seen": np.isin(category, ["unseen", "invented"]),
    }


def label_free(arm: str, found: Found, draws: int, only: Sequence[str] | None = None) -> list[results.Row]:
    """A row for each score and domain: AUROC and PRR, and their paired difference to sequence probability."""
    rows: list[results.Row] = []
    for domain, use in domains(found).items():
        own = [r for r, u in zip(found.records, use, strict=True) if u]
        scores = {name: np.array([r.scores[name] for r in own]) for name in only or sorted(own[0].scores)}
        scores = {name: values for name, values in scores.items() if np.ptp(values) > 0}
        rows += score_rows(_about(arm, domain, "questions" if only is None else "sampled"), scores, own, draws)
    return rows


def heads(arm: str, found: Found, again: Found, draws: int) -> list[results.Row]:
    """The calibrated heads, in the domain (out of fold) and outside (one relation left out), and the accuracy of the
    surest shares of the mix."""
    inside: dict[str, np.ndarray] = {}
    outside: dict[str, np.ndarray] = {}
    seeds = np.array(found.seed)
    for head in HEADS:
        if head == "members" and arm == "plain":
            continue  # one member
        inside[head], outside[head] = np.full(len(seeds), np.nan), np.full(len(seeds), np.nan)
        for number, seed in enumerate(dict.fromkeys(found.seed)):
            own = [r for r, s in zip(found.records, found.seed, strict=True) if s == seed]
            _, report = fit_calibration(own, found.states[number] if head == "state" else None, candidates=[head])
            inside[head][seeds == seed] = np.array(report.out_of_fold, float)
            outside[head][seeds == seed] = np.array(report.out_of_topic, float)
    rows: list[results.Row] = []
    base = np.array([r.scores[BASELINE] for r in found.records])
    perplexity = np.array([r.scores["mean_nll"] for r in found.records])
    mix = mixed(found)
    for domain, p in (("in domain", inside), ("other relations", outside)):
        doubt = {f"p_correct: {head}": 1 - values for head, values in p.items()}
        about = _about(arm, domain, "questions")
        rows += score_rows(about, {BASELINE: base, "mean_nll": perplexity, **doubt}, found.records, draws)
        if "p_correct: members" in doubt:  # do the members add to the same head without them?
            more = {name: p[name] for name in ("question", "members")}
            more = {name: 1 - values for name, values in more.items()}
            about = _about(arm, f"{domain}, members", "questions")
            rows += score_rows(about, more, found.records, draws, baseline="question")
        place = {(r.question.id, s): i for i, (r, s) in enumerate(zip(found.records, found.seed, strict=True))}
        at = [place[r.question.id, s] for r, s in zip(again.records, again.seed, strict=True)]
        for peer in quality_tables.PEERS:
            values = np.array([r.scores[peer] for r in again.records])
            against = {peer: values, **{name: own[at] for name, own in doubt.items()}}
            about = _about(arm, f"{domain}, against {peer}", "sampled")
            rows += score_rows(about, against, again.records, draws, baseline=peer)
        surest = {BASELINE: base[mix], "rank_nll": _scores(found, "rank_nll")[mix]}
        surest |= {name: own[mix] for name, own in doubt.items()}
        own_mix = [r for r, u in zip(found.records, mix, strict=True) if u]
        rows += score_rows(_about(arm, f"mix, {domain}", "questions"), surest, own_mix, draws, metrics=SUREST)
    rows.append({
        "model": "pocket", "arm": arm, "domain": "cost", "score": "one answer", "metric": "seconds",
        "value": round(found.seconds, 5), **{f"times {name}": round(v, 2) for name, v in again.passes.items()},
    })  # fmt: skip
    return rows


def mixed(found: Found) -> np.ndarray:
    """All unseen and invented subjects, and a fixed part of the others, so that about half of the answers are right."""
    room = {"known": 75, "rare": 75, "ambiguous": 50}
    kept: dict[tuple[int, str], int] = {}
    use = []
    for category, seed in zip(found.category, found.seed, strict=True):
        kept[seed, category] = kept.get((seed, category), 0) + 1
        use.append(kept[seed, category] <= room.get(category, 10**9))
    return np.array(use)


def _about(arm: str, domain: str, part: str) -> results.Row:
    return {"model": "pocket", "arm": arm, "domain": domain, "part": part}


def _scores(found: Found, name: str) -> np.ndarray:
    return np.array([r.scores[name] for r in found.records])


table: Callable[[dict[str, Any]], str] = quality_tables.table

if __name__ == "__main__":
    main()
