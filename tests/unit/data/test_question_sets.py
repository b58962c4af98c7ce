"""Question sets: every layout, real files with their counts, ids and orders that stay, and where a file is broken."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfdoubt.data.question_sets import POCKET, load_questions, read_column
from selfdoubt.data.questions import Columns
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval.few_shot import choose_examples
from selfdoubt.eval.records import Question, Record, save_records

ROWS = [
    {"question": "Capital of France?", "answers": ["Paris", "paris city"]},
    {"question": 'Who said "no;\nnever"?', "answers": ["Nobody; or me"]},
]
PLAIN = [(r["question"], tuple(r["answers"])) for r in ROWS]


def write(path: Path, rows: list[dict[str, Any]], **options) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\r\n", encoding="utf-8-sig")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows)
    return path


def test_every_format_gives_the_same_questions(tmp_path):
    found = [load_questions(write(tmp_path / f"data{suffix}", ROWS)) for suffix in (".json", ".jsonl", ".csv", ".tsv")]
    assert [(q.text, q.answers) for q in found[0]] == PLAIN
    assert all(f == found[0] for f in found)
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "list.jsonl").write_text(json.dumps(ROWS))
    assert load_questions(tmp_path / "lines.json") == load_questions(tmp_path / "list.jsonl") == found[0]
    assert load_questions(str(write(tmp_path / "one.json", ROWS[:1]))) == found[0][:1]


def test_a_text_may_hold_line_ends_of_other_kinds(tmp_path):
    rows = [{"question": "One\u2028two\x85three?", "answer": "a\u2029b"}]
    for suffix in (".jsonl", ".csv"):
        found = load_questions(write(tmp_path / f"data{suffix}", rows))
        assert [(q.text, q.answers) for q in found] == [(rows[0]["question"], ("a\u2029b",))]


def test_columns_are_found_by_usual_names_or_as_told(tmp_path):
    file = write(tmp_path / "a.csv", [{"ID": "7", "Question": "Why?", "Answer": "so", "Category": "deep", "x": "y"}])
    assert load_questions(file) == [Question("7", "Why?", answers=("so",), topic="deep")]
    told = Columns(question="x", answers="Category", id="ID", topic="Answer", context="Question")
    assert load_questions(file, columns=told) == [Question("7", "y", "Why?", ("deep",), topic="so")]


def test_a_cell_is_parted_only_where_told(tmp_path):
    file = write(tmp_path / "a.csv", [{"question": "Who?", "answer": " Bonnie; Clyde ;;"}])
    assert load_questions(file)[0].answers == ("Bonnie; Clyde ;;",)
    assert load_questions(file, separator=";")[0].answers == ("Bonnie", "Clyde")


def test_numbers_are_texts_and_repeated_answers_count_once(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": "When?", "answer": [1988, "1988", 0.5]}])
    assert load_questions(file)[0].answers == ("1988", "0.5")


def test_an_explicit_empty_list_means_that_only_declining_is_right(tmp_path):
    for suffix in (".jsonl", ".csv"):
        file = write(tmp_path / f"a{suffix}", [{"question": "Who is Zorbel?", "answers": []}])
        assert load_questions(file)[0].answers == ()


def test_wrong_answers_are_kept(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": "?", "answers": ["a"], "wrong_answers": ["b", "c"]}])
    assert load_questions(file)[0].wrong_answers == ("b", "c")


@pytest.mark.parametrize(
    ("row", "choices", "right"),
    [
        ({"options": ["a", "b", "c"], "answer": "b"}, "a b c", (1,)),
        ({"choices": ["x", "y", "z"], "answer": 2}, "x y z", (2,)),
        ({"choices": ["x", "y", "z"], "answer": "C"}, "x y z", (2,)),
        ({"choices": ["b", "a"], "answer": "A"}, "b a", (0,)),  # a letter, as case counts in texts
        ({"choices": ["B", "A"], "answer": "A"}, "B A", (1,)),  # a text before a letter
        ({"choices": ["3", "1"], "answer": 1}, "3 1", (1,)),  # an index among texts
        ({"choices": [3, 1], "answer": 1}, "3 1", (1,)),
        ({"choices": [3, 1, 5], "answer": 3}, "3 1 5", (0,)),  # a number among numbers
        ({"choices": ["x", "y"], "right": [0, 1], "answer": "x"}, "x y", (0, 1)),
        ({"choices": ["x", "y", "z"], "answers": ["z", "x"]}, "x y z", (0, 2)),
        ({"choices": ["x", "", "x", "y"], "answer": "y"}, "x y", (1,)),  # empty and repeated ones
        ({"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, "x y", (1,)),
    ],
)
def test_the_right_choice_is_named_by_text_letter_label_or_index(tmp_path, row, choices, right):
    (question,) = load_questions(write(tmp_path / "a.jsonl", [{"question": "?", **row}]))
    assert (" ".join(question.choices), question.right) == (choices, right)
    assert question.answers == tuple(question.choices[i] for i in right)


def test_a_file_of_answers_gives_its_questions(tmp_path):
    questions = [
        Question("1", "Capital of France?", "a passage", ("Paris",), ("Rome",), topic="capital"),
        Question("2", "Who is Zorbel?"),
        Question("3", "Which?", choices=("a", "b"), right=(1,)),
    ]
    save_records(tmp_path / "answers.jsonl", [Record(q, "an answer", {"risk": 1.0}, correct=None) for q in questions])
    assert load_questions(tmp_path / "answers.jsonl") == questions


def test_triviaqas_own_file_is_read(tmp_path):
    answer = {
        "Value": "Sunset Blvd",
        "Aliases": ["Sunset Boulevard", "Sunset Blvd"],
        "NormalizedAliases": ["sunset bl"],
    }
    (tmp_path / "a.json").write_text(
        json.dumps({"Data": [{"Question": "Which?", "QuestionId": "tc_1", "Answer": answer}]})
    )
    assert load_questions(tmp_path / "a.json") == [
        Question("tc_1", "Which?", answers=("Sunset Blvd", "Sunset Boulevard"))
    ]


GOOD = json.dumps(ROWS[0])
QA = '{"question": "?", "answer": "x"}'


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("a.jsonl", f"{GOOD}\n\n{{broken", "line 3: broken JSON"),
        ("a.jsonl", f"{GOOD}\n[1]", "line 2: wanted an object with keys, found list"),
        ("a.jsonl", f'{GOOD}\n{{"question": " ", "answers": ["x"]}}', "line 2: question is empty"),
        ("a.jsonl", f'{GOOD}\n{{"question": 7, "answers": ["x"]}}', "line 2: question must be text, found int"),
        ("a.jsonl", f'{GOOD}\n{{"question": "?", "answers": ""}}', "line 2: answers is empty (write [] where"),
        ("a.jsonl", f'{GOOD}\n{{"question": "?", "answers": ["x", ""]}}', "line 2: answers is empty"),
        ("a.jsonl", f'{GOOD}\n{{"question": "?"}}', "line 2: answers must be text, found None"),
        ("a.jsonl", f'{GOOD}\n{{"question": "?", "answers": [true]}}', "line 2: answers must be text, found True"),
        ("a.jsonl", f'{GOOD}\n{{"question": "?", "answers": [NaN]}}', "line 2: answers must be text, found nan"),
        ("a.jsonl", f'{GOOD}\n{{"question": "?", "answers": {{"x": 1}}}}', "line 2: answers is an object with 'x'"),
        ("a.jsonl", '{"text": "x", "answer": "y"}', "no column that looks like the question"),
        ("a.jsonl", '{"question": "x", "label": "y"}', "no column that looks like the answers"),
        ("a.jsonl", '{"question": "?", "options": ["a"], "answer": "b"}', "'b' is none of the choices 'a'"),
        ("a.jsonl", '{"question": "?", "options": ["a"], "answer": 1}', "1 is none of the choices"),
        ("a.jsonl", '{"question": "?", "options": ["a", ""], "answer": 1}', "1 is none of the choices"),
        ("a.jsonl", '{"question": "?", "options": ["a"], "answers": []}', "none of the choices is right"),
        ("a.jsonl", '{"question": "?", "options": 7, "answer": "a"}', "options must be a list of texts"),
        ("a.jsonl", f'{{"id": 1, {QA[1:]}\n{{"id": 1, "question": "!", "answer": "x"}}', "the id '1' comes twice"),
        ("a.json", f"[\n{GOOD},\n{{broken", "line 3: broken JSON"),
        ("a.json", "7", "wanted a list of objects, found '7'"),
        ("a.json", "[7]", "entry 1: wanted an object with keys, found int"),
        ("a.json", "[]", "holds no questions"),
        (
            "a.json",
            '{"data": [{"title": "x"}]}',
            "data[].paragraphs[].qas[], and what follows question 0 lacks 'paragraphs'",
        ),
        (
            "a.json",
            '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": "q1", "question": "?", "answers": []}]}]}]}',
            "question q1: has no answers but is not marked",
        ),
        ("a.csv", "", "holds no questions"),
        ("a.csv", 'question,answer\nx,"y', "broken CSV"),
        ("a.csv", "question,answer\nx,y,z", "line 2: more cells than the header"),
        ("a.csv", "question,answer\nx", "line 2: answer must be text, found None"),
        ("a.csv", "question,answer\nx,", "line 2: answer is empty"),
        ("a.csv", "question,answer\nx,\"['a' 'b']\"", "line 2: answer looks like a list but is neither JSON nor"),
        ("a.txt", "x", "ends in '.txt'"),
        (
            "a.jsonl",
            '{"id": "1", "question": "?", "answer": "x", "correct": true, "choices": "x", "right": 3}',
            "line 1: choices must be a list of texts",
        ),
    ],
)
def test_what_is_broken_is_one_line_with_its_place(tmp_path, name, text, wanted):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=re.escape(wanted)) as raised:
        load_questions(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_text_that_is_not_utf8_and_files_that_are_not_there_are_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load_questions(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"is a folder without TruthfulQA\.csv"):
        load_questions(tmp_path)
    for missing in ("./nowhere", "nowhere.jsonl", "/nowhere", "nowhere"):
        with pytest.raises(DataError, match="no question file at"):
            load_questions(missing)
    with pytest.raises(DataError, match="neither a file here nor a data set") as raised:
        load_questions("no-such-owner/no-such-data")
    assert "\n" not in str(raised.value)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    file = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match="limit must be at least 1"):
        load_questions(file, limit=0)
    with pytest.raises(ConfigError, match="only TruthfulQA has tasks"):
        load_questions(file, task="mc1")
    with pytest.raises(DataError, match="no column 'q' for the question; it has 'question', 'answers'"):
        load_questions(file, columns=Columns(question="q"))


def test_repeated_questions_get_their_own_ids(tmp_path):
    rows = [{"question": t, "answer": "x"} for t in ("a?", "b?", "a?", "a?")]
    ids = [q.id for q in load_questions(write(tmp_path / "a.jsonl", rows))]
    assert ids[2:] == [f"{ids[0]}-2", f"{ids[0]}-3"]
    assert len(set(ids)) == 4
    given = load_questions(write(tmp_path / "b.jsonl", [{"id": 1, **rows[0]}, {"id": 1, **rows[0]}]))
    assert [q.id for q in given] == ["1", "1-2"]


def test_an_id_hangs_on_the_question_and_its_passage_alone(tmp_path):
    rows = [{"question": f"{i}?", "answer": "x", "context": c} for i in range(3) for c in ("one", "two")]
    whole = load_questions(write(tmp_path / "a.jsonl", rows))
    assert len({q.id for q in whole}) == 6
    assert load_questions(write(tmp_path / "b.csv", rows[::-1])) == whole[::-1]


def test_a_limit_is_a_random_part_in_order_and_grows(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": f"{i}?", "answer": "x"} for i in range(50)])
    whole = load_questions(file)
    small, large, other = (
        load_questions(file, limit=10),
        load_questions(file, limit=20),
        load_questions(file, limit=10, seed=1),
    )
    assert len(small) == 10
    assert small == [q for q in large if q in small] == [q for q in whole if q in small]
    assert small not in (whole[:10], other)
    assert load_questions(file, limit=99) == whole


def test_a_column_beside_is_read_by_id(tmp_path):
    rows = [{"question": t, "answer": "x", "human": h} for t, h in (("a?", "yes"), ("b?", ""), ("a?", "no"))]
    file = write(tmp_path / "a.csv", rows)
    assert list(read_column(file, "human").items()) == [
        (q.id, r["human"]) for q, r in zip(load_questions(file), rows, strict=True)
    ]
    with pytest.raises(DataError, match="no column 'nobody'"):
        read_column(file, "nobody")


def test_examples_are_never_the_asked_questions():
    pool = [Question(str(i), f"What is {i}?", answers=("x",)) for i in range(10)]
    asked = [pool[3], replace(pool[4], id="other", text="what is 4")]
    for seed in range(20):
        shots = choose_examples(pool, 5, asked=asked, seed=seed)
        assert len({s.id for s in shots}) == 5
        assert not {s.id for s in shots} & {"3", "4"}
    assert choose_examples(pool, 5, asked=asked, seed=1) == choose_examples(pool[::-1], 5, asked=asked, seed=1)
    assert choose_examples(pool, 5, asked=asked, seed=1) != choose_examples(pool, 5, asked=asked, seed=2)
    assert choose_examples(pool, 0, asked=asked) == []
    with pytest.raises(ConfigError, match="wanted 9 examples that are not asked themselves, found 8"):
        choose_examples(pool, 9, asked=asked)
    with pytest.raises(ConfigError, match="at least 0"):
        choose_examples(pool, -1, asked=asked)


def test_the_pockets_own_file_has_relations_as_topics():
    questions = load_questions(POCKET)
    assert len(questions) == 2000
    assert len({q.topic for q in questions}) == 8
    assert sum(not q.answers for q in questions) == 250  # invented places
    assert questions[0] == Question(
        "eva-known-000", "Which city is Latvia's capital?", answers=("Riga",), topic="capital"
    )


@pytest.mark.parametrize(
    ("name", "count", "unanswerable", "topics"),
    [
        ("nq_open/NQ-open.dev.jsonl", 3610, 0, 0),
        ("nq_open/NQ-open.efficientqa.dev.1.1.jsonl", 1800, 0, 0),
        ("webquestions/trainmodel.json", 2834, 0, 0),
        ("webquestions/val.json", 755, 0, 0),
        ("webquestions/test.json", 2032, 0, 0),
        ("squad2/squad_dev_v2.0_rebuilt.json", 11_873, 5_945, 35),
    ],
)
def test_real_files_have_their_counts(real, name, count, unanswerable, topics):
    questions = load_questions(real(name))
    assert len(questions) == len({q.id for q in questions}) == count
    assert sum(not q.answers and not q.choices for q in questions) == unanswerable
    assert len({q.topic for q in questions} - {None}) == topics
    assert all(bool(q.context) == name.startswith("squad2") for q in questions)


@pytest.mark.slow
def test_opentriviaqa_has_its_count_and_loses_only_empty_and_repeated_choices(real):
    questions = load_questions(real("opentriviaqa/opentriviaqa.jsonl"))
    sizes = Counter(len(q.choices) for q in questions)
    assert len({q.id for q in questions}) == 49_203
    assert len({q.topic for q in questions}) == 22
    # 23 rows repeat choices, one of them two; 4 have an empty one.
    assert sizes == {4: 42_538 - 27, 3: 26, 2: 6_665 + 1}
    assert all(len(q.right) == 1 and len(set(q.choices)) == len(q.choices) for q in questions)


@pytest.mark.parametrize(
    ("name", "asked", "row", "expected"),
    [
        (
            "nq_open",
            ("google-research-datasets/nq_open", None, "validation"),
            {"question": "who?", "answer": ["a", "b"]},
            Question("", "who?", answers=("a", "b")),
        ),
        (
            "webquestions",
            ("stanfordnlp/web_questions", None, "test"),
            {"url": "u", "question": "who?", "answers": ["a"]},
            Question("", "who?", answers=("a",)),
        ),
        (
            "triviaqa",
            ("mandarjoshi/trivia_qa", "rc.nocontext", "validation"),
            {"question": "who?", "question_id": "tc_1", "answer": {"value": "a", "aliases": ["b", "a"], "type": "x"}},
            Question("tc_1", "who?", answers=("a", "b")),
        ),
        (
            "squad2",
            ("rajpurkar/squad_v2", None, "validation"),
            {"id": "5", "title": "T", "context": "c", "question": "who?", "answers": {"text": [], "answer_start": []}},
            Question("5", "who?", "c", topic="T"),
        ),
        (
            "squad2",
            ("rajpurkar/squad_v2", None, "validation"),
            {"id": "5", "title": "T", "context": "c", "question": "who?", "answers": {"text": ["a", "a"]}},
            Question("5", "who?", "c", ("a",), topic="T"),
        ),
    ],
)
def test_known_names_are_read_from_their_public_home(monkeypatch, name, asked, row, expected):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, config, *, split, revision):
        assert (name, config, split, revision) == (*asked, "abc")
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (found,) = load_questions(name, revision="abc")
    assert replace(found, id=expected.id or found.id) == replace(expected, id=found.id)


def test_any_set_of_the_hub_is_read_from_the_usual_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    splits = {"train": [{"question": "t?", "answer": "x"}], "test": [{"question": "e?", "answer": "x"}]}

    def load_dataset(name, config, *, split, revision):
        assert (name, config) == ("owner/name", "part")
        return splits if split is None else splits[split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [q.text for q in load_questions("owner/name", config="part")] == ["e?"]
    assert [q.text for q in load_questions("owner/name", config="part", split="train")] == ["t?"]
    splits["test"] = [{"question": "", "answer": "x"}]
    with pytest.raises(DataError, match="owner/name, test, row 1: question is empty"):
        load_questions("owner/name", config="part")


def test_a_name_of_a_known_set_is_not_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / POCKET).mkdir()
    assert len(load_questions(POCKET, limit=3)) == 3
