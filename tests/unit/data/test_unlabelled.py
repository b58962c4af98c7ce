"""Questions without labels: the list of this package, text files, and files of which only the question is read."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from selfdoubt import pocket
from selfdoubt.data.question_sets import load_questions
from selfdoubt.data.questions import Columns
from selfdoubt.data.unlabelled import list_shipped, load_unlabelled
from selfdoubt.errors import ConfigError, DataError

FILE = Path(pocket.__file__).parents[1] / "data" / "prepare_questions.jsonl"


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def test_the_list_of_this_package_has_many_topics_lengths_and_languages():
    rows = [json.loads(row) for row in FILE.read_text(encoding="utf-8").splitlines()]
    assert load_unlabelled() == list_shipped()
    assert [q.text for q in list_shipped()] == [row["question"] for row in rows]
    assert 280 <= len(rows) <= 350
    assert len({(row["question"], row.get("context")) for row in rows}) == len(rows)
    assert len(Counter(row["topic"] for row in rows)) >= 12
    languages = Counter(row["language"] for row in rows)
    assert {"es", "fr", "de", "it", "pt", "zh", "ja", "ar", "hi", "ru"} <= set(languages)
    assert 0.1 <= 1 - languages["en"] / len(rows) <= 0.2
    assert sum("context" in row for row in rows) >= 10
    assert not any(q.answers or q.choices for q in list_shipped())
    assert FILE.stat().st_size < 100_000


def test_no_question_of_the_list_is_from_a_data_set(real):
    folder = real("README.md").parent
    seen = {normal(row["instruction"]) for row in json.loads((folder / "alpaca/alpaca_data.json").read_text("utf-8"))}
    for file in (*folder.glob("nq_open/*.jsonl"), folder / "opentriviaqa/opentriviaqa.jsonl"):
        seen |= {normal(json.loads(row)["question"]) for row in file.read_text("utf-8").splitlines()}
    for file in folder.glob("webquestions/*.json"):
        seen |= {normal(row["qText"]) for row in json.loads(file.read_text("utf-8"))}
    for article in json.loads((folder / "squad2/squad_dev_v2.0_rebuilt.json").read_text("utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            seen |= {normal(paragraph["context"]), *(normal(asked["question"]) for asked in paragraph["qas"])}
    with (folder / "truthfulqa/TruthfulQA.csv").open(encoding="utf-8-sig", newline="") as text:
        seen |= {normal(row["Question"]) for row in csv.DictReader(text)}
    seen |= {normal(question.text) for question in load_questions("pocket")}
    assert len(seen) > 100_000
    assert [q.text for q in list_shipped() if {normal(q.text), normal(q.context or q.text)} & seen] == []


def test_a_text_file_is_one_question_a_line(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\ufeffWho is this?\n\n  \r\nWhere?  \n    if x: what?\n", encoding="utf-8")
    assert [q.text for q in load_unlabelled(file)] == ["Who is this?", "Where?", "    if x: what?"]
    assert len(load_unlabelled(str(file), limit=2)) == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"question": "Who?", "context": "Ann."}\n{"question": "Where?", "context": null}'),
        ("a.jsonl", '{"text": "Who?", "context": "Ann."}\n{"text": "Where?", "context": ""}'),
        ("a.csv", "id,Question,passage,answer,gold\n1,Who?,Ann.,x,y\n2,Where?,,,\n"),
        ("a.json", '[{"prompt": "Who?", "passage": "Ann.", "choices": "broken"}, {"prompt": "Where?", "passage": ""}]'),
        ("a.tsv", "question\tA\tB\tcontext\nWho?\tx\ty\tAnn.\nWhere?\tx\ty\t\n"),
        # A file of answers: those of a system, and whether they are right.
        ("a.jsonl", '{"id": "1", "question": "Who?", "answer": "I", "correct": true, "context": "Ann."}\n'
                    '{"id": "2", "question": "Where?", "answer": "", "correct": null}'),
    ],
)  # fmt: skip
def test_only_questions_and_passages_are_read(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    read = load_unlabelled(tmp_path / name)
    assert [(q.text, q.context) for q in read] == [("Who?", "Ann."), ("Where?", None)]
    assert not any(q.answers or q.choices for q in read)


def test_columns_can_be_named(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("ask,question\nWho?,no\n", encoding="utf-8")
    assert load_unlabelled(file, columns=Columns(question="ask"))[0].text == "Who?"


def test_the_questions_of_labelled_sets_lose_their_answers(real):
    for name in ("truthfulqa/TruthfulQA.csv", "squad2/squad_dev_v2.0_rebuilt.json", "nq_open/NQ-open.dev.jsonl"):
        labelled, bare = load_questions(real(name), limit=5), load_unlabelled(real(name), limit=5)
        assert [(q.id, q.text, q.context) for q in bare] == [(q.id, q.text, q.context) for q in labelled]
        assert not any(q.answers or q.wrong_answers or q.choices for q in bare)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n\n", "a.txt holds no questions; write one per line"),
        ("a.jsonl", "", "a.jsonl holds no questions; give a file with at least one"),
        ("a.csv", "answer\nx\n", "has no column that looks like the question"),
        ("a.csv", "question\nx\n1,2\n", "more cells than the header has"),
        ("a.jsonl", '{"question": "Who?"}\n{"question": 3}', "line 2: question must be text, found int"),
        ("a.jsonl", '{"question": "Who?"}\n{"question": " "}', "line 2: question is empty"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text but UTF-16"),
        ("a.pdf", "x", "give a file that ends in"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        load_unlabelled(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"missing\.txt cannot be read \(No such file or directory\)"):
        load_unlabelled(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="no question file at"):
        load_unlabelled(tmp_path / "missing.jsonl")
    with pytest.raises(ConfigError, match="the limit must be at least 1"):
        load_unlabelled(limit=0)
