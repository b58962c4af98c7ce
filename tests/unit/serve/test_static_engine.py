"""An engine over a static cache gives what an eager one gives, while requests join and leave."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch

from selfdoubt import RiskAwareLM
from selfdoubt.serve.engine.engine import Engine
from selfdoubt.serve.engine.limits import Limits

QUESTIONS = [
    shape.format(place)
    for place in ("France", "Japan", "Tartu", "Zorbelheim", "Kenya", "the Czech Republic")
    for shape in (
        "What is the capital of {}?",
        "In which country is {}?",
        "Please name the currency of {}, and say why.",
    )
]
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.8 * (i % 2), "top_p": (1.0, 0.9, 0.8)[i % 3], "seed": i, "max_tokens": 2 + (5 * i) % 17}
    for i in range(len(QUESTIONS))
]


def serve_all(lm):
    """Answers of an engine to all questions, which come in from several threads; some clients go away."""
    engine = Engine(lm, Limits(batch=7))
    engine.start(wait=True)
    answers: list[Any] = [None] * len(QUESTIONS)
    shuffled = random.Random(0)
    waits = [shuffled.random() / 3 for _ in QUESTIONS]

    def ask(i):
        time.sleep(waits[i])
        (answers[i],) = engine.generate(QUESTIONS[i], **OPTIONS[i]).answers()

    def leave():
        for i in range(6):
            handle = engine.generate(QUESTIONS[i], max_tokens=40, temperature=1.0, seed=100 + i)
            time.sleep(0.05)
            handle.cancel()

    threads = [threading.Thread(target=ask, args=[i]) for i in range(len(QUESTIONS))] + [threading.Thread(target=leave)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.running == 0
    engine.close(20)
    return answers


@pytest.mark.parametrize("ahead", [False, True])
def test_static_and_eager_engines_agree_under_load(ahead, monkeypatch):
    from selfdoubt.lm import decoding
    from selfdoubt.lm.static.decoder import StaticDecoder

    monkeypatch.setattr(decoding, "StaticDecoder", lambda build, mode: StaticDecoder(build, mode, ahead=ahead))
    lm = RiskAwareLM.load("pocket", dtype=torch.float32)
    eager = [lm.generate(q, **o) for q, o in zip(QUESTIONS, OPTIONS, strict=True)]
    lm.step = "static"
    for mine, alone in zip(serve_all(lm), eager, strict=True):
        assert [t.id for t in mine.tokens] == [t.id for t in alone.tokens]
        assert (mine.text, mine.finish) == (alone.text, alone.finish)
        # float32: other batch shapes round otherwise.
        assert dict(mine.scores) == pytest.approx(dict(alone.scores), abs=1e-3)
        assert (mine.percentile, mine.p_correct) == pytest.approx((alone.percentile, alone.p_correct), abs=1e-2)
