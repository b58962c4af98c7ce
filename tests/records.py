"""Records made up for the tests of the report: answers with a score that knows more and one that knows less."""

from __future__ import annotations

import math

import numpy as np

from selfdoubt.eval.records import Question, Record, Sample
from selfdoubt.eval.settings import Run
from selfdoubt.report import measure_answers


def record(id="q", correct=True, *, topic=None, samples=(), **more):
    scores = more.pop("scores", {"sum_nll": 1.0})
    question = Question(id, more.pop("text", f"What is {id}?"), answers=("this",), topic=topic)
    return Record(question, more.pop("answer", "this"), scores, correct=correct, samples=samples, **more)


def judged(n=80, *, seed=0, calibrated=True):
    """About two thirds right; ``good`` follows the truth closely, ``sum_nll`` loosely, ``flat`` not at all."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(n):
        correct = bool(random.random() < 0.65)
        good = float(random.normal() + (0 if correct else 2.5))
        loose = float(random.normal() + (0 if correct else 0.6))
        found.append(
            record(
                f"q{i}",
                correct,
                topic="even" if i % 2 == 0 else "odd",
                scores={"sum_nll": math.exp(loose), "good": good, "flat": 0.5},
                p_correct=1 / (1 + math.exp(1.5 * good - 2)) if calibrated else None,
            )
        )
    return found


def sample(correct, risk=1.0, *, percentile=None, text=None):
    return Sample(text or ("yes" if correct else "no"), risk, percentile, correct)


COSTS = {
    "answer": {"passes": 1, "seconds": 10.0},
    "samples": {"passes": 4, "seconds": 30.0},
    "agreement": {"passes": 0, "seconds": 2.0},
    "p_true": {"passes": 1, "seconds": 5.0},
}


def measured(records, run=None, **options):
    """Return the report on these answers as ``report.json`` holds it."""
    return measure_answers(records, Run.parse(run or {}), **options).to_json()
