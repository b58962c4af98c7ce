"""The pure parts of ``benchmarks.voters``: samples and weights, heads, and what counts as a gain."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from benchmarks import voters, voters_runs, voters_table
from benchmarks.score_rows import score_rows
from benchmarks.voters_runs import ARMS
from selfdoubt.calibration.fit import fit_calibration
from selfdoubt.data.chats import read_chats
from selfdoubt.errors import DataError
from selfdoubt.eval.config import EvaluationConfig
from selfdoubt.eval.records import Question, Record
from selfdoubt.lm.model import RiskAwareLM
from tests.zoo import causal

QUESTIONS = [Question(str(i), f"question {i}?", answers=("yes",)) for i in range(200)]
EASY = frozenset(q.text for q in QUESTIONS[:40])


def make_records(n=240, seed=0, member=0.0):
    """Records whose surprisal predicts mistakes, and whose members' disagreement does by ``member``."""
    draw = np.random.default_rng(seed)
    records = []
    for i in range(n):
        seen, hidden = draw.normal(size=2)
        scores = {
            "sum_nll": math.exp(seen), "mean_total": math.exp(seen / 2 + draw.normal()),
            "question_mean_nll": math.exp(draw.normal()), "both_mean_nll": math.exp(seen),
            "question_mean_epistemic": math.exp(member * hidden + draw.normal() / 4),
        }  # fmt: skip
        right = bool(draw.random() < 1 / (1 + math.exp(seen + 2 * hidden)))
        records.append(Record(Question(f"{seed}-{i}", f"{seed} {i}?", answers=("a",)), "a", scores, correct=right))
    return records


def test_a_balanced_sample_has_all_easy_questions_and_weights_that_undo_it():
    sample = voters_runs.draw_sample(QUESTIONS, EASY, 100, 60, seed=3)
    asked = {q.text for q in sample.questions}
    assert asked >= EASY
    assert len(asked) == 100
    assert [q.id for q in sample.questions] == [q.id for q in QUESTIONS if q.id in sample.weights]
    weights = np.array([sample.weights[q.id] for q in sample.questions])
    easy = np.array([q.text in EASY for q in sample.questions])
    assert weights.mean() == pytest.approx(1)
    assert (weights * easy).mean() == pytest.approx(40 / 200)  # the share in the whole set, exactly


def test_arms_have_voters_where_they_say():
    base = causal("llama")
    leaves = {name: len(arm.settings["wrapper"].find(base)) for name, arm in ARMS.items() if arm.settings["wrapper"]}
    layers = base.config.num_hidden_layers
    assert leaves == dict.fromkeys(leaves, 2 * layers) | {"vote-wide": 7 * layers}
    assert len({(repr(arm.settings), arm.row_share, arm.steps) for arm in ARMS.values()}) == len(ARMS)


def test_an_even_sample_weighs_all_alike():
    sample = voters_runs.draw_sample(QUESTIONS, None, 30, 20, seed=0)
    assert len(sample.questions) == 50
    assert set(sample.weights.values()) == {1.0}


def test_accuracy_is_that_of_the_whole_set_and_differences_are_paired():
    sample = voters_runs.draw_sample(QUESTIONS, EASY, 40, 80, seed=0)
    records = [Record(q, "yes", correct=q.text in EASY) for q in sample.questions]
    never = [Record(q, "no", correct=False) for q in sample.questions]
    (row,) = voters.accuracy_rows({}, records, {"plain": records, "lora": never}, sample.weights, draws=200)
    assert row["value"] == pytest.approx(0.2)
    assert row["right in the sample"] == pytest.approx(1 / 3, abs=1e-4)
    assert row["to plain"] == 0
    assert row["to plain, interval"] == [0, 0]
    assert row["to lora"] == pytest.approx(0.2)


def test_the_head_without_members_is_the_one_that_calibrate_fits():
    records = make_records()
    doubts = voters.predict_doubts({"webquestions": records})["webquestions", "webquestions"]
    for head in ("question", "members"):
        _, report = fit_calibration(records, candidates=[head])
        assert 1 - doubts[head] == pytest.approx(np.array(report.out_of_fold, float), abs=1e-9)


def test_a_score_of_members_that_knows_more_passes_and_noise_does_not():
    for member, useful in ((1.0, True), (0.0, False)):
        by_set = {"webquestions": make_records(400, 1, member), "nq": make_records(400, 2, member)}
        doubts = voters.predict_doubts(by_set)["webquestions", "nq"]
        rows = score_rows({}, doubts, by_set["nq"], 300, baseline="question", metrics=("prr",))
        (gain,) = [row for row in rows if row["score"] == "members"]
        assert voters_table.passes(gain) is useful


def test_heads_leave_out_scores_that_a_model_lacks():
    plain = voters.name_heads(["sum_nll", "both_mean_nll", "question_mean_total", "mean_spread", "choice_nll"])
    assert plain == {"question": ["sum_nll", "question_mean_total"]}
    more = voters.name_heads(["sum_nll", "base_nll", "base_total", "base_gain", "question_mean_epistemic"])
    assert set(more) == {"question", "members", "base"}
    assert more["base"] == ["sum_nll", "base_nll", "base_total", "base_gain"]


