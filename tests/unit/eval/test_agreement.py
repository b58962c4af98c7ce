"""Agreement of samples: closed forms, laws, and NumPy as an oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.errors import ConfigError, NonFiniteError, ShapeError
from selfdoubt.eval.scores.agreement import (
    AGREEMENT_SCORES,
    SameText,
    SameWords,
    agreement_scores,
    build_equivalence,
    cluster_answers,
    dissimilarity,
    lexical_dissimilarity,
    self_consistency,
    semantic_entropy,
    semantic_entropy_weighted,
)
from selfdoubt.eval.scores.entailment import SameMeaning
from tests import oracles

answers = st.lists(
    st.sampled_from(["Paris", "paris.", "the Paris", "Rome", "Rome in Italy", "Oslo", ""]), min_size=1, max_size=10
)
nlls = st.floats(0, 60)


def test_equal_answers_have_no_doubt():
    found = agreement_scores("Paris", ["paris.", "Paris", "the Paris"], [1.0, 2.0, 3.0])
    assert found == {
        "self_consistency": 0.0,
        "semantic_entropy": 0.0,
        "semantic_entropy_weighted": 0.0,
        "n_clusters": 1.0,
        "lexical_dissimilarity": pytest.approx((0 + 1 / 3 + 1 / 3) / 3),  # words differ: an article
    }
    doubts = {"sum_nll": 1.0, "mean_nll": 0.5, "mean_total": 0.7, "max_nll": 1.0}
    assert set(agreement_scores("Paris", ["Rome", "Oslo"], [1.0, 2.0], doubts=doubts)) == set(AGREEMENT_SCORES)


def test_answers_that_all_differ_have_the_most_doubt():
    found = agreement_scores("Kyiv", ["Paris", "Rome", "Oslo", "Bern"], [1.0] * 4)
    assert found == {
        "self_consistency": 1.0,
        "semantic_entropy": pytest.approx(math.log(4)),
        "semantic_entropy_weighted": pytest.approx(math.log(4)),
        "n_clusters": 4.0,
        "lexical_dissimilarity": 1.0,
    }


def test_self_consistency_counts_the_samples_that_say_something_else_than_the_answer():
    assert self_consistency("Rome", ["Paris", "Paris", "rome", "Oslo"]) == 0.75
    assert self_consistency("Rome", ["Rome in Italy"], SameWords(0.5)) == 0.0
    assert self_consistency("Rome", ["Rome in Italy"], SameWords(0.6)) == 1.0


def test_a_text_joins_the_first_cluster_whose_first_text_is_the_same():
    texts = ["a1 b1", "b1 c1", "c1 d1", "a1 b1"]
    assert cluster_answers(texts, SameWords(0.5)) == [0, 0, 1, 0]  # c1 d1 is like b1 c1, which leads no cluster
    assert cluster_answers(texts, SameText()) == [0, 1, 2, 0]
    assert cluster_answers([]) == []


def test_semantic_entropy_by_hand():
    assert semantic_entropy([0, 0, 1, 0]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    weighted = semantic_entropy_weighted([0, 1, 0], [-math.log(0.5), -math.log(0.2), -math.log(0.1)])
    assert weighted == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


@given(answers, st.data())
def test_semantic_entropies_against_numpy(texts, data):
    of = cluster_answers(texts)
    nll = data.draw(st.lists(nlls, min_size=len(texts), max_size=len(texts)))
    shares = np.bincount(of) / len(of)
    assert semantic_entropy(of) == pytest.approx(float(-(shares * np.log(shares)).sum()), abs=1e-12)
    mass = np.bincount(of, weights=np.exp(-np.array(nll, dtype=np.float64)))
    p = mass / mass.sum()
    expected = float(-(p * np.log(np.where(p > 0, p, 1))).sum())
    assert semantic_entropy_weighted(of, nll) == pytest.approx(expected, abs=1e-9)
    assert semantic_entropy_weighted(of, [2.5] * len(of)) == pytest.approx(semantic_entropy(of), abs=1e-12)


@given(answers, answers, st.randoms(use_true_random=False))
def test_scores_stay_in_range_and_the_order_of_samples_does_not_matter(greedy, samples, random):
    found = agreement_scores(greedy[0], samples, [1.0 * len(s) for s in samples])
    n = len(samples)
    assert 0 <= found["self_consistency"] <= 1
    assert 0 <= found["semantic_entropy"] <= math.log(n) + 1e-12
    assert 0 <= found["semantic_entropy_weighted"] <= math.log(found["n_clusters"]) + 1e-12
    assert 1 <= found["n_clusters"] <= n
    assert ("lexical_dissimilarity" in found) == (n > 1)
    assert 0 <= found.get("lexical_dissimilarity", 0) <= 1
    shuffled = random.sample(samples, n)
    again = agreement_scores(greedy[0], shuffled, [1.0 * len(s) for s in shuffled])
    assert again == pytest.approx(found, abs=1e-12)


def test_weights_do_not_vanish_where_answers_are_improbable():
    assert semantic_entropy_weighted([0, 1], [5000.0, 5000.0]) == pytest.approx(math.log(2))
    assert semantic_entropy_weighted([0, 1], [0.0, 5000.0]) == 0


def test_lexical_dissimilarity_is_one_minus_the_mean_over_pairs():
    assert lexical_dissimilarity(["a b", "a b", "c d"]) == pytest.approx(1 - 1 / 3)
    assert lexical_dissimilarity(["x y", "x z"], "f1") == pytest.approx(0.5)
    assert lexical_dissimilarity(["東京", "東京"]) == 0
    with pytest.raises(ConfigError, match="no similarity is called 'x'; choose one of rouge, f1"):
        lexical_dissimilarity(["a", "b"], "x")


def test_rules_have_names():
    assert [build_equivalence("exact"), build_equivalence("f1"), build_equivalence("f1:0.8")] == [
        SameText(),
        SameWords(),
        SameWords(0.8),
    ]
    entailment = build_equivalence("nli:some/model")
    assert isinstance(entailment, SameMeaning)
    assert entailment.model == "some/model"
    for spec in ("nonsense", "exact:1", "f1:x", "f1:0", "f1:nan", "nli", "nli:"):
        with pytest.raises(ConfigError) as raised:
            build_equivalence(spec)
        assert "\n" not in str(raised.value)


def test_what_cannot_be_scored_is_an_error_and_never_a_number():
    for one in (lambda: self_consistency("x", []), lambda: semantic_entropy([])):
        with pytest.raises(ConfigError, match="at least 1 sample, got 0"):
            one()
    with pytest.raises(ConfigError, match="at least 2 samples, got 1"):
        lexical_dissimilarity(["x"])
    with pytest.raises(ShapeError, match="each of 2 samples, got 1"):
        semantic_entropy_weighted([0, 1], [1.0])
    with pytest.raises(NonFiniteError):
        semantic_entropy_weighted([0, 1], [1.0, float("nan")])


@pytest.mark.parametrize(("name", "theirs"), [("sum_nll", "MSP"), ("mean_nll", "PPL"), ("mean_total", "MTE")])
def test_cocoa_against_lm_polygraph(name, theirs):
    oracles.load_alone("lm_polygraph.utils.common")
    estimator = getattr(oracles.load_alone("lm_polygraph.estimators.cocoa"), f"Cocoa{theirs}")()
    greedy, samples = "in the city of Paris", ["Paris", "Rome", "the city Paris", "in the city of Paris", "Rome"]
    logprobs, entropies = np.array([-0.5, -1.25, -0.1]), np.array([0.3, 0.7, 0.2])
    rule = SameWords()
    similarity = np.array(rule.similarity([(greedy, sample) for sample in samples]))
    known = {
        "greedy_sentence_similarity": [similarity], "greedy_log_likelihoods": [logprobs], "entropy": [entropies],
    }  # fmt: skip
    doubts = {"sum_nll": -logprobs.sum(), "mean_nll": -logprobs.mean(), "mean_total": entropies.mean()}
    found = agreement_scores(greedy, samples, None, rule, doubts=doubts)
    assert found[f"cocoa_{name}"] == pytest.approx(estimator(known)[0])
    assert 0 < found[f"cocoa_{name}"] < doubts[name]


def test_without_degrees_dissimilarity_is_self_consistency():
    samples = ["Paris", "Rome", "paris."]
    assert dissimilarity("Paris", samples) == self_consistency("Paris", samples) == pytest.approx(1 / 3)
    assert dissimilarity("x b", ["x c", "x b"], SameWords()) == pytest.approx(0.25)
    assert agreement_scores("Paris", samples, doubts={"sum_nll": 3.0})["cocoa_sum_nll"] == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="at least 1 sample"):
        dissimilarity("Paris", [], SameWords())
