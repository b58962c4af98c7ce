"""A language model from bare to calibrated: ``prepare``, ``ask``, ``calibrate``.

``prepare`` answers questions without labels, so that each later answer says how many of those were less risky. With
answers that are known to be right, ``calibrate`` adds the probability that an answer is right, and whether to abstain.

    python examples/language_model.py                                  # the model of this package, a minute
    python examples/language_model.py --model ~/models/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from importlib.resources import files
from pathlib import Path

import comparison as c
import matplotlib

import selfdoubt
from selfdoubt import RiskAwareLM, metrics, pocket
from selfdoubt.preparation import PreparationConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUESTIONS = ("What is the capital of France?", "What is the capital of Mongolia?", "In which country is Zorbelheim?")


def read_unlabelled(model: str) -> list[str] | None:
    """Return the questions to prepare with: of this package's model those that it knows, else the usual ones."""
    if model != str(pocket.folder()):
        return None
    text = (files("selfdoubt.pocket") / "reference.jsonl").read_text(encoding="utf-8")
    return [json.loads(row)["question"] for row in text.splitlines()]


def read_labelled(count: int) -> list[tuple[str, list[str]]]:
    """Return questions of this package with their accepted answers."""
    text = (files("selfdoubt.pocket") / "evaluation.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(row) for row in text.splitlines()]
    step = len(rows) // count
    return [(row["question"], row["answers"]) for row in rows if row["answers"]][::step][:count]


def show(lm: RiskAwareLM, max_tokens: int) -> None:
    """Ask a few questions, and print the answers with all that is known of them."""
    for question in QUESTIONS:
        answer = lm.generate(question, max_tokens=max_tokens)
        percentile = "" if answer.percentile is None else f", riskier than {answer.percentile:.0%} of the reference"
        right = "" if answer.p_correct is None else f", right with probability {answer.p_correct:.2f}"
        print(f"  {question} {answer.text.strip()[:60]!r}: risk {answer.risk:.2f}{percentile}{right}")


def plot(records: list[tuple[float, bool]], out: Path) -> None:
    """Draw the accuracy of the answers that are left when the least probable ones are withheld."""
    ranked = sorted(records, key=lambda record: -record[0])
    right, shares, accuracies = 0, [], []
    for count, (_, correct) in enumerate(ranked, 1):
        right += correct
        shares.append(count / len(ranked))
        accuracies.append(right / count)
    figure, axes = plt.subplots(figsize=(6, 3.4))
    axes.plot(shares, accuracies, label="by p_correct, out of fold")
    axes.axhline(accuracies[-1], color="gray", linestyle="--", linewidth=1, label="all answers")
    axes.set_xlabel("share of questions that are answered")
    axes.set_ylabel("share of right answers")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8)
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "language_model.png", dpi=75)


def main() -> None:
    """Prepare, ask, evaluate and calibrate, and draw what abstaining is worth."""
    parser = argparse.ArgumentParser(description="From a bare language model to a calibrated one.")
    parser.add_argument("--model", default=str(pocket.folder()), help="folder of a model; the one of this package")
    parser.add_argument("--limit", type=int, default=48, help="questions to prepare with")
    parser.add_argument("--labelled", type=int, default=120, help="questions with known answers to calibrate with")
    parser.add_argument("--max-tokens", type=int, default=12)
    options, rest = c.read_options(parser=parser), parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        lm = RiskAwareLM.load(rest.model, wrapper=None)
        print("bare: the risk is a number of nats")
        show(lm, rest.max_tokens)

        config = PreparationConfig(max_tokens=rest.max_tokens)
        prepared = selfdoubt.prepare(
            rest.model, f"{folder}/prepared", read_unlabelled(rest.model), limit=rest.limit, config=config
        )
        print("prepared: it has a place among other answers")
        lm = RiskAwareLM.load(adapter=prepared.folder)
        show(lm, rest.max_tokens)

        evaluation = selfdoubt.evaluate(lm, read_labelled(rest.labelled), f"{folder}/run", draws=100)
        assert evaluation is not None
        result = selfdoubt.calibrate(evaluation, out=f"{folder}/calibrated", draws=0)
        print("calibrated: it has a probability")
        lm = RiskAwareLM.load(adapter=result.folder)
        show(lm, rest.max_tokens)
        records = [(p, bool(r.correct)) for p, r in zip(result.quality.out_of_fold, evaluation.records, strict=True)]
    p_correct, correct = zip(*records, strict=True)
    numbers = {
        "accuracy": sum(correct) / len(correct),
        "NLL": metrics.nll(p_correct, correct),
        "ECE": metrics.ece(p_correct, correct),
        "errors": metrics.auroc([-p for p in p_correct], correct),
    }
    plot(records, options.out)
    c.write("language_model", [c.Row(Path(rest.model).name, numbers)], options, answers=len(records))


if __name__ == "__main__":
    main()