def test_an_empty_answer_keeps_its_row_and_a_constant_score_is_left_out():
    records = make_records(30)
    records[3] = Record(records[3].question, "", {}, correct=False)
    flat = [Record(r.question, r.answer, {**r.scores, "mean_spread": 1e-9} if r.scores else {}, correct=r.correct)
            for r in records]  # fmt: skip
    answers = voters.build_answers(flat)
    assert len(answers) == 30
    assert "mean_spread" not in answers.names
    assert not answers.scores[3].any()


@pytest.mark.parametrize(
    ("gain", "low", "useful"),
    [(0.02, 0.001, True), (0.02, -0.001, False), (0.009, 0.001, False), (-0.02, -0.03, False)],
)
def test_a_gain_counts_above_one_hundredth_and_with_its_interval_above_zero(gain, low, useful):
    assert voters_table.passes({"gain": gain, "gain_interval": [low, 2 * gain - low]}) is useful


def test_pooled_gains_are_the_mean_of_independent_ones():
    rows = [{"gain": 0.1, "gain_interval": [0.0, 0.2]}, {"gain": 0.3, "gain_interval": [0.1, 0.5]}]
    mean, low, high = voters_table.pool_gains(rows)
    half = math.hypot(0.1, 0.2) / 2
    assert (mean, low, high) == pytest.approx((0.2, 0.2 - half, 0.2 + half))


def test_training_files_hold_the_prompts_that_are_asked(tmp_path):
    (tmp_path / "webquestions").mkdir()
    rows = [{"qId": "a", "qText": "Who?", "answers": ["Ada", "Bo"]}, {"qId": "b", "qText": "Where?", "answers": ["Cy"]}]
    (tmp_path / "webquestions/trainmodel.json").write_text(json.dumps(rows))
    file = voters_runs.write_training_file("webquestions", tmp_path, tmp_path)
    chats = list(read_chats(str(file)))
    prompt = EvaluationConfig(how=voters_runs.HOW).prompt(Question("a", "Who?", answers=("Ada", "Bo")))
    assert chats[0] == [*prompt, {"role": "assistant", "content": "Ada"}]
    assert len(chats) == 2


def test_the_base_gains_nothing_over_itself(tmp_path):
    lm = RiskAwareLM.load("pocket", wrapper=None, dtype="float32", device="cpu")
    budget = voters_runs.Budget(1, 12, 24, 4, 0, 1e-3)
    questions = [Question(str(i), f"What is the capital of {c}?", answers=(a,))
                 for i, (c, a) in enumerate((("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Lima")))]  # fmt: skip
    sample = voters_runs.draw_sample(questions, None, 3, 0, seed=0)
    records = voters_runs.ask(lambda: lm, sample, tmp_path / "asked", budget)
    scored = voters_runs.add_base_scores(lambda: lm, records, tmp_path / "base.jsonl", budget)
    stopped = [r for r in scored if r.finish == "stop"]
    assert stopped
    assert all(r.correct is not None for r in scored)
    assert [r.scores["base_gain"] for r in stopped] == pytest.approx([0] * len(stopped), abs=1e-5)
    again = voters_runs.ask(pytest.fail, sample, tmp_path / "asked", budget)  # what is stored needs no model
    assert again == records
    assert voters_runs.add_base_scores(pytest.fail, records, tmp_path / "base.jsonl", budget) == scored
    other = voters_runs.draw_sample(questions[:2], None, 2, 0, seed=0)
    with pytest.raises(DataError, match="other questions"):
        voters_runs.ask(pytest.fail, other, tmp_path / "asked", budget)


def test_another_judge_looks_at_the_same_answers():
    question = Question("1", "Where?", answers=("Rome",))
    choice = Question("2", "Which?", choices=("A", "B"), right=(0,))
    long = Record(question, "It is Rome, I believe, or maybe some other town", correct=True, grade=1.0)
    chosen = Record(choice, "B", correct=False)
    again = voters_runs.judge_again({"plain": {"nq": [long], "trivia": [chosen]}}, "f1:0.5")
    assert again["plain"]["nq"][0].correct is False
    assert voters_runs.judge_again(again, "contains")["plain"]["nq"][0].correct is True
    assert again["plain"]["trivia"] == [chosen]


def test_table_shows_each_arm_and_what_passes():
    records = {"webquestions": make_records(200, 1, 1.0), "nq": make_records(200, 2, 1.0)}
    samples = {
        name: voters_runs.draw_sample([r.question for r in part], None, 200, 0, 0) for name, part in records.items()
    }
    about = {"model": "m", "trained on": "webquestions", "judge": "contains"}
    rows = voters.measure({"plain": records, "vote": records}, samples, about, 50)
    settings = {
        "arms": {"vote": "three voters"}, "steps": 1, "step_rows": 12, "lr": 1e-3, "questions": {"nq": 200},
        "balanced": False,
    }  # fmt: skip
    text = voters_table.table({"rows": rows, "settings": settings, "commit": "0", "device": "d"})
    verdict = [row for row in text.splitlines() if row.startswith("| webquestions, vote: members |")]
    assert len(verdict) == 1
    assert "webquestions -> nq" in verdict[0]
