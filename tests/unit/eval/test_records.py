"""A file of answers: what is written is what is read, and what is broken is told with its line."""

from __future__ import annotations

import json

import pytest

from selfdoubt.errors import DataError
from selfdoubt.eval import records
from selfdoubt.eval.records import Question, Record, Sample

FULL = Record(
    Question("a", "What?", "A passage.", ("x", "y"), ("z",), ("x", "z"), (0,), "topic"),
    "x <b> \u2028",
    {"sum_nll": 1.5, "choice_nll": 0.25},
    (("x", 0.5), (" <b>", 1.0)),
    (("What", 0.1),),
    (Sample("x", 0.5, 0.25, True), Sample("z", 1.5)),
    "stop",
    0.5,
    0.9,
    False,
    True,
    1.0,
    "a note",
)


def test_records_come_back_as_they_were_written(tmp_path):
    bare = Record(Question("b", "Why?"), None, note="the call failed")
    records.save_records(tmp_path / "r.jsonl", [FULL, bare])
    assert records.read_records(tmp_path / "r.jsonl") == [FULL, bare]
    plain = json.loads((tmp_path / "r.jsonl").read_text(encoding="utf-8").split("\n")[1])
    assert plain == {
        "id": "b",
        "question": "Why?",
        "answers": [],
        "answer": None,
        "correct": None,
        "note": "the call failed",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "line 1: a record of answers is broken .KeyError: 'id'"),
        ("[1]", "line 1: wanted an object with keys, found list"),
        ("{", "line 1: broken JSON"),
        ('{"id": "1", "question": "?", "scores": {"sum_nll": NaN}}', "the score sum_nll of question 1 is nan"),
        ('{"id": "1", "question": "?", "scores": {"sum_nll": "high"}}', "a record of answers is broken"),
    ],
)
def test_a_broken_line_is_told_with_its_place(tmp_path, line, message):
    (tmp_path / "r.jsonl").write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        records.read_records(tmp_path / "r.jsonl")


def test_an_id_that_comes_twice_is_an_error(tmp_path):
    records.save_records(tmp_path / "r.jsonl", [FULL, FULL])
    with pytest.raises(DataError, match="line 2: the id 'a' comes twice"):
        records.read_records(tmp_path / "r.jsonl")
