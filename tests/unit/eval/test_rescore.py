"""Answers of another system: each row keeps its place and what it holds, whatever fails."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from selfdoubt import RiskAwareLM, vote
from selfdoubt.errors import ConfigError, DataError
from selfdoubt.eval.rescore import read_answer_rows, rescore
from tests.zoo import talker, tokenizer

ROWS: list[dict[str, Any]] = [
    {"question": "What is it?", "answer": "A thing.", "mine": {"kept": [1, None]}},
    {"question": "Who?", "answer": ""},
    {"id": "third", "question": "Where?", "answer": "Here, I think, and there."},
    {"question": "When?", "answer": "word " * 5000},
    {"answer": "No question."},
    {"question": [{"role": "user", "content": "Why?"}], "answer": "Because.", "scores": {"old": 1.0}, "note": "old"},
    {"question": "What?", "answer": None},
]


def model(**options):
    torch.manual_seed(0)
    return RiskAwareLM(vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5)(talker()), tokenizer(), **options)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_every_row_keeps_its_place_and_a_row_that_fails_says_why(tmp_path, batch_size):
    lm, out = model(), tmp_path / "scored.jsonl"
    assert rescore(lm, ROWS, out, batch_size=batch_size) == 4
    found = read(out)
    for old, new in zip(ROWS, found, strict=True):
        assert (new.get("question"), new.get("answer")) == (old.get("question"), old.get("answer"))
    assert [row["id"] for row in found] == ["1", "2", "third", "4", "5", "6", "7"]
    assert found[0]["mine"] == {"kept": [1, None]}
    assert [row.get("note", "")[:26] for row in found] == [
        "", "not scored: answer is empt", "", "not scored: prompt and tex", "not scored: question is mi", "",
        "not scored: answer is miss",
    ]  # fmt: skip
    for i in (0, 2, 5):
        alone = lm.score(ROWS[i]["answer"], ROWS[i]["question"])
        assert found[i]["scores"] == pytest.approx(dict(alone.scores), rel=1e-3, abs=1e-4)
        assert "old" not in found[i]["scores"]


def test_a_row_without_a_number_says_why(tmp_path):
    lm, question = RiskAwareLM.load("pocket", dtype=torch.float32), "What is the capital of France?"
    answers = ["The capital of France is Paris.", "The capital of France is Lima.", "Paris", "The capital"]
    rescore(lm, [{"question": question, "answer": a, "p_correct_note": "old"} for a in answers], tmp_path / "out.jsonl")
    first, *others = read(tmp_path / "out.jsonl")
    assert first["p_correct"] > 0.9
    assert (first["abstain"], first["p_correct_note"]) == (False, None)
    for row in others:
        assert (row["p_correct"], row["abstain"]) == (None, True)
        assert "would say" in row["p_correct_note"]


def test_bad_files_are_told_before_a_model_loads(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"q": "What?", "answer": "That."}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no row of .* has the key 'question', the first has answer, q"):
        read_answer_rows(str(file), tmp_path / "out.jsonl", "question")
    assert len(read_answer_rows(str(file), tmp_path / "out.jsonl", "q")) == 1
    with pytest.raises(ConfigError, match="is the file of answers itself"):
        read_answer_rows(str(file), file, "q")
    with pytest.raises(ConfigError, match="does not exist; make it first"):
        read_answer_rows(str(file), tmp_path / "no" / "out.jsonl", "q")
    file.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds no answers"):
        read_answer_rows(str(file), tmp_path / "out.jsonl", "q")


def test_white_space_and_a_byte_order_mark_around_an_answer_change_nothing(tmp_path):
    rows = [{"question": "Where?", "answer": text} for text in ("Paris.", "Paris.\n", "\ufeffParis.\r\n", " Paris. ")]
    assert rescore(model(), rows, tmp_path / "scored.jsonl", batch_size=1) == 0
    first, *others = [row["scores"] for row in read(tmp_path / "scored.jsonl")]
    assert others == [first] * 3
