"""evaluate, calibrate, report, compare and score as their users run them, on the pocket model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfdoubt import pocket
from tests.e2e.test_cli import in_process, run
from tests.waiting import wait_until

ASK = ("evaluate", "--data", "pocket", "--limit", "24", "--batch-size", "6", "--states", "1", "--draws", "50")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "selfdoubt", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def same_bytes(a: Path, b: Path, *names: str) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("run") / "whole"
    done = run(*ASK, "--candidates", "3", "--p-true", "--out", str(out), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert str(out / "report.html") in done.stdout
    return out


def test_a_run_leaves_answers_scores_and_a_report(whole):
    rows = [json.loads(line) for line in (whole / "answers.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert len(rows) == 24
    for row in rows:
        assert {"sum_nll", "question_mean_nll", "rank_nll", "sum_epistemic", "p_false", "semantic_entropy"} <= set(
            row["scores"]
        )
        assert row["correct"] in (True, False)
        assert len(row["samples"]) == 3
        assert all(s["correct"] in (True, False) for s in row["samples"])
    report = json.loads((whole / "report.json").read_text(encoding="utf-8"))
    assert report["counts"]["judged"] == 24
    assert set(report["run"]["costs"]) == {"answer", "samples", "agreement", "p_true"}
    assert {p.name for p in whole.glob("*.png")} >= {"accuracy-percentile.png"}


def test_a_run_that_is_killed_and_goes_on_ends_in_the_same_files(whole, tmp_path):
    out = tmp_path / "killed"
    arguments = (*ASK, "--candidates", "3", "--p-true", "--out", str(out))
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(out.glob("parts/*.jsonl"))) >= 2, 240)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("parts/*.jsonl")}
    assert 2 <= len(kept) < 4
    assert not (out / "answers.jsonl").exists()
    done = run(*arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in kept} == kept  # nothing was asked twice
    assert same_bytes(out, whole, "answers.jsonl", "states.safetensors")


def test_two_processes_give_the_answers_of_one(whole, tmp_path):
    out = tmp_path / "shared"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
         "-m", "selfdoubt", *ASK, "--candidates", "3", "--p-true", "--out", str(out)],
        env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1
    assert same_bytes(out, whole, "answers.jsonl", "states.safetensors")


def test_a_finished_run_is_not_asked_again_but_may_be_judged_again(whole, tmp_path):
    done = run("report", str(whole), "--judge", "exact", "--out", str(tmp_path / "strict"), "--draws", "50")
    assert done.returncode == 0, done.stderr
    strict = json.loads((tmp_path / "strict" / "report.json").read_text(encoding="utf-8"))
    assert strict["counts"]["right"] == 0  # the model answers in sentences
    done = run("compare", str(whole), str(tmp_path / "strict"))
    assert done.returncode == 2
    assert "answers.jsonl cannot be read" in done.stderr


def test_a_run_compared_with_itself_differs_in_nothing(whole):
    done = run("compare", str(whole), str(whole), "--json", "--draws", "50")
    found = json.loads(done.stdout)
    assert found["shared"] == found["judged"] == 24
    assert found["accuracy"]["difference"]["value"] == 0


def test_calibrated_answers_are_withheld_where_the_model_is_not_sure(tmp_path):
    out, adapter = tmp_path / "run", tmp_path / "adapter"
    asked = run(
        "evaluate", "--data", str(pocket.reference_file()), "--limit", "500", "--states", "none", "--draws", "50",
        "--out", str(out),
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr
    done = run("calibrate", str(out), "--out", str(adapter), "--target-accuracy", "0.85", "--draws", "50")
    assert done.returncode == 0, done.stderr
    assert "answers with p_correct >=" in done.stdout
    card = json.loads((adapter / "selfdoubt.json").read_text(encoding="utf-8"))
    assert 0 < card["calibration"]["threshold"] < 1
    known, invented = "What is the capital of France?", "In which country is Qwxyzk?"
    told = run("ask", known, invented, "--adapter", str(adapter))
    assert "Paris" in told.stdout
    assert "right with probability" in told.stdout
    assert "I'm not sure." in told.stdout
    assert "Qwxyzk is in" not in told.stdout
    shown = run("ask", invented, "--adapter", str(adapter), "--show-withheld", "--json")
    answer = json.loads(shown.stdout.strip().split("\n")[-1])
    assert answer["abstain"] is True
    assert answer["text"] == "I'm not sure."
    assert answer["withheld"]
    scored = run("score", "-", "--question", known, "--adapter", str(adapter), stdin="The capital of France is Paris.")
    assert "right with probability" in scored.stdout
    again = run("evaluate", "--adapter", str(adapter), "--data", "pocket", "--limit", "12", "--draws", "50",
                "--out", str(tmp_path / "again"))  # fmt: skip
    assert again.returncode == 0, again.stderr
    rows = (tmp_path / "again" / "answers.jsonl").read_text(encoding="utf-8").strip().split("\n")
    assert all("p_correct" in json.loads(row) and "abstain" in json.loads(row) for row in rows)


def test_answers_of_another_system_are_scored_line_by_line(tmp_path):
    file, out = tmp_path / "theirs.jsonl", tmp_path / "scored.jsonl"
    lines = [
        {"q": "What is the capital of France?", "a": "The capital of France is Paris.", "system": "other"},
        {"q": "What is the capital of France?", "a": "The capital of France is Rome."},
        {"q": "What is the capital of Peru?", "a": ""},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    done = run("score", str(file), "--out", str(out), "--question-column", "q", "--answer-column", "a")
    assert done.returncode == 1
    assert "1 answer has no score" in done.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").strip().split("\n")]
    assert [row["q"] for row in rows] == [line["q"] for line in lines]
    assert rows[0]["system"] == "other"
    assert rows[0]["scores"]["sum_nll"] < rows[1]["scores"]["sum_nll"]
    assert "scores" not in rows[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--out", "OUT", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["evaluate", "--out", "OUT", "--data", "pocket", "--limit", "0"], "the limit must be at least 1"),
        (["evaluate", "--out", "OUT", "--data", "pocket", "--candidates", "1"], "one sample agrees with nothing"),
        (["evaluate", "--out", "OUT", "--data", "pocket", "--judge", "taste"], "no judge is called 'taste'"),
        (["evaluate", "--out", "OUT", "--data", "pocket", "--judge", "llm"], "--judge-model"),
        (["evaluate", "--out", "OUT", "--data", "pocket", "--judge-url", "http://x"], "--judge llm"),
        (["evaluate", "--out", "OUT", "--data", "pocket", "--style", "poem"], "style"),
        (["evaluate", "--out", "OUT", "--data", "pocket", "--states", "some"], "--states must be"),
        (["evaluate", "--out", "OUT", "--data", "pocket", "--states", "99"], "decoder layers 0 to 4"),
        (["evaluate", "--out", "OUT", "--data", "pocket", "--shots-from", "x.jsonl"], "add e.g. --shots 5"),
        (["evaluate", "--out", "FULL", "--data", "pocket"], "holds other things than a run"),
        (["calibrate", "FULL"], "holds no answers"),
        (["report", "OUT"], "holds no answers"),
        (["compare", "FULL", "FULL"], "report.json cannot be read"),
        (["score", "x.jsonl"], "--out scored.jsonl"),
        (["score", "x.jsonl", "--out", "OUT"], "x.jsonl cannot be read"),
    ],
)
def test_bad_input_gets_one_line(monkeypatch, capfd, tmp_path, arguments, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.txt").write_text("mine")
    places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full")}
    assert in_process(monkeypatch, *(places.get(a, a) for a in arguments)) == 2
    said = capfd.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["photo.txt"]


def test_a_folder_of_another_run_is_not_mixed_up(whole, monkeypatch, capfd):
    assert in_process(monkeypatch, *ASK, "--max-tokens", "5", "--out", str(whole)) == 2
    assert "holds answers of another run" in capfd.readouterr().err


def test_a_bare_model_learns_p_correct_and_keeps_its_answers(tmp_path):
    """A model without an adapter is evaluated plain, and the adapter that calibration writes adds nothing to it."""
    base, out, adapter = str(pocket.folder()), tmp_path / "run", tmp_path / "adapter"
    done = run(*ASK[:3], "--limit", "60", "--states", "none", "--draws", "50", "--model", base, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("selfdoubt: note: nothing was trained for the risk of this model")
    assert done.stderr.count("\n") == 1
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["wrapper"] == "none"
    done = run("calibrate", str(out), "--out", str(adapter), "--heads", "score", "--draws", "0")
    assert done.returncode == 0, done.stderr
    question = "What is the capital of France?"
    plain, calibrated = (
        json.loads(run("ask", question, "--json", *flags).stdout.strip().split("\n")[-1])
        for flags in (("--model", base), ("--adapter", str(adapter), "--show-withheld"))
    )
    assert calibrated["scores"]["sum_nll"] == plain["scores"]["sum_nll"]
    assert (plain["p_correct"], plain["percentile"]) == (None, None)
    assert 0 <= calibrated["p_correct"] <= 1
    assert calibrated["percentile"] is not None


def test_a_run_in_which_auto_meant_untrained_voters_is_not_calibrated(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "earlier"
    shutil.copytree(whole, out)
    about = json.loads((out / "run.json").read_text(encoding="utf-8"))
    (out / "run.json").write_text(json.dumps({**about, "model": "some/model", "wrapper": "auto"}), encoding="utf-8")
    assert in_process(monkeypatch, "calibrate", str(out), "--out", str(tmp_path / "adapter")) == 2
    assert "three untrained voters" in capsys.readouterr().err


def test_too_few_draws_are_said_before_a_question_is_asked(tmp_path, monkeypatch, capsys):
    assert in_process(monkeypatch, "evaluate", "--data", "pocket", "--out", str(tmp_path / "run"), "--draws", "0") == 2
    assert "--draws must be at least 2, got 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
