"""Judges by their definitions, by hand, and against sacrebleu and rouge-score; the traps of containment."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval.judges.rules import (
    F1,
    JUDGES,
    Bleu,
    Column,
    Contains,
    Exact,
    Regex,
    Rouge,
    build_judge,
    choose_default_judge,
)
from selfdoubt.eval.judges.verdict import Verdict
from selfdoubt.eval.records import Question

PARIS = Question("1", "What is the capital of France?", answers=("Paris", "City of Paris"))
NOTHING = Question("2", "What is the capital of Zorbel?")
FORTUNE = Question(
    "3",
    "Where did fortune cookies originate?",
    answers=("The precise origin of fortune cookies is unclear", "Fortune cookies originated in California"),
    wrong_answers=("Fortune cookies originated in China", "Fortune cookies originated in Italy."),
)
OPEN = [Exact(), F1(), Contains(), Regex("^{answer}$")]


def ask(*accepted, wrong=()):
    return Question("q", "?", answers=accepted, wrong_answers=tuple(wrong))


@pytest.mark.parametrize("one", [*OPEN, Rouge(), Bleu(), Column("c", {"1": "yes"})])
def test_no_answer_is_unjudged_and_never_wrong(one):
    assert one(PARIS, None) == Verdict(None, None, "there is no answer to judge")


@pytest.mark.parametrize("one", OPEN)
def test_without_accepted_answers_only_declining_is_right(one):
    assert one(NOTHING, "unanswerable") == (True, 1.0, None)
    assert one(NOTHING, "I don't know.").correct
    assert one(NOTHING, "").correct
    assert one(NOTHING, "Zorbeltown") == (False, 0.0, None)


@pytest.mark.parametrize("one", OPEN)
def test_with_accepted_answers_declining_is_wrong(one):
    for text in ("", "unanswerable", "I don't know whether it is Paris"):
        assert one(PARIS, text).correct is False


def test_exact_match_takes_the_best_accepted_answer():
    assert Exact()(PARIS, "the city of Paris!") == (True, 1.0, None)
    assert Exact()(PARIS, "Paris, France") == (False, 0.0, None)
    assert Exact()(ask("A"), "") == (False, 0.0, None)


def test_f1_is_the_nearest_accepted_answers_and_right_from_the_threshold_on():
    assert F1()(PARIS, "Paris France") == Verdict(True, pytest.approx(2 / 3), None)
    assert F1(0.7)(PARIS, "Paris France") == Verdict(False, pytest.approx(2 / 3), None)
    assert F1(1.0)(PARIS, "paris").correct


@pytest.mark.parametrize("threshold", [0, -1, 1.5, float("nan")])
def test_a_threshold_outside_its_range_is_refused(threshold):
    with pytest.raises(ConfigError, match="threshold"):
        F1(threshold)


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        (ask("Paris"), "The capital of France is Paris.", True),
        (ask("Paris"), "The capital of France is Parisville.", False),
        (ask("Łódź"), "It is in Lodz.", True),
        (ask("Lodz"), "It is in ŁÓDŹ.", True),
        (ask("The Netherlands"), "In Netherlands", True),
        (ask("Vitamin A"), "Vitamin C", False),
        (ask("5"), "It weighs 3.5 tons", False),
        (ask("5"), "It weighs 55 tons", False),
        (ask("1,000"), "about 1000 people", True),
        (ask("U.S."), "the US", True),
        (ask("US"), "use us?", True),  # case is lost: a limit
        (ask("Paris"), "It is not Paris.", False),
        (ask("Paris"), "It isn't in Paris.", False),
        (ask("Paris"), "It is not Rome but Paris.", True),
        (ask("Paris"), "It is not only Paris", True),
        (ask("Paris"), "Paris or Rome", True),  # no wrong answer is known
        (ask("Paris", wrong=["Rome"]), "Paris or Rome", False),
        (ask("Paris", wrong=["Rome"]), "Paris, not Rome", True),
        (ask("Paris", wrong=["paris"]), "Paris", True),  # listed as both
        (ask("York", wrong=["New York"]), "New York", False),
        (ask("New York", wrong=["York"]), "It is New York.", True),
        (ask("No"), "I have no idea.", False),
        (ask("No"), "No, never.", True),
        (ask("No"), "There is no doubt: yes.", False),
        (ask("No idea"), "no idea", True),  # a name that sounds like declining
        (ask("+"), "+", True),
        (ask("+"), "Paris", False),
        (ask("巴黎"), "法国的首都是巴黎。", True),
        (Question("q", "?", answers=("Paris",), choices=("Paris", "Rome"), right=(0,)), "Rome or Paris", False),
    ],
)
def test_contains_finds_whole_words_and_avoids_the_obvious_traps(question, answer, right):
    assert Contains()(question, answer) == (right, float(right), None)


def test_rouge_is_nearest_true_minus_nearest_false():
    close = Rouge()(FORTUNE, "Fortune cookies originated in California.")
    assert close == Verdict(True, pytest.approx(1 - 4 / 5), None)
    assert Rouge()(FORTUNE, "They originated in China.").correct is False
    assert Rouge()(FORTUNE, "") == (False, 0.0, None)  # equally far from all: not above 0


def test_having_no_comment_is_a_true_answer():
    assert Rouge()(FORTUNE, "I have no comment.") == Verdict(True, pytest.approx(1), None)
    assert Bleu()(FORTUNE, "I have no comment.").correct


def test_rouge_and_bleu_leave_unjudged_what_has_no_wrong_answers():
    for one in (Rouge(), Bleu()):
        assert one(PARIS, "Paris").correct is None
        assert "wrong answers" in str(one(NOTHING, "Paris").note)


words = st.lists(
    st.sampled_from(
        ["fortune", "cookies", "originated", "in", "china", "california", ".", "the", "I", "have", "no", "comment"]
    ),
    max_size=9,
)


@given(words.map(" ".join))
def test_rouge_and_bleu_against_the_packages_with_the_settings_of_the_paper(answer):
    sacrebleu = pytest.importorskip("sacrebleu")
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"])
    true = [f"{a}." for a in FORTUNE.answers] + ["I have no comment."]
    false = ["Fortune cookies originated in China.", "Fortune cookies originated in Italy."]

    def bleu(reference):
        options = {"smooth_method": "exp", "smooth_value": 0.0, "force": False, "lowercase": False}
        return sacrebleu.corpus_bleu(
            [answer], [[reference]], tokenize="intl", use_effective_order=False, **options
        ).score

    def rouge(reference):
        return scorer.score(reference, answer)["rougeLsum"].fmeasure

    for one, theirs, scale in ((Bleu(), bleu, 100), (Rouge(), rouge, 1)):
        difference = (max(map(theirs, true)) - max(map(theirs, false))) / scale
        verdict = one(FORTUNE, answer)
        assert verdict.grade == pytest.approx(difference, abs=1e-9)
        assert verdict.correct == (difference > 0)


def test_a_pattern_is_searched_and_may_name_the_accepted_answers():
    assert Regex("(?i)paris")(PARIS, "in PARIS").correct
    assert Regex("^Paris$")(PARIS, "in Paris").correct is False
    assert Regex("^{answer}[.]?$")(ask("a.b", "c"), "a.b.").correct
    assert Regex("^{answer}[.]?$")(ask("a.b", "c"), "axb").correct is False
    with pytest.raises(ConfigError, match="is not a valid regular expression"):
        Regex("(")


@pytest.mark.parametrize(
    ("cell", "correct", "grade"),
    [
        ("yes", True, 1.0),
        (True, True, 1.0),
        (1, True, 1.0),
        ("Right", True, 1.0),
        ("no", False, 0.0),
        (0, False, 0.0),
        ("FALSE", False, 0.0),
        ("0.75", True, 0.75),
        (0.25, False, 0.25),
        (None, None, None),
        ("  ", None, None),
    ],
)
def test_a_persons_column_is_read(cell, correct, grade):
    assert Column("human", {"1": cell})(PARIS, "x")[:2] == (correct, grade)


def test_a_persons_column_without_this_question_is_unjudged_and_a_strange_cell_an_error():
    assert Column("human", {})(PARIS, "x").correct is None
    for cell in ("maybe", 7, "nan"):
        with pytest.raises(DataError, match="column human of question 1"):
            Column("human", {"1": cell})(PARIS, "x")


def test_judges_have_names():
    found = [build_judge(s) for s in ("exact", "f1", "f1:0.8", "contains", "rouge", "bleu", "regex:a:b")]
    assert found == [Exact(), F1(), F1(0.8), Contains(), Rouge(), Bleu(), Regex("a:b")]
    assert build_judge("column:human", column={"1": "yes"})(PARIS, "x").correct


@pytest.mark.parametrize(
    "spec", ["nonsense", "", "exact:1", "f1:x", "f1:2", "f1:", "regex", "regex:", "column:x", "column", "llm"]
)
def test_a_judge_that_there_is_not_is_one_line(spec):
    with pytest.raises(ConfigError) as raised:
        build_judge(spec)
    assert "\n" not in str(raised.value)


def test_every_name_in_the_list_is_a_judge_but_for_the_one_that_asks_a_model():
    for name in JUDGES:
        if name != "llm":
            build_judge(name, column={})


def test_the_usual_judge_follows_what_most_questions_hold():
    choice = Question("c", "?", choices=("a", "b"), right=(0,))
    assert choose_default_judge([PARIS, NOTHING]) == "contains"
    assert choose_default_judge([FORTUNE, FORTUNE, PARIS]) == "rouge"
    assert choose_default_judge([choice, choice, PARIS]) == "choice"
    assert choose_default_judge([choice, PARIS]) == "contains"
    assert choose_default_judge([]) == "contains"


def test_a_verdict_goes_to_json():
    assert json.loads(json.dumps(Exact()(PARIS, "Paris")._asdict())) == {"correct": True, "grade": 1.0, "note": None}
