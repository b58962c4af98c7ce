"""What the shipped calibration says of places that the model knows, half knows, and of such that do not exist."""

from __future__ import annotations

import torch

from recipes.pocket.evaluation import is_right, read
from selfdoubt import RiskAwareLM
from selfdoubt.pocket import evaluation_file


def test_places_that_do_not_exist_are_withheld_and_known_ones_are_given():
    lm = RiskAwareLM.load("pocket", dtype=torch.float32)
    threshold = lm.calibration.threshold
    assert lm.calibration.promise["target_accuracy"] == 0.9
    assert lm.calibration.conditions is not None
    assert lm.front.misfit is None
    for name in ("Zorbelheim", "Qwxyzk", "Tartu"):  # the last is real, and the model is wrong about it
        assert lm.generate(f"In which country is {name}?").p_correct < threshold - 0.15
    famous = ["What is the capital of Japan?", "Where is Tokyo?", "What is the currency of France?"]
    assert all(a.p_correct > 0.9 for a in lm.generate(famous))
    questions = [q for q in read(evaluation_file()) if q.id.endswith("5")]
    answers = lm.generate([q.question for q in questions], max_tokens=48, batch_size=64)

    def mean_p(category):
        found = [a.p_correct or 0.0 for q, a in zip(questions, answers, strict=True) if q.category == category]
        return sum(found) / len(found)

    assert mean_p("known") > 0.85
    assert mean_p("invented") < 0.35 < threshold - 0.2
    given = [is_right(q, a.text) for q, a in zip(questions, answers, strict=True) if not a.abstain]
    assert len(given) > 0.4 * len(questions)
    assert sum(given) >= 0.9 * len(given)
