"""Output that cannot hold every character, and texts with half of one: never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

ROWS = [
    {"question": "Where is Łódź ≥ 東京?", "answer": "Łódź", "answers": ["Łódź"], "scores": {"東": 1, "sum_nll": 1}},
    {"question": "Where is Riga?", "answer": "東\ud83d", "answers": ["Latvia"], "scores": {"東": 2, "sum_nll": 2}},
    {"question": "Where is Oslo?", "answer": "Norway", "answers": ["Norway"], "scores": {"東": 3, "sum_nll": 0}},
]


def run(encoding, *args):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-m", "selfdoubt", *args], capture_output=True, env=environment, check=False)
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert "Traceback" not in err, err[-400:]
    return done.returncode, out, err


@pytest.fixture
def answers(tmp_path):
    file = tmp_path / "東京.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return file


@pytest.mark.parametrize("encoding", ["cp1252"])
def test_commands_on_files_write_in_any_encoding(answers, encoding):
    code, out, _ = run(encoding, "report", str(answers), "--out", str(answers.parent / "report"), "--draws", "5")
    assert code == 0
    assert "report.json" in out
    assert (answers.parent / "report" / "report.html").read_text(encoding="utf-8")
    code, _, err = run(encoding, "report", str(answers.parent / "京都.jsonl"))
    assert (code, len(err.splitlines())) == (2, 1)
    code, _, err = run(
        encoding, "train", "--data", str(answers.parent / "京都.jsonl"), "--out", str(answers.parent / "o")
    )
    assert (code, len(err.splitlines())) == (2, 1)
    code, _, err = run(encoding, "evaluate", "--data", str(answers), "--answer-column", "≥", "--out", "o")
    assert (code, len(err.splitlines())) == (2, 1)


@pytest.mark.parametrize("encoding", ["ascii"])
def test_answers_are_shown_and_json_is_escaped(encoding):
    code, out, _ = run(encoding, "ask", "Where is 東京 ≥ Łódź?", "--show-withheld", "--max-tokens", "4")
    assert code == 0
    assert "? Where is ?" in out
    code, out, _ = run(encoding, "ask", "Where is 東京?", "--json", "--show-withheld", "--max-tokens", "4")
    assert code == 0
    tokens = [json.loads(line) for line in out.splitlines()]
    assert "東京" in "".join(t["text"] for t in tokens if t.get("part") == "question")


def test_half_a_character_is_refused_or_kept(answers):
    scored = answers.parent / "scored.jsonl"
    code, _, err = run("ascii", "score", str(answers), "--out", str(scored))
    assert (code, len(err.splitlines())) == (1, 1)
    rows = [json.loads(line) for line in scored.read_text(encoding="utf-8").splitlines()]
    assert [r["answer"] for r in rows] == [r["answer"] for r in ROWS]
    assert "half of a character" in rows[1]["note"]
    assert "sum_nll" in rows[0]["scores"]


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are text on Windows")
def test_bytes_that_are_no_text_are_refused():
    done = subprocess.run([sys.executable, "-m", "selfdoubt", "ask", b"Who is \xff?"], capture_output=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert b"not UTF-8 text" in done.stderr
