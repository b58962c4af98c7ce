"""A language model from bare to calibrated: ``prepare``, ``ask``, ``calibrate``.

``prepare`` answers questions without labels, so that each later answer says how many of those were less risky. With
answers that are known to be right, ``calibrate`` adds the probability that an answer is right, and whether to abstain.

    python examples/language_model.py                                  # the model of this package, a minute
    python examples/language_model.py --model ~/models/SmolLM2-135M-Instruct --data questions.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from importlib.resources import files
from pathlib import Path

import comparison as c
import matplotlib

import selfdoubt
from selfdoubt import RiskAwareLM, metrics, pocket
from selfdoubt.data import Question, load_questions
from selfdoubt.errors import SelfdoubtError
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.preparation import PreparationConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POCKET = str(pocket.folder())
QUESTIONS = ("What is the capital of France?", "What is the capital of Mongolia?", "In which country is Zorbelheim?")


def read_unlabelled(model: str) -> list[str] | None:
    """Return the questions to prepare with: of this package's model those that it knows, else the usual ones."""
    if model != POCKET:
        return None
    text = (files("selfdoubt.pocket") / "reference.jsonl").read_text(encoding="utf-8")
    return [json.loads(row)["question"] for row in text.splitlines()]


def show(lm: RiskAwareLM, max_tokens: int) -> None:
    """Ask a few questions, and print the answers with all that is known of them."""
    for question in QUESTIONS:
        answer = lm.generate(question, max_tokens=max_tokens)
        print(f"  {question} {' '.join(answer.text.split())!r}")
        notes = [f"{answer.risk_name} {answer.risk:.2f}"]
        if answer.percentile is not None:
            notes.append(f"riskier than {answer.percentile:.0%} of the reference")
        if answer.p_correct is not None:
            notes.append(f"right with probability {answer.p_correct:.2f}")
        elif answer.p_correct_note is not None:
            notes.append(f"no probability: {answer.p_correct_note}")
        print(f"    {', '.join(notes)}")


def plot(records: list[tuple[float, bool]], path: Path) -> None:
    """Draw the accuracy of the answers that are left when the least probable ones are withheld."""
    ranked = sorted(records, key=lambda record: -record[0])
    right, shares, accuracies = 0, [], []
    for count, (_, correct) in enumerate(ranked, 1):
        right += correct
        shares.append(count / len(ranked))
        accuracies.append(right / count)
    figure, axes = plt.subplots(figsize=(6, 3.4))
    axes.plot(shares[9:], accuracies[9:], label="by p_correct, out of fold")  # the share of fewer says nothing
    axes.axhline(accuracies[-1], color="gray", linestyle="--", linewidth=1, label="all answers")
    axes.set_xlabel("share of questions that are answered")
    axes.set_ylabel("share of right answers")
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)


def read_settings() -> tuple[c.Options, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="From a bare language model to a calibrated one.")
    parser.add_argument("--model", default=POCKET, help="folder of a model; the one of this package")
    parser.add_argument("--data", type=Path, help="file of questions with answers; questions of this package")
    parser.add_argument("--limit", type=int, default=48, help="questions to prepare with")
    parser.add_argument("--labelled", type=int, help="questions with known answers; 300 of this package, else 120")
    parser.add_argument("--max-tokens", type=int, help="tokens of an answer; 12 of this package's model, 32 of others")
    options, rest = c.read_options(parser=parser), parser.parse_args()
    is_own = rest.model == POCKET
    rest.max_tokens = rest.max_tokens if rest.max_tokens is not None else 12 if is_own else 32
    rest.labelled = rest.labelled if rest.labelled is not None else 300 if is_own else 120
    for name, least in (("limit", 20), ("labelled", 40), ("max-tokens", 1)):
        value = getattr(rest, name.replace("-", "_"))
        if value < least:
            parser.error(f"--{name} must be at least {least}, got {value}; try --{name} {2 * least}")
    return options, rest


def main() -> None:
    """Prepare, ask, evaluate and calibrate, and draw what abstaining is worth."""
    options, rest = read_settings()
    warnings.simplefilter("ignore")
    try:
        labelled = load_questions(rest.data or "pocket", limit=rest.labelled)  # some only to be declined
        with tempfile.TemporaryDirectory() as folder:
            records = walk(rest, labelled, Path(folder))
    except SelfdoubtError as error:
        sys.exit(f"language_model.py: {error}")
    p_correct, correct = zip(*records, strict=True)
    numbers = {
        "accuracy": sum(correct) / len(correct),
        "NLL": metrics.nll(p_correct, correct),
        "ECE": metrics.ece(p_correct, correct),
        "errors": metrics.auroc([-p for p in p_correct], correct),
    }
    name = "language_model" if rest.model == POCKET else f"language_model-{Path(rest.model).name}"
    plot(records, options.out / f"{name}.png")
    c.write(name, [c.Row(Path(rest.model).name, numbers)], options, answers=len(records))
    print(f"the picture: {options.out / name}.png")


def walk(rest: argparse.Namespace, labelled: list[Question], folder: Path) -> list[tuple[float, bool]]:
    """Go from bare to calibrated; return for each labelled question its p_correct, out of fold, and if it is right."""
    print("1. bare: the risk is a number of nats", flush=True)
    lm = RiskAwareLM.load(rest.model, wrapper=None)
    show(lm, rest.max_tokens)

    print(f"2. prepared on {rest.limit} questions without labels: it has a place among other answers", flush=True)
    config = PreparationConfig(max_tokens=rest.max_tokens)
    questions = read_unlabelled(rest.model)
    prepared = selfdoubt.prepare(rest.model, folder / "prepared", questions, limit=rest.limit, config=config)
    lm = RiskAwareLM.load(adapter=prepared.folder)
    show(lm, rest.max_tokens)

    print(f"3. calibrated on {len(labelled)} questions with known answers: it has a probability", flush=True)
    asking = EvaluationConfig(max_tokens=rest.max_tokens)
    evaluation = selfdoubt.evaluate(lm, labelled, folder / "run", config=asking, draws=100)
    assert evaluation is not None
    result = selfdoubt.calibrate(evaluation, out=folder / "calibrated", draws=0)
    lm = RiskAwareLM.load(adapter=result.folder)
    show(lm, rest.max_tokens)
    return [(p, bool(r.correct)) for p, r in zip(result.quality.out_of_fold, evaluation.records, strict=True)]


if __name__ == "__main__":
    main()
