"""Named scores of answers against numpy, and the choice between them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from selfdoubt.errors import ConfigError
from selfdoubt.lm.answer import Answer, Token
from selfdoubt.lm.scores import (
    ANSWER_SCORES,
    Score,
    compute_answer_scores,
    compute_rank_scores,
    pick_risk,
    reference_quantiles,
)


def token(i, scale=None):
    logprob, total, aleatoric = -0.5 * i, 0.3 * i, 0.2 * i
    return Token(f"t{i}", i, logprob, total, aleatoric, total - aleatoric, 0.1 * i, 0.01 * i, scale, total)


ANSWER, QUESTION = [token(1), token(4), token(2)], [token(3), token(5)]


@pytest.mark.parametrize("name", ["nll", "total", "aleatoric", "epistemic", "disagreement", "spread"])
def test_scores_against_numpy(name):
    scores = compute_answer_scores(ANSWER, QUESTION)
    for prefix, tokens in (("", ANSWER), ("question_", QUESTION)):
        values = np.array([getattr(t, name) for t in tokens])
        assert scores[f"{prefix}mean_{name}"] == pytest.approx(values.mean())
        assert scores[f"{prefix}max_{name}"] == pytest.approx(values.max())
    assert scores[f"sum_{name}"] == pytest.approx(sum(getattr(t, name) for t in ANSWER))


def test_sequence_probability_and_perplexity_under_their_names():
    scores = compute_answer_scores(ANSWER, QUESTION)
    probabilities = np.exp([t.logprob for t in ANSWER])
    assert np.exp(-scores["sum_nll"]) == pytest.approx(probabilities.prod())
    assert np.exp(scores["mean_nll"]) == pytest.approx(probabilities.prod() ** (-1 / 3))


def test_scores_that_cannot_be_are_absent():
    assert not [name for name in compute_answer_scores(ANSWER, []) if name.startswith("question")]
    assert not [name for name in compute_answer_scores(ANSWER, QUESTION) if "scale" in name]
    assert compute_answer_scores([token(1, scale=0.5), token(2, scale=1.5)], [])["mean_scale"] == 1.0
    assert compute_answer_scores([], []) == {}


def test_every_score_has_one_name():
    signals = {
        "divergence": 0.1, "margin": 0.5, "self_certainty": -2.0, "layer_disagreement": 0.2, "density": 3.0,
        "relative_density": -0.5,
    }  # fmt: skip
    full = replace(token(1, 1.0), **signals)
    attention = np.full((1, 2, 3), 0.5, dtype=np.float32)
    assert set(compute_answer_scores([full], [full], attention)) == set(ANSWER_SCORES)


def test_a_risk_that_cannot_be_falls_back_to_the_answers_own():
    both, bare = compute_answer_scores(ANSWER, QUESTION), compute_answer_scores(ANSWER, [])
    assert pick_risk(both, "question_mean_nll") == (both["question_mean_nll"], "question_mean_nll")
    assert pick_risk(bare, "question_mean_nll") == (bare["mean_nll"], "mean_nll")
    assert pick_risk(bare, "mean_scale") == (bare["mean_nll"], "mean_nll")


def test_the_rank_score_weighs_ranks_among_reference_answers():
    reference = {"sum_nll": [0.0, 1.0, 3.0], "question_mean_nll": [2.0, 4.0, 5.0]}
    found = compute_rank_scores({"sum_nll": 2.0, "question_mean_nll": 3.0}, reference)
    assert found == {"rank_nll": pytest.approx(2 / 3 * 0.75 + 1 / 3 * 0.25)}
    assert compute_rank_scores({"sum_nll": -1.0, "question_mean_nll": 9.0}, reference)["rank_nll"] == pytest.approx(
        1 / 3
    )
    assert compute_rank_scores({"sum_nll": 2.0}, reference) == compute_rank_scores({"sum_nll": 2.0}, {}) == {}
    assert pick_risk({"sum_nll": 2.0}, "rank_nll") == (2.0, "sum_nll")
    assert pick_risk({"question_sum_nll": 2.0}, "rank_nll") == (2.0, "question_sum_nll")


def test_reference_quantiles_hold_those_of_the_rank_score():
    def answer(x, y):
        return Answer("", (), (), {"sum_nll": x, "question_mean_nll": y}, 0.0, "sum_nll", None, "stop")

    found = reference_quantiles([answer(float(i), float((7 * i) % 11)) for i in range(11)], n=10)
    assert found["sum_nll"] == [float(i) for i in range(11)]
    expected = sorted((2 * i + (7 * i) % 11) / 30 for i in range(11))
    assert found["rank_nll"] == pytest.approx(expected, abs=1e-4)


def test_reference_quantiles_rank_tokens_too():
    answers = [Answer("", tuple(token(i) for i in part), (), {}, 0.0, "", None, "stop") for part in ([1, 2], [3], [])]
    found = reference_quantiles(answers, n=2)
    assert found["token_nll"] == [0.5, 1.0, 1.5]
    assert found["token_epistemic"] == pytest.approx([0.1, 0.2, 0.3])
    assert "token_scale" not in found


def test_an_unknown_risk():
    with pytest.raises(ConfigError, match=r"^no answer score is called 'doubt'; choose one of .*max_aleatoric, .*$"):
        pick_risk({"mean_nll": 1.0}, "doubt")


@pytest.mark.parametrize("name", sorted(ANSWER_SCORES))
def test_a_score_is_printed_as_it_is_parsed(name):
    score = Score.parse(name)
    assert str(score) == name
    assert score == ANSWER_SCORES[name]
    assert score.needs_question == name.startswith(("question_", "both_"))


@pytest.mark.parametrize("name", ["", "nll", "sum", "sum_nll_", "question_rank_nll", "answer_sum_nll", "rank_nll"])
def test_a_name_that_is_not_a_score(name):
    with pytest.raises(ConfigError, match="no answer score is called"):
        Score.parse(name)


def test_no_tokens_at_all():
    with pytest.raises(ConfigError, match=r"needs at least one token"):
        pick_risk({}, "mean_nll")


def test_an_answer_is_data():
    answer = Answer("text", tuple(ANSWER), tuple(QUESTION), {"mean_nll": 1.0}, 1.0, "mean_nll", 0.5, "stop")
    assert answer.most_doubtful is ANSWER[1]
    assert json.loads(json.dumps(answer.to_dict()))["scores"] == {"mean_nll": 1.0}
    empty = Answer("", (), (), {}, 0.0, "mean_nll", None, "stop")
    assert empty.most_doubtful is None
