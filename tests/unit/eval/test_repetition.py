"""Answers that repeat themselves are counted; lists, refrains and short answers are not."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.eval.judges.rules import Rouge, get_judge_name
from selfdoubt.eval.repetition import is_repeating
from selfdoubt.eval.settings import Run
from selfdoubt.workflow import write_run_report
from tests.records import judged, measured


@pytest.mark.parametrize(
    "text",
    [
        "I'm not a game. I'm a game. I'm a game.",
        "I'm not a game. I'm a game. I'm a game. I'm a game. I'm a",
        "No, no, no, no, no, no, no, no",
        "New York City, New York, New York, New York, New",
        "the the the the the the",
        "我不是游戏。我不是游戏。我不是游戏。",
        "ハハハハハハハ",
        "ฉันไม่รู้ฉันไม่รู้ฉันไม่รู้",
        "я не знаю, я не знаю, я не знаю",
    ],
)
def test_loops_repeat(text):
    assert is_repeating(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Paris",
        "No, no, no!",
        "ha ha ha",
        "東京です",
        "1. red\n2. green\n3. blue\n4. white",
        "The cat is black. The dog is black. The cow is black. The pig is white.",
        "They live in Africa, they live in Asia, they live in Europe, they live in Oceania",
        "Row, row, row your boat, gently down the stream. Merrily, merrily, merrily, merrily, life is but a dream.",
        "I love you. I love you.",
        "It is what it is, and it was what it was, but it will be what it will be.",
    ],
)
def test_lists_refrains_and_short_answers_do_not(text):
    assert not is_repeating(text)


words = st.lists(st.sampled_from(["sun", "moon", "sea", "wind", "tree"]), min_size=2, max_size=6)


@given(words, st.integers(3, 8), st.sampled_from([" ", ". ", ", "]))
def test_any_part_three_times_in_a_row_is_a_loop_wherever_it_is_cut(part, times, between):
    text = between.join([" ".join(part)] * times)
    assert is_repeating(text)
    assert is_repeating(f"Well, {text} sun")


@given(st.lists(st.integers(0, 10**6), unique=True, max_size=40))
def test_what_never_comes_twice_is_no_loop(numbers):
    assert not is_repeating(" ".join(map(str, numbers)))


def loops(n):
    found = judged(60)
    return [replace(r, answer="I'm a game. " * 6) for r in found[:n]] + found[n:]


def test_the_report_counts_them_and_says_so(tmp_path):
    report = measured(loops(15), {"judge": "contains"}, draws=5)
    right = sum(bool(r.correct) for r in loops(15)[:15])
    assert report["repetition"] == {"repeating": 15, "of": 60, "share": 0.25, "right": right}
    line = f"15 of 60 answers (25 %) repeat themselves; {right} of them are judged right."
    assert line in report["verdict"]["sentences"]
    files = write_run_report(loops(15), Run(), tmp_path, draws=5).files
    assert "repeat themselves" in files["report.html"].read_text(encoding="utf-8")
    assert json.loads(files["report.json"].read_text(encoding="utf-8"))["repetition"]["repeating"] == 15


def test_a_report_without_them_does_not_speak_of_it():
    report = measured(judged(60), {"judge": "contains"}, draws=5)
    assert report["repetition"]["repeating"] == 0
    assert not any("repeat" in s or "weak judge" in s for s in report["verdict"]["sentences"])


@pytest.mark.parametrize(("judge", "weak"), [("rouge", True), ("bleu", True), ("exact", False), ("llm: x", False)])
def test_judges_that_count_words_are_called_weak(judge, weak):
    said = " ".join(measured(judged(60), {"judge": judge}, draws=5)["verdict"]["sentences"])
    assert ("a weak judge" in said) == weak
    assert get_judge_name(Rouge()) == "rouge"
