"""Learning p_correct: against scikit-learn, on made-up worlds whose truth is known, and with what cannot be learnt."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch import nn

from selfdoubt import storage, vote
from selfdoubt.calibration import heads
from selfdoubt.calibration.arrays import calibration_arrays
from selfdoubt.calibration.candidates import CANDIDATES
from selfdoubt.calibration.fit import fit_calibration, store_calibration
from selfdoubt.calibration.quality import measure_quality
from selfdoubt.errors import ConfigError, DataError, LoadError
from selfdoubt.eval.records import Question, Record
from selfdoubt.lm.calibration import Calibration, read_calibration
from selfdoubt.lm.hidden_states import AnswerStates

FAST = ("score", "answer", "question")


def world(n, seed=0, *, members=0.0, state=0.0, topics=("a", "b", "c"), base=0.5, layers=("first.2", "mean.2")):
    """Records whose truth depends on surprisal, the question's surprisal, members' disagreement and a hidden state.

    ``members`` and ``state`` say how much the last two tell; the state that tells is "first.2".
    """
    rng = np.random.default_rng(seed)
    own, asked, split = rng.exponential(2, n), rng.exponential(1, n), rng.exponential(0.3, n)
    hidden = {key: rng.normal(size=(n, 24)).astype(np.float32) * 5 + 3 for key in layers}
    direction = rng.normal(size=24) / 25
    logit = -1.5 * np.log(own / 1.2) - np.log(asked) - members * 2 * np.log(split / 0.2)
    logit = logit + state * 4 * (hidden[layers[0]] - 3) @ direction + np.log(base / (1 - base))
    correct = rng.random(n) < 1 / (1 + np.exp(-logit))
    records = [
        Record(
            Question(f"q{i}", f"What is number {i}?", topic=topics[i % len(topics)] if topics else None),
            "an answer",
            {
                "sum_nll": own[i],
                "mean_nll": own[i] / 3,
                "mean_total": own[i] / 4 + 0.01,
                "question_mean_nll": asked[i],
                "question_mean_epistemic": split[i],
            },
            correct=bool(correct[i]),
        )
        for i in range(n)
    ]
    return records, hidden


def plain(records):
    """Without the scores of members."""
    return [replace(r, scores={k: v for k, v in r.scores.items() if "epistemic" not in k}) for r in records]


def table(records, names):
    return np.array([[r.scores[name] for name in names] for r in records])


def answers_of(records, states=None):
    return calibration_arrays(records, np.arange(len(records)), states or {})


def test_a_logistic_head_against_scikit_learn():
    records, hidden = world(300, state=1)
    names = ["sum_nll", "question_mean_nll"]
    head = heads.fit_logistic(answers_of(records, hidden), 0, names, ["first.2"])
    y = np.array([r.correct for r in records])
    x = np.hstack([np.log(table(records, names) + 0.01), table(records, names)])
    x = (x - x.mean(0)) / x.std(0)
    h = hidden["first.2"].astype(float)
    h = (h - h.mean(0)) / h.std(0) / np.sqrt(24)
    ours = heads.predict(head, answers_of(records, hidden))
    nearest = min(
        np.abs(ours - LogisticRegression(C=c, tol=1e-8, max_iter=1000).fit(z, y).predict_proba(z)[:, 1]).max()
        for c in heads.SCORE_C
        for size in heads.STATE_SIZES
        for z in [np.hstack([x, h * size])]
    )
    assert nearest < 1e-3


def test_many_at_once_is_one_by_one():
    records, hidden = world(200, members=1, state=1)
    answers = answers_of(records, hidden)
    names = sorted(records[0].scores)
    for head in (heads.fit_isotonic(answers, "sum_nll"), heads.fit_logistic(answers, 0, names, sorted(hidden))):
        other = answers_of(*world(50, 1))
        stranger = replace(other, scores=other.scores / 3)
        many = heads.predict(head, stranger)
        numbers = 0
        key = "first.2" if head.state is None else f"{head.state.position}.{head.state.layer}"
        layer = 2 if head.state is None else head.state.layer
        for i in range(50):
            hidden_state = torch.tensor(stranger.states[key][i])[None]
            scores = dict(zip(stranger.names, stranger.scores[i].tolist(), strict=True))
            one = head.p_correct(scores, heads_states(layer, hidden_state))
            numbers += one is not None
            assert one is None or one == pytest.approx(many[i], abs=1e-9)
        assert numbers > 40


def heads_states(layer, hidden):
    return AnswerStates((layer,), hidden, hidden, hidden)


def test_an_isotonic_head_never_rises_and_is_never_certain():
    records, _ = world(100)
    head = heads.fit_isotonic(answers_of(records), "sum_nll")
    values = [head.p_correct({"sum_nll": x}) for x in np.linspace(0, head.knots[-1][0], 200)]
    p = [value for value in values if value is not None]
    assert len(p) == 200
    assert all(a >= b for a, b in pairwise(p))
    assert 0 < min(p) < max(p) < 1
    always = [replace(r, correct=bool(r.scores["sum_nll"] < 1)) for r in records]
    head = heads.fit_isotonic(answers_of(always), "sum_nll")
    n = sum(r.correct for r in always)
    assert head.p_correct({"sum_nll": 0.0}) == pytest.approx(n / (n + 1))


@pytest.mark.parametrize("n", [2, 5, 7])
def test_folds_keep_questions_together_and_spread_both_classes(n):
    rng = np.random.default_rng(n)
    records, _ = world(120, base=0.2)
    same = [replace(r, question=replace(r.question, text=f" What IS {rng.integers(60)}? ")) for r in records]
    answers = answers_of(same)
    parts = heads.split_folds(answers, n, 0)
    assert sorted(np.concatenate(parts).tolist()) == list(range(120))
    for i, rows in enumerate(parts):
        others = np.concatenate([p for j, p in enumerate(parts) if j != i])
        assert not set(answers.questions[rows]) & set(answers.questions[others])
        assert len(set(answers.correct[rows])) == 2
    assert max(len({*answers.questions[p]}) for p in parts) - min(len({*answers.questions[p]}) for p in parts) <= 1
    assert any(not np.array_equal(a, b) for a, b in zip(parts, heads.split_folds(answers, n, 1), strict=True))


@pytest.mark.parametrize(
    ("tells", "chosen"), [({}, "question"), ({"members": 1}, "members"), ({"members": 1, "state": 1}, "state")]
)
def test_the_head_that_the_truth_needs_is_chosen(tells, chosen):
    records, hidden = world(600, **tells)
    head, report = fit_calibration(records, hidden)
    assert report.chosen == chosen
    assert [c.name for c in report.candidates] == list(CANDIDATES)
    assert (head.state is not None) == (chosen == "state")
    if head.state is not None:
        assert (head.state.position, head.state.layer) == ("first", 2)
    assert ("question_mean_epistemic" in head.features) == (chosen != "question")


def test_where_one_score_says_all_in_steps_a_curve_on_it_does():
    rng = np.random.default_rng(0)

    def truth(x):
        return bool(rng.random() < (0.95 if x < 1.5 else 0.9 if x < 3 else 0.05))

    records = [replace(r, correct=truth(r.scores["sum_nll"])) for r in world(500)[0]]
    head, report = fit_calibration(records)
    assert report.chosen == "score"
    assert (head.kind, head.features) == ("isotonic", ("sum_nll",))


def test_what_is_reported_is_never_seen_while_fitting():
    """Pure noise: a head that had seen the answers would look better than chance."""
    rng = np.random.default_rng(0)
    records, _ = world(300)
    hidden = {"first.0": rng.normal(size=(300, 200))}
    noise = [replace(r, correct=bool(rng.random() < 0.5)) for r in records]
    _, report = fit_calibration(noise, hidden)
    for candidate in report.candidates:
        assert candidate.inside.auroc < 0.6
        assert candidate.inside.log_loss > 0.68
    p = np.array(report.out_of_fold)
    assert roc_auc_score([r.correct for r in noise], p) < 0.6


def test_the_report_against_scikit_learn():
    records, _ = world(300)
    _, report = fit_calibration(records, candidates=FAST)
    p, y = np.array(report.out_of_fold), np.array([r.correct for r in records])
    inside = report.best.inside
    assert inside.log_loss == pytest.approx(log_loss(y, p))
    assert inside.brier == pytest.approx(brier_score_loss(y, p))
    assert inside.auroc == pytest.approx(roc_auc_score(y, p))
    assert inside.answers == 300


def test_calibration_error_by_hand():
    p = np.array([0.8, 0.8, 0.8, 0.2, 1.0, np.nan])
    found = measure_quality(p, np.array([True, True, False, False, True, True]))
    assert found.ece == pytest.approx((abs(2 - 2.4) + 0.2 + 0.0) / 5)
    assert found.answers == 5


def test_p_correct_is_calibrated_on_new_questions():
    head, report = fit_calibration(world(1500)[0], candidates=FAST)
    fresh, _ = world(4000, seed=9)
    p = np.array([head.p_correct(r.scores) for r in fresh], float)
    known = ~np.isnan(p)
    assert known.mean() > 0.99
    found = measure_quality(p[known], np.array([r.correct for r in fresh])[known])
    assert found.ece < 0.04
    assert found.log_loss == pytest.approx(report.best.inside.log_loss, abs=0.04)


def test_a_head_that_transfers_worse_is_warned_of():
    """The state tells right from wrong on each topic alone, in a way of its own."""
    rng = np.random.default_rng(0)
    records, _ = world(600, topics=("a", "b", "c"))
    hidden = rng.normal(size=(600, 3)) * 0.3
    for i, record in enumerate(records):
        hidden[i] += (2 * (np.arange(3) == i % 3) - 0.5) * (1 if record.correct else -1)
    _, report = fit_calibration(records, {"first.0": hidden})
    assert report.chosen == "state"
    assert report.topics == 3
    (text,) = report.warnings
    assert "the head 'state' does best on questions like these" in text
    assert f"warning: {text}" in report.lines()
    best = min(report.candidates, key=lambda c: c.outside.log_loss)
    assert f"calibrate with candidates up to {best.name!r}" in text


def test_no_topics_no_word_of_other_topics():
    _, report = fit_calibration(world(200, topics=())[0], candidates=FAST)
    assert report.topics == 0
    assert all(c.outside is None for c in report.candidates)
    assert not report.warnings
    assert "other topics" not in "\n".join(report.lines())


def test_a_topic_is_left_out_with_its_questions():
    """Topic "b" asks the questions of "a" again, and a wide state gives them away: nothing else can be learnt."""
    rng = np.random.default_rng(0)
    records, _ = world(360, topics=("a", "b", "c"))
    number = np.array([i if i % 3 == 2 else i // 3 for i in range(360)])
    coin, keys = rng.random(360) < 0.5, rng.normal(size=(360, 300))
    again = [
        replace(r, question=replace(r.question, text=f"What is number {n}?"), correct=bool(coin[n]))
        for r, n in zip(records, number, strict=True)
    ]
    _, report = fit_calibration(again, {"first.0": keys[number]}, candidates=("score", "state"))
    assert report.topics == 3
    assert [c.outside.answers for c in report.candidates] == [360, 360]
    for candidate in report.candidates:
        assert candidate.outside.auroc < 0.62
        assert candidate.inside.auroc < 0.62
    only = [r for r in again if r.question.topic != "c"]
    assert fit_calibration(only, candidates=("score",))[1].topics == 0  # without the one, nothing is left to learn from


def test_many_topics_are_merged():
    _, report = fit_calibration(world(400, topics=[f"t{i}" for i in range(20)])[0], candidates=("score",))
    assert report.topics == 8
    assert report.best.outside.answers == 400


def test_unjudged_and_unanswered_records_are_left_out_and_counted():
    records, hidden = world(200)
    spoiled = list(records)
    spoiled[3] = replace(spoiled[3], correct=None)
    spoiled[5] = replace(spoiled[5], answer=None, scores={})
    spoiled[7] = replace(spoiled[7], scores={"question_mean_nll": 1.0})
    head, report = fit_calibration(spoiled, hidden)
    assert report.left_out == {"unjudged": 1, "without an answer": 1, "without the score sum_nll": 1}
    assert report.answers == report.learnt_from == 197
    assert len(report.out_of_fold) == 200
    assert report.out_of_fold[5] is None
    assert report.out_of_fold[7] is None
    assert 0 <= report.out_of_fold[3] <= 1  # unjudged, but the head has never seen it
    kept = [i for i in range(200) if i not in (3, 5, 7)]
    again, _ = fit_calibration([records[i] for i in kept], {k: v[kept] for k, v in hidden.items()})
    assert again.weights == pytest.approx(head.weights)


def test_scores_that_not_every_answer_has_are_not_used():
    records, _ = world(200)
    records[9] = replace(records[9], scores={k: v for k, v in records[9].scores.items() if k != "question_mean_nll"})
    head, report = fit_calibration(records)
    assert "question_mean_nll" not in head.features
    assert "question" not in [c.name for c in report.candidates]


def test_without_members_their_scores_are_no_candidate():
    """A plain model has them too: all zero, and aleatoric another name of total."""
    records = plain(world(200)[0])
    zero = {"question_mean_epistemic": 0.0, "mean_disagreement": 0.0}
    alone = [replace(r, scores={**r.scores, **zero, "mean_aleatoric": r.scores["mean_total"]}) for r in records]
    _, report = fit_calibration(alone)
    assert [c.name for c in report.candidates] == list(FAST)
    with pytest.raises(ConfigError, match="'members' needs scores of members that differ, and these records have none"):
        fit_calibration(alone, candidates=["members"])
    with pytest.raises(ConfigError, match="'state' needs states"):
        fit_calibration(alone, candidates=["score", "state"])


def test_a_threshold_is_found_on_answers_the_head_has_not_seen():
    records, _ = world(1000)
    head, report = fit_calibration(records, target_accuracy=0.8, candidates=FAST)
    assert report.learnt_from == 500
    promise = report.promise
    assert promise.answers == 500
    assert promise.bound >= 0.8
    assert head.threshold == promise.threshold
    assert head.promise == promise.to_json()
    given = [head.abstains(p) is False for p in report.out_of_fold]
    assert np.mean(given) == pytest.approx(promise.coverage, abs=0.08)
    fresh, _ = world(5000, seed=5)
    p = np.array([head.p_correct(r.scores) for r in fresh], float)  # NaN where it is withheld without a number
    right = np.array([r.correct for r in fresh])
    assert right[p >= head.threshold].mean() >= 0.8
    assert any("answers with p_correct >=" in line for line in report.lines())
    # The same head comes of its own part alone.
    share = fit_calibration(records, target_accuracy=0.8, candidates=FAST, threshold_share=0.2)[1]
    assert (share.learnt_from, share.promise.answers) == (800, 200)


def test_a_question_asked_again_is_tested_once_and_never_learnt_from():
    records, _ = world(600)
    texts = [f"What is {i % 200}?" for i in range(600)]
    again = [replace(r, question=replace(r.question, text=t)) for r, t in zip(records, texts, strict=True)]
    _, report = fit_calibration(again, target_accuracy=0.7, candidates=("score",))
    assert report.learnt_from == 300
    assert report.promise.answers == 100
    assert report.left_out == {"asked again, so not tested": 200}


def test_what_is_tested_does_not_shape_the_head():
    """Not even by a score that a tested answer lacks; such an answer has no p_correct, and is not tested."""
    records, _ = world(400)
    head, report = fit_calibration(records, target_accuracy=0.7, candidates=["question"])
    learnt = {i for i, p in enumerate(report.out_of_fold) if p != head.p_correct(records[i].scores)}
    assert len(learnt) == 200
    flipped = [replace(r, correct=r.correct if i in learnt else not r.correct) for i, r in enumerate(records)]
    tested = next(i for i in range(400) if i not in learnt)
    flipped[tested] = replace(flipped[tested], scores={"sum_nll": 1.0})
    other, report = fit_calibration(flipped, target_accuracy=0.7, candidates=["question"])
    assert (other.features, other.weights, other.bias) == (head.features, head.weights, head.bias)
    assert report.out_of_fold[tested] is None
    assert report.left_out == {"without a score that the head reads": 1}


def test_no_threshold_is_said_plainly():
    head, report = fit_calibration(world(120)[0], target_accuracy=0.99, candidates=("score",))
    assert head.threshold is None
    assert head.promise is None
    assert report.promise is None
    assert "no threshold keeps 99 % of answers right with 95 % confidence: 60 answers" in report.refusal
    assert "at least 478 more judged answers are needed" in report.refusal  # half of them teach the head
    assert report.refusal in report.lines()


def test_the_promise_holds_for_whole_calibrations():
    """Fit, split and test in 100 worlds, whose accuracy is known from many more answers.

    More broken promises than the limit have a chance below 1e-9 at the level of 20 %.
    """
    many, _ = world(20000, seed=77)
    x = table(many, ["sum_nll"])[:, 0]
    y = np.array([r.correct for r in many])
    broken = 0
    for seed in range(100):
        records, _ = world(120, seed=seed + 1000, topics=())
        head, _ = fit_calibration(
            [replace(r, scores={"sum_nll": r.scores["sum_nll"]}) for r in records],
            target_accuracy=0.75,
            confidence=0.8,
            candidates=("score",),
            seed=seed,
            folds=2,
        )
        if head.threshold is not None:
            grid = np.array(head.knots).T
            broken += y[np.interp(x, *grid) >= head.threshold].mean() < 0.75 - 0.01
    assert broken <= binom.isf(1e-9, 100, 0.2)


def test_the_same_seed_gives_the_same_head():
    records, hidden = world(200, state=1)
    one, two, other = (fit_calibration(records, hidden, seed=s, target_accuracy=0.6)[0] for s in (3, 3, 4))
    assert one.to_json() == two.to_json()
    assert one.to_json() != other.to_json()


def test_states_may_be_tensors_and_wider_than_answers_are_many():
    records, _ = world(60)
    hidden = {"mean.11": torch.randn(60, 500, dtype=torch.bfloat16).float()}
    head, report = fit_calibration(records, hidden, candidates=["state"])
    assert len(head.state.weights) == 500
    assert report.best.state == "mean.11"


def nan_score(records):
    records[4] = replace(records[4], scores={**records[4].scores, "mean_nll": float("nan")})


@pytest.mark.parametrize(
    ("spoil", "options", "error", "says"),
    [
        (list.clear, {}, DataError, "needs judged answers with scores, got none .there are none at all."),
        (lambda r: r.__setitem__(slice(None), [replace(x, correct=None) for x in r]), {}, DataError, "100 unjudged"),
        (
            lambda r: r.__setitem__(slice(None), [replace(x, correct=True) for x in r]),
            {},
            DataError,
            "all 100 .* right",
        ),
        (lambda r: r.__delitem__(slice(12, None)), {}, DataError, "needs at least 20 judged answers, with 5 questions"),
        (lambda r: r.__delitem__(slice(30, None)), {"target_accuracy": 0.9}, DataError, "in the part that the head"),
        (nan_score, {}, DataError, "the score mean_nll of question q4 is nan, not a number"),
        (
            lambda r: r.__setitem__(slice(None), [replace(x, scores={"sum_nll": 2.0}) for x in r]),
            {},
            DataError,
            "the score sum_nll is 2 for all answers: nothing to learn",
        ),
        (lambda r: None, {"folds": 1}, ConfigError, "folds must be at least 2, got 1"),
        (lambda r: None, {"target_accuracy": 90}, ConfigError, "the target accuracy is a share .*, got 90"),
        (lambda r: None, {"confidence": 95}, ConfigError, "the confidence is a share"),
        (lambda r: None, {"threshold_share": 1.0}, ConfigError, "the threshold's share is a share"),
        (lambda r: None, {"candidates": ["forest"]}, ConfigError, "no candidate is called 'forest'; choose of score, "),
        (lambda r: None, {"candidates": []}, ConfigError, "candidates must not be empty"),
        (lambda r: None, {"states": {"last": np.ones((100, 3))}}, ConfigError, "named like 'first.2' .* got 'last'"),
        (lambda r: None, {"states": {"first.0": np.ones((99, 3))}}, DataError, r"each of 100 records.*\(99, 3\)"),
        (lambda r: None, {"states": {"first.0": np.full((100, 3), np.inf)}}, DataError, "of record 0 are not finite"),
    ],
)
def test_what_cannot_be_learnt_is_said(spoil, options, error, says):
    records, _ = world(100)
    spoil(records)
    with pytest.raises(error, match=says):
        fit_calibration(records, **options)


def test_a_report_is_plain_data():
    _, report = fit_calibration(world(200)[0], target_accuracy=0.5, candidates=FAST)
    entry = json.loads(json.dumps(report.to_json()))
    assert entry["chosen"] == report.chosen
    assert "out_of_fold" not in entry
    head, rows = report.rows()
    assert all(len(row) == len(head) for row in rows)
    assert [row[0].endswith("*") for row in rows] == [c.name == report.chosen for c in report.candidates]


@pytest.fixture
def adapter(tmp_path):
    torch.manual_seed(0)
    wrapped = vote.Wrapper(n_voters=2)(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    return storage.save(wrapped, tmp_path / "adapter", extra={"reference": {"sum_nll": [0.0, 1.0]}})


def test_a_stored_calibration_comes_back_and_the_rest_of_the_card_stays(adapter):
    before = storage.read_manifest(adapter)
    files = {p.name: p.read_bytes() for p in adapter.iterdir() if p.name != storage.MANIFEST}
    head, _ = fit_calibration(*world(200, state=1), target_accuracy=0.6)
    store_calibration(head, adapter)
    manifest = storage.read_manifest(adapter)
    found = read_calibration(manifest)
    assert found == Calibration.from_json(json.loads(json.dumps(head.to_json())))
    assert (found.weights, found.state, found.threshold) == (head.weights, head.state, head.threshold)
    sums = ("calibration", "checksums")
    assert {k: v for k, v in manifest.items() if k not in sums} == {k: v for k, v in before.items() if k not in sums}
    storage.verify(adapter, manifest)
    assert {p.name: p.read_bytes() for p in adapter.iterdir() if p.name != storage.MANIFEST} == files
    other, _ = fit_calibration(world(200)[0], candidates=["score"])
    store_calibration(other, adapter)
    assert read_calibration(storage.read_manifest(adapter)).kind == "isotonic"


@pytest.mark.parametrize("file", ["added.safetensors", "selfdoubt.json"])
def test_a_damaged_adapter_gets_no_calibration_that_would_hide_it(adapter, file):
    data = (adapter / file).read_bytes()
    changed = data[:-1] + b"\x01" if file != "selfdoubt.json" else data.replace(b'"alpha": 1.0', b'"alpha": 2.0')
    assert changed != data
    (adapter / file).write_bytes(changed)
    head, _ = fit_calibration(world(200)[0], candidates=["score"])
    with pytest.raises(LoadError, match="was changed after it was saved"):
        store_calibration(head, adapter)
    assert (adapter / file).read_bytes() == changed


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    head, _ = fit_calibration(world(60)[0], candidates=["score"])
    with pytest.raises(LoadError, match=r"selfdoubt\.json"):
        store_calibration(head, tmp_path)
    assert not list(tmp_path.iterdir())
