from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from recipes.pocket import split
from recipes.pocket.atlas import fold
from recipes.pocket.evaluation import CATEGORIES, Question, is_right, read_questions, save_questions
from recipes.pocket.facts import all_facts
from recipes.pocket.invent import real_names
from recipes.pocket.phrasings import PHRASINGS
from recipes.pocket.questions import sample_pairs
from recipes.pocket.split import overlap, write_questions
from selfdoubt.errors import DataError
from selfdoubt.pocket import evaluation_file, reference_file

CAPITAL = Question("1", "Capital of France?", "known", "capital", "France", ("Paris",), False, 9.0)
SPEECH = replace(CAPITAL, relation="languages", subject="Switzerland", answers=("German, French and Italian",))
SHARED = replace(CAPITAL, relation="country", subject="Córdoba", answers=("Spain", "Argentina"))


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        (CAPITAL, "The capital of France is Paris.", True),
        (CAPITAL, " the capital of france is  paris", True),
        (CAPITAL, "Parisville", False),
        (CAPITAL, "Paris", False),
        (CAPITAL, "The capital of France is Parisville.", False),
        (CAPITAL, "The capital of France is Paris. The capital of Spain is Madrid.", False),
        (CAPITAL, "The capital of Spain is Paris.", False),
        (CAPITAL, "", False),
        (SPEECH, "In Switzerland people speak German, French and Italian.", True),
        (SPEECH, "In Switzerland people speak German and French.", False),
        (SPEECH, "In Switzerland people speak French, German and Italian.", False),
        (SHARED, "The city of Cordoba is in Argentina.", True),
        (SHARED, "The city of Córdoba is in Spain.", True),
        (SHARED, "The city of Córdoba is in Mexico.", False),
        (replace(SHARED, answers=(), category="invented"), "The city of Córdoba is in Spain.", False),
    ],
)
def test_the_judge_is_strict(question, answer, right):
    assert is_right(question, answer) is right


def test_questions_survive_a_file(tmp_path):
    save_questions(tmp_path / "q.jsonl", [CAPITAL, SHARED])
    assert read_questions(tmp_path / "q.jsonl") == [CAPITAL, SHARED]


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"id": 1}', "3"], ids=["no json", "list", "empty", "fields", "number"]
)
def test_a_malformed_line_is_named(tmp_path, line):
    save_questions(tmp_path / "q.jsonl", [CAPITAL])
    with (tmp_path / "q.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match="line 2") as error:
        read_questions(tmp_path / "q.jsonl")
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl cannot be read"):
        read_questions(tmp_path / "no.jsonl")


def test_the_shipped_files_are_whole():
    questions, reference = read_questions(evaluation_file()), read_questions(reference_file())
    assert evaluation_file().stat().st_size < 700_000
    counts = Counter(q.category for q in questions)
    assert set(counts) == set(CATEGORIES) == {q.category for q in reference}
    assert all(400 <= counts[c] <= 600 for c in ("known", "rare", "unseen"))
    assert all(200 <= counts[c] <= 300 for c in ("ambiguous", "invented"))
    ranked = [q for q in reference if not q.only_calibrates]
    assert 500 <= len(ranked) <= 700
    assert 0.3 < sum(not q.answers for q in reference) / len(reference) < 0.4
    assert all(not q.answers and q.category == "invented" for q in reference if q.only_calibrates)
    for file in (questions, reference):
        assert len({q.id for q in file}) == len(file)
        assert all(bool(q.answers) != (q.category == "invented") for q in file)
        assert all((q.seen > 0) == (q.category in ("known", "rare", "ambiguous")) for q in file)
        assert all(len(q.answers) > 1 for q in file if q.category == "ambiguous")
        assert all(q.held_out_phrasing for q in file)
    assert {q.relation for q in questions if q.category == "known"} == set(PHRASINGS)


def test_evaluation_and_reference_share_no_fact_and_no_city():
    questions, reference = read_questions(evaluation_file()), read_questions(reference_file())
    assert not overlap(questions, reference)
    names = [fold(q.subject) for f in (questions, reference) for q in f if q.category == "invented"]
    assert len(set(names)) == len(names)
    cities = [{fold(q.subject) for q in f if q.category != "known"} for f in (questions, reference)]
    assert not cities[0] & cities[1]


def test_the_shipped_files_come_from_the_recipe(whole):
    files = write_questions(whole, 0)
    assert files["evaluation"] == read_questions(evaluation_file())
    assert files["reference"] == read_questions(reference_file())


def test_questions_that_only_calibrate_leave_the_others_as_they_are(whole, monkeypatch):
    more = write_questions(whole, 0)
    monkeypatch.setattr(split, "UNANSWERABLE", 0)
    fewer = write_questions(whole, 0)
    assert fewer["evaluation"] == more["evaluation"]
    assert fewer["reference"] == [q for q in more["reference"] if not q.only_calibrates]


def test_every_answer_is_true_and_unseen_places_are_never_seen(whole):
    truths: dict[tuple[str, str], set[str]] = {}
    for fact in all_facts(whole):
        for name in fact.spellings:
            truths.setdefault((fact.relation, fold(name)), set()).add(fact.answer)
    taught = {(p.relation, fold(p.subject)) for p in sample_pairs(whole, 5, 100_000)}
    for question in read_questions(evaluation_file()) + read_questions(reference_file()):
        key = (question.relation, fold(question.subject))
        if question.category == "unseen":
            assert key not in taught
        if question.relation != "continent":  # some countries lie on two
            assert set(question.answers) == truths.get(key, set())


def test_invented_places_do_not_exist(whole):
    real = real_names(whole)
    for question in read_questions(evaluation_file()) + read_questions(reference_file()):
        assert (fold(question.subject) not in real) == (question.category == "invented"), question
