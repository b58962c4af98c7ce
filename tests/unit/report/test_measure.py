"""What a report holds: the metrics' numbers, what is counted, and reasons where there is no number."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from selfdoubt import metrics
from selfdoubt.errors import DataError
from selfdoubt.eval.records import add_scores
from selfdoubt.metrics import selective
from selfdoubt.metrics.bootstrap import paired_difference
from selfdoubt.report.best_of_n import measure_majority
from selfdoubt.report.measure import BASELINE, list_costs
from tests.records import COSTS, judged, measured, record, sample

FEW = {"draws": 20}


@pytest.fixture(scope="module")
def report():
    return measured(judged(), {"costs": COSTS}, **FEW)


def entries(found, path=()):
    """Every entry of a report with where it stands."""
    if isinstance(found, dict):
        if "value" in found:
            yield path, found
        for key, value in found.items():
            yield from entries(value, (*path, key))
    elif isinstance(found, list):
        for i, value in enumerate(found):
            yield from entries(value, (*path, i))


def test_a_report_is_json_without_nan_and_the_same_again(report):
    text = json.dumps(report, allow_nan=False)
    assert text == json.dumps(measured(judged(), {"costs": COSTS}, **FEW))
    assert json.loads(text)["format"] == 1


def test_every_number_lies_in_its_interval_or_says_why_it_is_none(report):
    found = list(entries(report))
    assert len(found) > 60
    for path, entry in found:
        if entry["value"] is None:
            assert entry["why"], path
        else:
            assert entry["low"] <= entry["value"] + 1e-12, path
            assert entry["value"] <= entry["high"] + 1e-12, path


def test_numbers_are_those_of_other_implementations(report):
    records = judged()
    wrong = np.array([not r.correct for r in records])
    for name in ("good", BASELINE):
        score = np.array([r.scores[name] for r in records])
        metrics = report["scores"][name]["metrics"]
        assert metrics["auroc"]["value"] == pytest.approx(roc_auc_score(wrong, score))
        assert metrics["auprc"]["value"] == pytest.approx(average_precision_score(wrong, score))
        assert metrics["prr_50"]["value"] == pytest.approx(selective.prr(score, ~wrong, max_rejection=0.5))
        assert metrics["aurc"]["value"] == pytest.approx(selective.aurc(score, ~wrong))
        assert metrics["accuracy_at_9"]["value"] == pytest.approx(selective.accuracy_at(score, ~wrong, coverage=0.09))
    own = np.exp([-r.scores[BASELINE] for r in records])
    found = report["probabilities"]["sequence probability"]
    assert found["brier"]["value"] == pytest.approx(brier_score_loss(~wrong, own))
    assert found["nll"]["value"] == pytest.approx(log_loss(~wrong, own), rel=1e-5)
    assert sum(b["answers"] for b in found["reliability"]) == len(records)


def test_differences_are_paired_and_against_the_baseline(report):
    records = judged()
    good, base = (np.array([r.scores[name] for r in records]) for name in ("good", BASELINE))
    expected = paired_difference("prr", good, base, np.array([r.correct for r in records]), **FEW)
    found = report["scores"]["good"]["against"]["prr"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx((expected.value, expected.low, expected.high))
    assert report["scores"][BASELINE]["against"] == {}


def test_the_order_of_the_answers_does_not_matter():
    records = judged(40)
    again = random.Random(3).sample(records, len(records))
    values = [
        {path: e["value"] for path, e in entries(measured(r, draws=5)) if path[0] in ("scores", "probabilities")}
        for r in (records, again)
    ]
    assert values[0] == pytest.approx(values[1], nan_ok=False)


def test_unjudged_answers_are_counted_with_their_reasons_and_change_no_number():
    records = judged(40)
    late = [replace(record(f"u{i}"), correct=None, note="timeout" if i else None) for i in range(3)]
    more = measured([*records, *late], **FEW)
    assert more["counts"]["unjudged"] == 3
    assert more["counts"]["unjudged_because"] == {"timeout": 2, "no reason was given": 1}
    assert more["scores"] == measured(records, **FEW)["scores"]
    assert any("3 of 43 answers are unjudged" in s for s in more["verdict"]["sentences"])


@pytest.mark.parametrize("right", [True, False])
def test_with_one_class_only_a_ranking_is_no_number_and_the_reason_is_told(right):
    records = [replace(r, correct=right) for r in judged(30)]
    found = measured(records, **FEW)
    metrics = found["scores"]["good"]["metrics"]
    for name in ("auroc", "auprc", "prr", "prr_50"):
        assert metrics[name]["value"] is None
        assert "right" in metrics[name]["why"]
    assert metrics["accuracy_at_35"]["value"] == right
    assert found["verdict"]["score"] is None
    assert found["verdict"]["sentences"][0].endswith(f"all 30 judged answers are {'right' if right else 'wrong'}.")


@pytest.mark.parametrize("judged_answers", [0, 1])
def test_without_enough_judged_answers_nothing_is_a_number(judged_answers):
    records = [replace(r, correct=r.correct if i < judged_answers else None) for i, r in enumerate(judged(5))]
    found = measured(records, **FEW)
    assert all(e["value"] is None for path, e in entries(found) if path[0] in ("scores", "probabilities"))
    assert f"{judged_answers} of 5 are judged" in found["verdict"]["sentences"][0]


def test_no_records_are_an_error():
    with pytest.raises(DataError, match="no answers to measure"):
        measured([], {})


def test_constant_scores_are_left_out_and_partial_ones_measured_where_they_are(report):
    assert report["left_out"] == {"flat": "it is 0.5 for all 80 judged answers that have it"}
    records = [add_scores(r, {"half": r.scores["good"]}) if i < 40 else r for i, r in enumerate(judged())]
    found = measured(records, **FEW)["scores"]["half"]
    assert found["judged"] == 40
    assert found["note"] == "missing for 40 of 80 judged answers, measured on the others"
    assert found["metrics"] == measured(records[:40], **FEW)["scores"]["good"]["metrics"]


def test_without_the_baseline_nothing_is_compared():
    records = [replace(r, scores={"good": r.scores["good"]}, p_correct=None) for r in judged()]
    found = measured(records, **FEW)
    assert found["scores"]["good"]["against"] == {}
    assert BASELINE in found["left_out"]
    assert found["verdict"]["beats_baseline"] is None


def test_a_score_costs_what_it_needs(report):
    assert list_costs("sum_nll") == ("answer",)
    assert report["scores"]["good"]["cost"] == {"passes": 1, "seconds": 10.0, "ratio": 1.0}
    extra = {"semantic_entropy": 1.0, "p_false": 0.5}
    records = [add_scores(r, {k: v * r.scores["good"] for k, v in extra.items()}) for r in judged(20)]
    records = [replace(r, scores={**r.scores, "p_false": 1 / (1 + math.exp(-r.scores["p_false"]))}) for r in records]
    scores = measured(records, {"costs": COSTS}, **FEW)["scores"]
    assert scores["semantic_entropy"]["cost"] == {"passes": 5, "seconds": 42.0, "ratio": 4.2}
    assert scores["p_false"]["cost"]["ratio"] == 1.5
    unknown = measured(records, {"costs": {"answer": COSTS["answer"]}}, **FEW)["scores"]
    assert unknown["semantic_entropy"]["cost"] == {"passes": None, "seconds": None, "ratio": None}


def test_the_verdict_says_yes_of_a_good_score_and_no_of_one_that_lies():
    good = measured(judged(300), **FEW)["verdict"]
    assert (good["score"], good["low_risk_is_right"], good["beats_baseline"]) == ("p_correct", "yes", "yes")
    assert good["sentences"][0].startswith("Low risk means right more often")
    liars = [replace(r, p_correct=1 - r.p_correct, scores={BASELINE: r.scores[BASELINE]}) for r in judged(300)]
    bad = measured(liars, **FEW)["verdict"]
    assert (bad["score"], bad["low_risk_is_right"], bad["beats_baseline"]) == ("p_correct", "no", "no")
    assert "does worse than" in bad["sentences"][1]


def test_the_best_of_many_random_scores_is_not_said_to_beat_the_baseline():
    """Picked and tested on the same answers, the best of 40 useless scores has its interval above zero here."""
    dice = np.random.default_rng(4)
    records = [
        record(
            f"q{i}",
            bool(dice.random() < 0.6),
            scores={n: float(dice.random()) for n in (BASELINE, *map(str, range(40)))},
        )
        for i in range(120)
    ]
    found = measured(records, draws=200)
    best = found["verdict"]["best"]
    assert found["scores"][best]["against"]["prr"]["low"] > 0
    assert found["verdict"]["beats_baseline"] != "yes"


def test_topics_are_measured_apart(report):
    assert [(t["topic"], t["judged"]) for t in report["topics"]] == [("even", 40), ("odd", 40)]
    own = [r for r in judged() if r.question.topic == "even"]
    alone = measured(own, **FEW)
    assert report["topics"][0]["accuracy"] == alone["accuracy"]
    assert report["topics"][0]["prr"]["p_correct"] == alone["scores"]["p_correct"]["metrics"]["prr"]


def test_abstention_is_counted_over_all_and_accuracy_over_the_judged():
    records = [replace(r, abstain=r.p_correct < 0.7) for r in judged()]
    records[0] = replace(records[0], abstain=False, correct=None)
    found = measured(records, {"threshold": 0.7}, **FEW)["abstention"]
    given = [r for r in records if not r.abstain]
    assert found["coverage"]["value"] == len(given) / 80
    assert found["accuracy"]["value"] == pytest.approx(np.mean([r.correct for r in given if r.correct is not None]))
    assert found["threshold"] == 0.7


def test_what_abstaining_is_worth():
    records = [replace(r, abstain=r.p_correct < 0.7) for r in judged()]
    records += [record("unjudged", None, abstain=False, p_correct=0.9), record("no p", True, abstain=True)]
    found = measured(records, {"threshold": 0.7}, **FEW)
    known = [r for r in records if r.correct is not None]
    away, right = [r.abstain for r in known], [r.correct for r in known]
    entries = found["abstention"]["metrics"]
    assert entries == {
        name: e.to_json() for name, e in metrics.estimate_abstention(away, right, draws=FEW["draws"]).items()
    }
    assert entries["omniscience_index"]["value"] == metrics.omniscience_index(away, right)
    scored = [r for r in known if r.p_correct is not None]
    p, judgements = np.array([r.p_correct for r in scored]), np.array([r.correct for r in scored])
    decisions = np.array([r.abstain for r in scored])
    assert [entry["price"] for entry in found["utilities"]] == list(metrics.PRICES)
    for entry in found["utilities"]:
        worth = {"price": entry["price"]}
        rule = metrics.abstain_at_price(p, **worth)
        best = metrics.find_best_threshold(1 - p, judgements, **worth)
        assert entry["answer_all"]["value"] == metrics.utility(np.zeros_like(judgements), judgements, **worth)
        assert entry["threshold"]["value"] == metrics.utility(decisions, judgements, **worth)
        assert entry["rule"]["value"] == metrics.utility(rule, judgements, **worth)
        assert entry["rule_coverage"] == pytest.approx(1 - rule.mean())
        assert (entry["best"]["value"], entry["best_coverage"]) == (best.utility, best.coverage)
        assert np.mean(p >= entry["best_threshold"] - 1e-12) == pytest.approx(best.coverage)
        assert entry["best"]["low"] <= entry["best"]["value"] <= entry["best"]["high"]
    said = " ".join(found["verdict"]["sentences"])
    assert f"Omniscience index (right less wrong, abstaining 0): {entries['omniscience_index']['value']:.3f}" in said
    assert "If a wrong answer costs 9 right ones, answering where p_correct is above 0.9 (" in said


def test_a_price_needs_a_probability_and_no_threshold():
    found = measured(judged(), **FEW)
    assert found["abstention"].keys() == {"why"}
    assert [entry["threshold"] for entry in found["utilities"]] == [None] * len(metrics.PRICES)
    bare = measured(judged(calibrated=False), **FEW)
    assert bare["utilities"] == []
    assert "If a wrong answer costs" not in " ".join(bare["verdict"]["sentences"])


def test_samples_are_chosen_by_risk_by_number_and_by_chance():
    one = record("a", True, samples=(sample(True, 0.1), sample(False, 0.5), sample(False, 0.9)))
    two = record("b", False, samples=(sample(True, 0.2), sample(False, 0.2), sample(True, 0.8)))
    found = measured([one, two, *judged(4)], **FEW)["samples"]
    values = {name: found[name]["value"] for name in ("one_answer", "least_risky", "most_risky", "random", "majority")}
    assert values == {
        "one_answer": 0.5,
        "least_risky": 0.75,  # the tie counts half
        "most_risky": 0.5,
        "random": 0.5,
        "majority": 0.5,
    }
    assert found["questions"] == 2


def test_a_tied_majority_counts_with_its_mean_and_case_does_not_part():
    drawn = [
        sample(True, text="Paris."),
        sample(True, text="paris"),
        sample(False, text="Rome"),
        sample(False, text="rome"),
    ]
    assert measure_majority(drawn) == 0.5
    assert measure_majority(drawn[:3]) == 1.0


def test_answering_until_sure_takes_the_first_sure_sample_and_pays_for_the_tries():
    one = record(
        "a", samples=(sample(False, percentile=0.5), sample(True, percentile=0.01), sample(False, percentile=0.0))
    )
    two = record("b", samples=(sample(True, percentile=0.5),) * 3)
    found = measured([one, two], {"costs": COSTS}, **FEW)["samples"]["until_sure"]
    assert found["reached"]["value"] == 0.5
    assert found["accuracy"]["value"] == 1.0
    assert found["tries"]["value"] == 2.5
    assert found["cost"] == {"passes": 2.5, "seconds": 30 / 4 * 2.5, "ratio": 30 / 4 * 2.5 / 10}
    assert found["reference"] == "the model's reference answers"


def test_without_reference_answers_the_run_itself_is_the_reference_and_says_so():
    records = [record(f"q{i}", scores={BASELINE: float(i)}) for i in range(100)]
    records[5] = replace(records[5], samples=(sample(False, 50.0), sample(True, 0.0)))
    found = measured(records, **FEW)["samples"]["until_sure"]
    assert found["reference"] == "the 100 answers of this run (sum_nll)"
    assert (found["reached"]["value"], found["tries"]["value"]) == (1, 2)


def test_questions_with_an_unjudged_sample_are_left_out_and_counted():
    bad = record("a", samples=(sample(True), sample(None)))
    good = record("b", samples=(sample(True), sample(True)))
    found = measured([bad, good], **FEW)["samples"]
    assert (found["drawn"], found["questions"], found["unjudged"]) == (2, 1, 1)
    assert "judged" in measured([bad], **FEW)["samples"]["why"]
