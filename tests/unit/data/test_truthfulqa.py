"""TruthfulQA: both files, the hub's layout, and the traps in them."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from typing import Any

import pytest

from selfdoubt.data.question_sets import load_questions
from selfdoubt.errors import ConfigError, DataError

HEADER = ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
GEN = [
    ["Adversarial", "Myths", "One? ", "Best one", "Fine; Best one;", "Bad one; Worse one", "x"],
    ["Adversarial", "Law", "Two?", "Best two", "Best two", "Bad two", "x"],
]
MC: list[dict[str, Any]] = [
    {
        "question": f"{n}?",
        "mc1_targets": {"t1": 1, "f1": 0, "f2": 0},
        "mc2_targets": {"t1": 1, "t2": 1, "f1": 0, "f2": 0},
    }
    for n in ("Two", "One")
]


@pytest.fixture
def folder(tmp_path):
    with (tmp_path / "TruthfulQA.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([HEADER, *GEN])
    (tmp_path / "mc_task.json").write_text(json.dumps(MC))
    return tmp_path


def test_generation_parts_answers_at_semicolons_and_puts_the_best_first(folder):
    one, two = load_questions(folder)
    assert (one.text, one.topic) == ("One?", "Myths")
    assert one.answers == ("Best one", "Fine")
    assert one.wrong_answers == ("Bad one", "Worse one")
    assert two.answers == ("Best two",)
    assert load_questions(folder / "TruthfulQA.csv", task="gen") == [one, two]


def test_multiple_choice_is_joined_on_the_stripped_question(folder):
    for task, right in (("mc1", {"t1"}), ("mc2", {"t1", "t2"})):
        found = load_questions(folder, task=task)
        assert [q.text for q in found] == ["Two?", "One?"]
        assert [q.topic for q in found] == ["Law", "Myths"]
        assert {q.id for q in found} == {q.id for q in load_questions(folder)}
        for q in found:
            assert {q.choices[i] for i in q.right} == right == set(q.answers)
            assert set(q.choices) == set(MC[0][f"{task}_targets"])
    assert load_questions(folder / "mc_task.json") == load_questions(folder, task="mc1")
    assert load_questions(folder / "TruthfulQA.csv", task="mc2") == load_questions(folder, task="mc2")


def test_the_choices_alone_have_no_topics(folder):
    (folder / "TruthfulQA.csv").unlink()
    assert [q.topic for q in load_questions(folder / "mc_task.json", task="mc2")] == [None, None]
    with pytest.raises(DataError, match=r"gen needs TruthfulQA\.csv"):
        load_questions(folder)


def test_what_does_not_fit_is_said(folder):
    with pytest.raises(ConfigError, match="no task 'mc3'; choose one of gen, mc1, mc2"):
        load_questions(folder, task="mc3")
    (folder / "mc_task.json").write_text(json.dumps([{**MC[0], "question": "Three?"}]))
    with pytest.raises(DataError, match=r"entry 1: the question 'Three\?' is not in TruthfulQA.csv"):
        load_questions(folder, task="mc1")
    (folder / "mc_task.json").write_text(json.dumps([{**MC[0], "mc1_targets": {"a": 0, "b": 0}}]))
    with pytest.raises(DataError, match="entry 1: mc1_targets must map texts to 0 and 1"):
        load_questions(folder, task="mc1")
    (folder / "mc_task.json").unlink()
    with pytest.raises(DataError, match=r"mc1 needs mc_task\.json"):
        load_questions(folder, task="mc1")


def test_the_hubs_layout_gives_the_same_questions(folder, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, config, *, split, revision):
        assert (name, split, revision) == ("truthfulqa/truthful_qa", "validation", "abc")
        if config == "generation":
            keys = ["type", "category", "question", "best_answer", "correct_answers", "incorrect_answers", "source"]
            rows = [dict(zip(keys, row, strict=True)) for row in GEN]
            return [
                r | {k: r[k].rstrip(";").split("; ") for k in ("correct_answers", "incorrect_answers")} for r in rows
            ]
        listed: list[dict[str, Any]] = [{"question": m["question"]} for m in MC]
        for row, m in zip(listed, MC, strict=True):
            for task in ("mc1_targets", "mc2_targets"):
                row[task] = {"choices": list(m[task]), "labels": list(m[task].values())}
        return listed

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for task in (None, "gen", "mc1", "mc2"):
        assert load_questions("truthfulqa", task=task, revision="abc") == load_questions(folder, task=task)


def test_the_real_files_hold_817_questions_of_38_categories(real):
    folder = real("truthfulqa")
    found = {task: load_questions(folder, task=task) for task in ("gen", "mc1", "mc2")}
    for questions in found.values():
        assert len(questions) == len({q.id for q in questions}) == 817
        assert len({q.topic for q in questions}) == 38
        assert {q.id: (q.text, q.topic) for q in questions} == {q.id: (q.text, q.topic) for q in found["gen"]}
    assert all(q.answers and q.wrong_answers and "" not in q.answers + q.wrong_answers for q in found["gen"])
    assert all(len(q.right) == 1 for q in found["mc1"])
    assert all(0 < len(q.right) < len(q.choices) for q in found["mc2"])


def test_the_right_choice_stands_anywhere_and_neither_limit_nor_file_moves_it(real, tmp_path):
    file = real("truthfulqa/mc_task.json")
    whole = load_questions(file, task="mc1")
    places = Counter(q.right[0] / len(q.choices) < 0.5 for q in whole)
    assert 0.4 < places[True] / 817 < 0.65  # a fixed draw: nothing is random here
    part = load_questions(file, task="mc1", limit=50)
    assert all(q in whole for q in part)
    assert {q.id for q in part} == {q.id for q in load_questions(real("truthfulqa"), limit=50)}
    assert load_questions(file, task="mc1", seed=1) != whole
    shutil.copy(real("truthfulqa/TruthfulQA.csv"), tmp_path / "TruthfulQA.csv")
    (tmp_path / "mc_task.json").write_text(json.dumps(json.loads(file.read_text())[::-1]))
    assert load_questions(tmp_path, task="mc1") == whole[::-1]
