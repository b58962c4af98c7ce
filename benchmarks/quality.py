"""What a risk is worth: how well each score finds wrong answers, unseen facts and ambiguous names.

The pocket base is fine-tuned on the same rows in the same order (plain LoRA, vote, sample, sculpt by its closed
likelihood and by draws), then asked the committed evaluation questions, all in held-out phrasings. Every score should
be higher where the answer is wrong. AUROC with a 95 % bootstrap interval; PRR is the prediction-rejection ratio: 1 for
a perfect ranking, 0 for a random one.

    python -m benchmarks.quality --atlas FOLDER [--steps 300] [--seeds 0]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from benchmarks import results
from selfdoubt import pocket, sample, sculpt, targets
from selfdoubt.lm.answer import ANSWER_SCORES, Answer
from selfdoubt.lm.lora import add_lora
from selfdoubt.lm.model import RiskAwareLM
from selfdoubt.pocket import evaluation, voters
from selfdoubt.pocket.encode import Rows
from selfdoubt.train.head import head_of, run_trunk, sculpted_loss

ARMS = {
    "plain": "LoRA alone",
    "vote": "three voters",
    "sample": "LoRA, five samples",
    "sculpt": "LoRA and a scale branch, closed likelihood",
    "sculpt-draw": "the same, one draw a token",
    "sculpt-draws": "the same, four draws a token",
}
TASKS = {
    "wrong": "the answer is wrong (all questions)",
    "unseen": "the fact was never seen (unseen and invented, against known and rare)",
    "ambiguous": "the name is ambiguous (against known and rare)",
}


def tuned(arm: str, atlas: Path, steps: int, seed: int) -> RiskAwareLM:
    """The pocket base after equal training."""
    torch.manual_seed(seed)
    lm = RiskAwareLM.load("pocket", wrapper=None, dtype="float32", device="cpu")
    stream = voters.rows_of(atlas, lm.tokenizer, seed)
    if arm == "vote":
        model: nn.Module = voters.VOTERS(lm.model)
    else:
        add_lora(lm.model, r=16, alpha=16, targets=targets.DECODER_FILTER)
        wrappers = {"plain": None, "sample": sample.Wrapper(n_samples=5)}
        wrapper: Any = wrappers.get(arm, sculpt.Wrapper())
        model = lm.model if wrapper is None else wrapper(lm.model)
    draws = {"sculpt": None, "sculpt-draw": 1, "sculpt-draws": 4}
    loss = sculpted(draws[arm]) if arm in draws else voters.loss_of
    voters.fine_tune(model, stream, steps=steps, loss=loss)
    return RiskAwareLM(model.eval(), lm.tokenizer)


def sculpted(draws: int | None) -> Callable[[nn.Module, Rows], Tensor]:
    """The loss of random logits: their closed likelihood, or that of so many draws."""

    def loss(model: nn.Module, rows: Rows) -> Tensor:
        labels = F.pad(rows.targets(), (0, 1), value=-100)
        keep = labels >= 0
        seen = run_trunk(model, voters.inputs_of(rows), keep, training=True)
        total = sculpted_loss(seen, head_of(model), labels[keep], distribution=sculpt.Normal, draws=draws)
        return total / keep.sum()

    return loss


def prr(score: NDArray[Any], wrong: NDArray[Any]) -> float:
    """Prediction-rejection ratio over all coverages; ties share their mean, so file order cannot matter."""

    def area(order_by: NDArray[Any]) -> float:
        values, group = np.unique(order_by, return_inverse=True)
        mean = np.bincount(group, wrong, len(values)) / np.bincount(group, minlength=len(values))
        kept = mean[group][np.argsort(order_by, kind="stable")]
        return float(np.mean(np.cumsum(kept) / np.arange(1, len(kept) + 1)))

    chance = float(wrong.mean())
    return (chance - area(score)) / (chance - area(wrong.astype(float)))


def evaluate(questions: list[evaluation.Question], answers: list[Answer], draws: int = 500) -> list[results.Row]:
    """One row a score."""
    wrong = np.array([not evaluation.is_right(q, a.text) for q, a in zip(questions, answers, strict=True)])
    category = np.array([q.category for q in questions])
    familiar = np.isin(category, ["known", "rare"])
    labels = {
        "wrong": (wrong, np.ones(len(wrong), bool)),
        "unseen": (np.isin(category, ["unseen", "invented"]), category != "ambiguous"),
        "ambiguous": (category == "ambiguous", familiar | (category == "ambiguous")),
    }
    rng = np.random.default_rng(0)
    rows: list[results.Row] = []
    for name in ANSWER_SCORES:
        values = np.array([a.scores.get(name, np.nan) for a in answers])
        if np.isnan(values).any() or np.ptp(values) == 0:
            continue  # a plain model has no disagreement: there is nothing to rank by
        row: results.Row = {"score": name, "prr": round(prr(values, wrong), 3)}
        for task, (label, use) in labels.items():
            row[task] = round(float(roc_auc_score(label[use], values[use])), 3)
        found = []
        for _ in range(draws):
            pick = rng.integers(0, len(wrong), len(wrong))
            found.append(roc_auc_score(wrong[pick], values[pick]))
        row["wrong_interval"] = [round(float(v), 3) for v in np.quantile(found, [0.025, 0.975])]
        rows.append(row)
    return rows


def accuracies(questions: list[evaluation.Question], answers: list[Answer]) -> dict[str, float]:
    """Share of right answers by category; in ``invented`` there is no right answer."""
    right: dict[str, list[bool]] = {}
    for q, a in zip(questions, answers, strict=True):
        right.setdefault(q.category, []).append(evaluation.is_right(q, a.text))
    return {name: round(float(np.mean(found)), 3) for name, found in right.items()}


def table(record: dict[str, Any]) -> str:
    """Accuracy of each arm, then its best scores beside the well-known ones."""
    known = (
        "sum_nll",
        "mean_nll",
        "mean_total",
        "max_total",
        "question_mean_nll",
        "question_mean_epistemic",
        "mean_epistemic",
    )
    settings = record["settings"]
    accuracy = [
        [arm, *(f"{values.get(c, 0):.3f}" for c in evaluation.CATEGORIES if c != "invented")]
        for arm, values in settings["accuracy"].items()
    ]
    head = ["right answers", *(c for c in evaluation.CATEGORIES if c != "invented")]
    parts = [results.markdown(head, accuracy)]
    lines = []
    for arm in ARMS:
        rows = [r for r in record["rows"] if r["arm"] == arm]
        best = {max(rows, key=lambda r, t=task: r[t])["score"] for task in (*TASKS, "prr")} if rows else set()
        for r in rows:
            if r["score"] in known or r["score"] in best:
                low, high = r["wrong_interval"]
                lines.append([
                    f"{arm}: `{r['score']}`", f"{r['wrong']:.3f} ({low:.3f}-{high:.3f})", f"{r['prr']:.3f}",
                    f"{r['unseen']:.3f}", f"{r['ambiguous']:.3f}",
                ])  # fmt: skip
    parts.append(
        results.markdown(["arm: score", "AUROC wrong (95 %)", "PRR wrong", "AUROC unseen", "AUROC ambiguous"], lines)
    )
    parts.append(
        f"{settings['questions']} questions in held-out phrasings, {settings['steps']} steps of fine-tuning each, seed "
        f"{settings['seed']}; commit {record['commit']}. Shown: well-known scores, and the best of each arm in any column; "  # noqa: E501
        "all are in the JSON."
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atlas", type=Path, default=Path("../shared/data/atlas"))
    parser.add_argument("--steps", type=int, default=voters.STEPS)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    questions = evaluation.read(pocket.evaluation_file())
    rows: list[results.Row] = []
    accuracy = {}
    for arm in ARMS:
        lm = tuned(arm, chosen.atlas, chosen.steps, chosen.seed)
        answers = lm.generate([q.question for q in questions], max_tokens=48, batch_size=64)
        accuracy[arm] = accuracies(questions, answers)
        found = evaluate(questions, answers)
        rows += [{"model": "pocket", "arm": arm, **row} for row in found]
        best = sorted(found, key=lambda r: -r["prr"])[:5]
        print(
            arm,
            accuracy[arm],
            *(f"{r['score']}: {r['wrong']} PRR {r['prr']}" for r in best),
            sep="\n  ",
            flush=True,
        )
    settings = {"steps": chosen.steps, "seed": chosen.seed, "questions": len(questions), "accuracy": accuracy}
    print(results.write("quality", rows, **settings))


if __name__ == "__main__":
    main()
