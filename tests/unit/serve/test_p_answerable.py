"""p_answerable: known from the question alone, before the first token, and the same number everywhere."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from selfdoubt import RiskAwareLM
from selfdoubt.lm.calibration import Calibration, StateHead
from selfdoubt.lm.conditions import Conditions
from selfdoubt.lm.hidden_states import POSITIONS
from selfdoubt.serve.engine.limits import Limits
from selfdoubt.serve.engine.request import Started
from tests import zoo

QUESTION = "Where is Oslo?"
ALONE = {
    position: Calibration(
        "logistic",
        ("question_mean_nll",),
        weights=(-0.5,),
        linear=(-0.1,),
        bias=0.25,
        ranges=((0.0, 50.0),),
        state=StateHead(1, position, tuple(math.sin(i) / 9 for i in range(16))),
    )
    for position in POSITIONS
    if position != "mean"
}
WHOLE = Calibration("isotonic", ("sum_nll",), knots=((0.0, 0.9), (900.0, 0.1)))


def calibrated(name="first", **changes):
    model = zoo.talker()
    conditions = replace(Conditions.of_model(model, cut=1), **changes)
    return RiskAwareLM(
        model, zoo.tokenizer(), calibration=replace(WHOLE, answerable=ALONE[name], conditions=conditions)
    )


@pytest.fixture(scope="module")
def client(serve):
    return serve(calibrated(), Limits(answer_tokens=64, queue=8))


def by_hand(answer, name="first"):
    """The logistic formula on the scores and states that come with an answer."""
    head, score = ALONE[name], answer.scores["question_mean_nll"]
    hidden = answer.states.get(head.state.key).double()
    value = head.bias + head.weights[0] * math.log(score + 0.01) + head.linear[0] * score
    return 1 / (1 + math.exp(-value - float(hidden @ torch.tensor(head.state.weights).double())))


@pytest.mark.parametrize("name", ALONE)
def test_it_is_there_before_the_first_token_and_stays_the_same(name):
    lm = calibrated(name)
    stream = lm.stream(QUESTION, max_tokens=5)
    early = stream.p_answerable
    assert stream._progress.tokens == []  # no token was chosen yet
    assert 0 < early < 1
    list(stream)
    assert stream.answer.p_answerable == early
    whole = lm.generate(QUESTION, max_tokens=5)
    assert whole.p_answerable == pytest.approx(early, rel=1e-6)
    assert whole.p_answerable == pytest.approx(by_hand(whole, name), rel=1e-6)
    assert whole.to_dict()["p_answerable"] == whole.p_answerable


def test_it_does_not_depend_on_the_answer():
    lm = calibrated()
    own = lm.generate(QUESTION, max_tokens=5)
    drawn = lm.candidates(QUESTION, 3, max_tokens=5)
    given = lm.score("something else", QUESTION)
    assert len({answer.text for answer in (own, given, *drawn)}) > 3
    for answer in (*drawn, given):
        assert answer.p_answerable == pytest.approx(own.p_answerable, rel=1e-5)
    both = lm.generate([QUESTION, "Why is the sky so blue, and the sea as well?"], max_tokens=5)
    assert both[0].p_answerable == pytest.approx(own.p_answerable, rel=1e-5)
    assert both[1].p_answerable != pytest.approx(own.p_answerable, rel=1e-3)


def test_there_is_none_for_prompts_of_another_form_or_another_model_and_without_its_head():
    lm = calibrated()
    assert lm.generate(QUESTION, raw=True, max_tokens=3).p_answerable is None
    assert lm.score("A text alone.").p_answerable is None
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert lm.generate([system], max_tokens=3)[0].p_answerable is None
    assert calibrated(base={"model.norm.weight": (9.0,) * 16}).generate(QUESTION, max_tokens=3).p_answerable is None
    sampled = calibrated(made="sampled", temperature=0.5)
    assert sampled.generate(QUESTION, max_tokens=3).p_answerable is None
    assert 0 < sampled.generate(QUESTION, max_tokens=3, temperature=0.5).p_answerable < 1
    choices = calibrated(made="choice")
    assert choices.generate(QUESTION, max_tokens=3).p_answerable is None
    bare = RiskAwareLM(zoo.talker(), zoo.tokenizer(), calibration=WHOLE)
    assert bare.stream(QUESTION, max_tokens=3).p_answerable is None


def test_the_server_sends_it_with_the_first_chunk_and_with_the_whole(client):
    expected = calibrated().generate(QUESTION, max_tokens=5).p_answerable
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 5, "temperature": 0}
    whole = client.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["risk"]["p_answerable"] == pytest.approx(expected, rel=1e-5)
    reply = client.post("/v1/chat/completions", json={**body, "stream": True, "n": 2})
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    for index in range(2):
        choices = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        for place in (0, -1):
            assert choices[place]["risk"]["p_answerable"] == pytest.approx(expected, rel=1e-5)
    scored = client.post("/v1/score", json={"input": [{"text": "In Norway.", "question": QUESTION}]}).json()
    assert scored["data"][0]["p_answerable"] == pytest.approx(expected, rel=1e-5)


def test_the_engine_gives_it_when_a_prompt_was_read(client):
    engine = client.app.state.shared.engine
    started, *_ = engine.generate(QUESTION, max_tokens=4).updates()
    assert isinstance(started, Started)
    assert started.p_answerable == pytest.approx(calibrated().generate(QUESTION, max_tokens=4).p_answerable, rel=1e-5)
