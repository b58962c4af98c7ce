"""Answers of other systems: every spelling of gold and verdict, and one line where nothing is known."""

from __future__ import annotations

import csv
import json

import pytest

from selfdoubt.data.questions import Columns
from selfdoubt.errors import DataError
from selfdoubt.eval import records
from selfdoubt.eval.external import UNKNOWN, read_external_answers
from selfdoubt.eval.judges.judge import judge_records
from selfdoubt.eval.judges.rules import Column, Contains
from selfdoubt.eval.records import Question, Record
from selfdoubt.eval.run_folder import read_run_answers

PARIS = {"question": "Capital of France?", "answer": "It is Paris."}
MILAN = {"question": "Capital of Italy?", "answer": "Milan"}


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def verdicts(path, **options):
    found = read_external_answers(path, columns=options.pop("columns", Columns()), **options)
    return [r.correct for r in judge_records(found.records, Contains(), unknown=found.unknown, only_open=True)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("name", ["gold", "target", "reference", "answers", "Accepted Answers", "answerKey"])
def test_gold_is_found_by_its_usual_names_in_every_format(tmp_path, name, suffix):
    file = write(tmp_path / f"a{suffix}", [{**PARIS, name: "Paris"}, {**MILAN, name: "Rome"}])
    assert verdicts(file) == [True, False]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([1, 0], [True, False]),
        (["yes", "No"], [True, False]),
        (["true", "false"], [True, False]),
        ([1.0, "0"], [True, False]),
        ([0.75, "0.25"], [True, False]),
        ([True, None], [True, None]),
        (["wrong", ""], [False, None]),
    ],
)
def test_a_verdict_is_read_in_every_spelling(tmp_path, cells, expected):
    file = write(tmp_path / "a.jsonl", [{**r, "correct": c} for r, c in zip((PARIS, MILAN), cells, strict=True)])
    assert [r.correct for r in read_external_answers(file, columns=Columns()).records] == expected


def test_only_an_explicit_empty_list_is_unanswerable(tmp_path):
    rows = [{**PARIS, "answers": []}, {**PARIS, "answer": "I don't know.", "answers": []}, {**PARIS, "answers": None}]
    found = read_external_answers(write(tmp_path / "a.jsonl", rows), columns=Columns())
    after = judge_records(found.records, Contains(), unknown=found.unknown)
    assert [r.correct for r in after] == [False, True, None]
    assert after[2].note == UNKNOWN
    person = Column("human", {r.question.id: "yes" for r in after})
    assert [r.correct for r in judge_records(found.records, person, unknown=found.unknown)] == [True] * 3


def test_missing_ids_are_numbered_and_null_scores_are_none(tmp_path):
    rows = [{**PARIS, "scores": None}, {**MILAN, "id": 1, "scores": {"sum_nll": None, "x": 2}}, {**MILAN, "id": None}]
    found = read_external_answers(write(tmp_path / "a.jsonl", rows), columns=Columns()).records
    assert len({r.question.id for r in found}) == 3
    assert found[1].question.id == "1"
    assert [dict(r.scores) for r in found] == [{}, {"x": 2.0}, {}]


def test_choices_in_lettered_columns_are_judged_by_what_the_letter_names(tmp_path):
    rows = [{"question": "Capital?", "A": "Rome", "B": "Oslo", "answer": a, "gold": "A"} for a in ("Rome", "Oslo")]
    found = read_external_answers(write(tmp_path / "a.csv", rows), columns=Columns()).records
    assert [(r.question.choices, r.question.right) for r in found] == [(("Rome", "Oslo"), (0,))] * 2
    assert verdicts(tmp_path / "a.csv") == [True, False]


def test_columns_are_named_where_two_could_be_meant(tmp_path):
    rows = [{"question": "Capital?", "answer": "Paris", "prediction": "Rome", "gold": "Paris", "reference": "a book"}]
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"system's answer, 'answer' and 'prediction': .* --answer-column"):
        verdicts(file)
    with pytest.raises(DataError, match=r"the answers, 'answer' and 'gold': .* --gold-column"):
        verdicts(file, answer="prediction")
    assert verdicts(file, answer="prediction", columns=Columns(answers="gold")) == [False]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"answer": "x"}, "no column that looks like the question"),
        ({"question": "?"}, "no column that looks like a system's answer"),
        ({**PARIS, "correct": "maybe"}, "line 1: correct: wanted yes or no"),
        ({**PARIS, "scores": {"x": "high"}}, "line 1: the score x must be a number, found 'high'"),
        ({**PARIS, "scores": {"x": float("nan")}}, "line 1: the score x must be a number, found 'nan'"),
        ({**PARIS, "scores": [1]}, "line 1: scores must map names to numbers"),
        ({**PARIS, "tokens": 57}, "line 1: tokens must be a list"),
        ({**PARIS, "p_correct": 2}, "line 1: p_correct must be a number from 0 to 1"),
        ({**PARIS, "answer": ["Paris"]}, "line 1: answer must be text, found list"),
        ({**PARIS, "question": "\ud800?"}, r"line 1: question holds \ud800, half of a character"),
        ({**PARIS, "samples": ["x"]}, "line 1: samples must be objects"),
        ({**PARIS, "note": 3}, "line 1: note must be text"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_its_place(tmp_path, row, wanted):
    with pytest.raises(DataError) as raised:
        read_external_answers(write(tmp_path / "a.jsonl", [row]), columns=Columns())
    assert wanted in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_evaluate_wrote_is_read_as_it_was(tmp_path):
    found = [
        Record(Question("a", "What?", None, ("x",)), "x", {"s": 1.5}, (("x", 0.5),), correct=True, finish="stop"),
        Record(Question("b", "Who is Zorbel?"), "y", {"s": 2.5}, correct=False, finish="stop"),
        Record(Question("c", "Which?", answers=("B",), choices=("A", "B"), right=(1,)), "B", {"s": 0.5}, correct=True),
    ]
    records.save_records(tmp_path / "answers.jsonl", found)
    assert read_run_answers(tmp_path / "answers.jsonl")[0] == read_run_answers(tmp_path)[0] == found


def test_letters_are_never_answers(tmp_path):
    (tmp_path / "answers.jsonl").write_text(json.dumps({"id": "1", **PARIS, "answers": "Paris"}), encoding="utf-8")
    assert read_run_answers(tmp_path / "answers.jsonl")[0][0].question.answers == ("Paris",)
    with pytest.raises(DataError, match="answers must be a list"):
        records.read_records(tmp_path / "answers.jsonl")


def test_what_pandas_makes_of_a_table_is_read(tmp_path):
    rows = [{**PARIS, "Correct": 1.0, "SCORES": "{'x': 0.5}", "P_correct": 0.5}, {**MILAN, "Correct": 0.0}]
    first, second = read_external_answers(write(tmp_path / "a.csv", rows), columns=Columns()).records
    assert (first.correct, first.scores, first.p_correct, second.correct) == (True, {"x": 0.5}, 0.5, False)
    numbers = [{"question": "2 + 2?", "answer": 4.0, "gold": 4.0}, {"question": "2 + 3?", "answer": 5.5, "gold": 5}]
    assert verdicts(write(tmp_path / "a.jsonl", numbers)) == [True, False]


def test_a_number_that_is_too_large_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match="the score x must be a number"):
        read_external_answers(
            write(tmp_path / "a.jsonl", [{**PARIS, "gold": "x", "scores": {"x": 10**400}}]), columns=Columns()
        )
