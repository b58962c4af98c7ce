"""One reader: what a file means to training is what it means to evaluate, and what is ambiguous is refused alike."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.data.cells import read_texts, trim_text
from selfdoubt.data.chats import read_chats
from selfdoubt.data.question_sets import load_questions
from selfdoubt.data.questions import Columns
from selfdoubt.errors import ConfigError, DataError

LONG = "x" * 200_000
CHOICES = '"[""3"", ""1"", ""0""]"'
PLAIN = [("Q1?", "a"), ("Q2?", "b")]


def both(path, **columns):
    """Question and first answer, to evaluate and to train."""
    given = Columns(**columns)
    asked = [(q.text, q.answers[0]) for q in load_questions(path, columns=given)]
    chats = list(read_chats(str(path), columns=given))
    learnt = [(question["content"], answer["content"].strip()) for question, answer in chats]
    assert asked == learnt
    return asked


@pytest.mark.parametrize(
    ("name", "text", "pairs"),
    [
        ("a.csv", ",question,answer\n0,Q1?,a\n1,Q2?,b\n", PLAIN),
        ("a.csv", "Unnamed: 0,question,answer\n0,Q1?,a\n1,Q2?,b\n", PLAIN),
        ("a.csv", "question,answer,,\nQ1?,a,,\nQ2?,b,,\n", PLAIN),
        ("a.csv", "question,answer\nQ1?,a,,\nQ2?,b\n", PLAIN),
        ("a.csv", "question,answer,,\nQ1?,a,,\n,,,\nQ2?,b,,\n,,,\n", PLAIN),
        ("a.csv", "sep=,\nquestion,answer\nQ1?,a\nQ2?,b\n", PLAIN),
        ("a.csv", "question,answer\nQ1?,\"('a', 'c')\"\nQ2?,b\n", PLAIN),
        ("a.csv", "\ufeffQUESTION, Answer\r\nQ1?,a\r\n\r\nQ2?,b\r\n", PLAIN),
        ("a.tsv", "Question\tAnswer\nQ1?\ta\nQ2?\tb\n", PLAIN),
        ("a.csv", f'question,answer\nQ1?,"{LONG}"\n', [("Q1?", LONG)]),
        ("a.csv", 'question,answers\nQ1?,"[""Côte d\'Ivoire"", \'Ivory Coast\']"\n', [("Q1?", "Côte d'Ivoire")]),
        ("a.csv", "question,A,B,C,D,answer\nQ1?,Paris,Rome,Oslo,Bern,B\n", [("Q1?", "Rome")]),
        ("a.csv", "question,A,B,C,D,answer\nQ1?,Paris,Rome,Oslo,,Oslo\n", [("Q1?", "Oslo")]),
        ("a.csv", "question,option_a,option_b,answer\nQ1?,x,y,b\n", [("Q1?", "y")]),
        ("a.csv", "question,choice1,choice2,answer\nQ1?,7,8,2\n", [("Q1?", "8")]),
        ("a.csv", 'question,choices,answer\nQ1?,"[""x"", ""y""]",1\n', [("Q1?", "y")]),
        (
            "a.jsonl",
            '{"question": "Q1?", "choices": {"text": ["3", "1", "2"], "label": ["1", "2", "3"]}, "answerKey": "2"}',
            [("Q1?", "1")],
        ),
        ("a.jsonl", '{"Question": "Q1?", "ANSWERS": ["a", "c"]}\n{"Question": "Q2?", "ANSWERS": ["b"]}', PLAIN),
        ("a.jsonl", '{"question": "Q1?", "answer": 42}', [("Q1?", "42")]),
        ("a.jsonl", '{"question": "Q1?", "answers": {"text": ["a"], "answer_start": [0]}}', PLAIN[:1]),
        ("a.json", '[{"question": "Q1?", "answer": {"Value": "a", "Aliases": ["c"]}}]', PLAIN[:1]),
        ("a.jsonl", '{"id": "1", "question": "Q1?", "answer": "z", "correct": false, "answers": ["a"]}', PLAIN[:1]),
    ],
)
def test_a_file_means_the_same_to_evaluate_and_to_train(tmp_path, name, text, pairs):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert both(tmp_path / name) == pairs


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.csv", "question,answer,\nQ1?,a,\nQ2?,b,note\n", "line 3: column 3 has no name but holds 'note'"),
        ("a.csv", ",question,answer\nx,Q1?,a\n", "line 2: column 1 has no name but holds 'x'"),
        ("a.csv", "question,question,answer\na,b,c\n", "line 1: the column 'question' comes twice"),
        (
            "a.csv",
            "question,Question,answer\na,b,c\n",
            "'question' and 'Question': say which one it is with --question",
        ),
        ("a.jsonl", '{"question": "?", "answer": "a", "gold": "b"}', "'answer' and 'gold': say which one it is with"),
        ("a.jsonl", '{"question": "?", "answer": "a", "reference": "a"}', "'answer' and 'reference': say which"),
        (
            "a.csv",
            f"question,choices,answer\nQ1?,{CHOICES},0\n",
            "line 2: answer '0' is the text of one choice and the",
        ),
        ("a.jsonl", '{"question": "?", "choices": [3, 2, 1], "answer": 1}', "--answers-name text or index"),
        ("a.csv", "question,answers\nQ1?,\"['a' 'b']\"\n", "looks like a list but is neither JSON nor Python"),
        ("a.jsonl", '{"question": "a\\ud800", "answer": "b"}', "line 1: question holds \\ud800, half of a character"),
        ("a.jsonl", '{"question": "a", "answers": ["b\\udfff"]}', "line 1: answers holds \\udfff, half of a character"),
        ("a.jsonl", "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_ambiguous_or_broken_is_refused_alike(tmp_path, name, text, wanted):
    (tmp_path / name).write_text(text, encoding="utf-8")
    for reader in (load_questions, lambda path: list(read_chats(str(path)))):
        with pytest.raises(DataError) as raised:
            reader(tmp_path / name)
        assert wanted in str(raised.value)
        assert "\n" not in str(raised.value)


def test_what_is_ambiguous_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "?", "answer": "a", "gold": "b"}')
    assert both(tmp_path / "a.jsonl", answers="gold") == [("?", "b")]
    (tmp_path / "a.csv").write_text(f"question,choices,answer\nQ1?,{CHOICES},0\n")
    assert both(tmp_path / "a.csv", named_by="index") == [("Q1?", "3")]
    assert both(tmp_path / "a.csv", named_by="text") == [("Q1?", "0")]
    with pytest.raises(ConfigError, match="name a choice by text"):
        Columns(named_by="colour")


def test_a_number_is_a_text_where_every_answer_of_the_file_is_one(tmp_path):
    first = {"question": "Q1?", "choices": ["red", "blue"], "answer": "blue"}
    second = {"question": "Q2?", "choices": ["3", "12", "1", "0"], "answer": "3"}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n")
    assert both(tmp_path / "a.jsonl") == [("Q1?", "blue"), ("Q2?", "3")]
    (tmp_path / "b.jsonl").write_text(f"{json.dumps({**first, 'answer': '1'})}\n{json.dumps(second)}\n")
    with pytest.raises(DataError, match="line 2: answer '3' is the text of one choice"):
        load_questions(tmp_path / "b.jsonl")


def test_code_keeps_its_indentation_when_it_is_learnt(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "  f\n", "answer": ["    return 1\n", "x"]}))
    assert [m["content"] for m in next(read_chats(str(tmp_path / "a.jsonl")))] == ["  f", "    return 1\n"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize(
    ("question", "wanted"),
    [
        ("    if x:\n        y\n", "    if x:\n        y"),
        ("\n \n\tif x:\n\t\ty\n\n", "\tif x:\n\t\ty"),
        ("    return x", "    return x"),
        ("def f():\n    pass", "def f():\n    pass"),
        (" Who is it? ", "Who is it?"),
        ("\n\nWho is it?\n", "Who is it?"),
        ("\u3000\u3000Who?\nI?", "Who?\nI?"),
    ],
)
def test_a_question_and_its_passage_keep_their_indentation(tmp_path, suffix, question, wanted):
    file = tmp_path / f"a{suffix}"
    row = {"question": question, "context": question, "answer": "a"}
    with file.open("w", newline="", encoding="utf-8") as out:
        if suffix == ".csv":
            table = csv.DictWriter(out, list(row))
            table.writeheader()
            table.writerow(row)
        else:
            out.write(json.dumps(row))
    assert both(file) == [(wanted, "a")]
    assert load_questions(file)[0].context == wanted


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"question;answer\nQ1?;a\n", "separated by ';'"),
        ("a.csv", b"sep=;\nquestion;answer\nQ1?;a\n", "separated by ';'"),
        ("a.csv", b"question\tanswer\nQ1?\ta\n", "separated by tabs.*or name it .tsv"),
        ("a.csv", b"question|answer\nQ1?|a\n", r"separated by '\|'"),
        ("a.tsv", b"question,answer\nQ1?,a\n", "separated by ','.*or name it .csv"),
        ("a.csv", "question,answer\nQ1?,a\n".encode("utf-16"), "but UTF-16"),
        ("a.csv", "question,answer\nQ1?,a\n".encode("utf-16-be"), "but UTF-16"),
        ("a.json", b'{"question":{"0":"Q1?"},"answer":{"0":"a"}}', "orient='records'"),
        ("a.json", b'{"0":{"question":"Q1?","answer":"a"},"1":{"question":"Q2?","answer":"a"}}', "orient='records'"),
        ("a.json", b'{"columns":["question","answer"],"index":[0],"data":[["Q1?","a"]]}', "orient='records'"),
        ("a.json", b'{"schema":{},"data":[{"question":"Q1?","answer":"a"}]}', "orient='records'"),
    ],
)
def test_what_pandas_and_excel_write_otherwise_is_refused_with_the_way_out(tmp_path, name, content, said):
    file = tmp_path / name
    file.write_bytes(content)
    for reader in (load_questions, lambda path: list(read_chats(str(path)))):
        with pytest.raises(DataError, match=said) as raised:
            reader(file)
        assert "\n" not in str(raised.value)


def test_a_number_that_pandas_made_a_float_is_the_whole_number(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "Q1?", "answer": 4.0}')
    assert load_questions(tmp_path / "a.jsonl")[0].answers == ("4", "4.0")
    assert both(tmp_path / "a.jsonl") == [("Q1?", "4")]
    (tmp_path / "a.jsonl").write_text('{"question": "Q1?", "choices": ["x", "y"], "answer": 1.0}')
    assert both(tmp_path / "a.jsonl") == [("Q1?", "y")]


def test_a_row_of_truthfulqa_is_known_in_any_file(tmp_path):
    row = {"question": "Q1?", "best_answer": "a", "correct_answers": ["a", "b"], "incorrect_answers": ["c"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert load_questions(tmp_path / "a.jsonl")[0].answers == ("a", "b")


cell = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)


@given(st.lists(st.tuples(cell, cell), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_any_table_comes_back_with_or_without_an_index(tmp_path_factory, rows, indexed, trailing):
    file = io.StringIO()
    table = csv.writer(file)
    more = [""] if trailing else []
    table.writerow([*([""] if indexed else []), "question", "answer", *more])
    for number, (question, answer) in enumerate(rows):
        table.writerow([*([number] if indexed else []), question, f"={answer}", *more])
    path = tmp_path_factory.mktemp("table") / "a.csv"
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    assert both(path) == [(trim_text(q), f"={a}".strip()) for q, a in rows]


@given(st.lists(cell, min_size=1, max_size=5))
def test_a_list_as_python_or_json_writes_it_is_that_list(parts):
    wanted = tuple(dict.fromkeys(p.strip() for p in parts))
    assert read_texts("here", "answers", repr(parts)) == read_texts("here", "answers", json.dumps(parts)) == wanted
