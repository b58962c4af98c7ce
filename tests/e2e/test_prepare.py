"""``selfdoubt prepare`` as its users run it: killed and resumed, bad input, and the commands that use its adapter."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from selfdoubt import pocket, storage
from selfdoubt.lm.scores import DEFAULT_RISK
from tests import real
from tests.e2e.test_cli import QUESTION, in_process, run
from tests.e2e.test_evaluate import command, environment
from tests.waiting import wait_until

#: The pocket model without its voters and their reference: a bare model.
BARE = ("prepare", "--model", str(pocket.folder()), "--max-tokens", "12", "--batch-size", "8", "--limit", "40")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """An adapter that was made without a disturbance."""
    out = tmp_path_factory.mktemp("prepared") / "A"
    done = run(*BARE, "--out", str(out), OMP_NUM_THREADS="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("percentiles are relative to 40 answers of this model (")
    assert f"stored in {out}: selfdoubt ask --adapter {out}" in done.stdout
    return out


def test_a_preparation_that_is_killed_and_goes_on_ends_in_the_same_files(prepared, tmp_path):
    out, work = tmp_path / "A", tmp_path / ".A.prepare"
    process = subprocess.Popen(command(*BARE, "--out", str(out)), env=environment(), stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(work.glob("0*.json"))) >= 2, 240)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(work.glob("0*.json")))
    assert 2 <= kept < 5
    assert not out.exists()
    done = run(*BARE, "--out", str(out), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in prepared.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["A"]


def test_ask_then_has_percentiles_and_says_that_they_are_no_probability(prepared):
    done = run("ask", "--adapter", str(prepared), "--json", QUESTION)
    assert done.returncode == 0
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["text"] == "The capital of France is Paris."
    assert answer["risk_name"] == DEFAULT_RISK
    assert 0 <= answer["percentile"] <= 0.5
    assert answer["p_correct"] is None
    assert answer["scores"]["mean_density"] > 0
    (note,) = done.stderr.splitlines()
    assert note.startswith("selfdoubt: note: percentiles are relative to 40 answers of this model")
    assert "its risk is not calibrated: `selfdoubt evaluate --adapter A --data ...` and `selfdoubt calibrate`" in note


def test_evaluate_and_calibrate_go_on_from_a_preparation(prepared, tmp_path):
    out, adapter = tmp_path / "run", tmp_path / "adapter"
    done = run(
        "evaluate", "--data", "pocket", "--limit", "60", "--states", "none", "--draws", "50", "--max-tokens", "12",
        "--adapter", str(prepared), "--out", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run("calibrate", str(out), "--out", str(adapter), "--heads", "score", "--draws", "0")
    assert done.returncode == 0, done.stderr
    done = run("ask", "--adapter", str(adapter), "--json", QUESTION)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert done.stderr == ""
    assert answer["p_correct"] > 0
    assert answer["percentile"] is not None
    before, after = storage.read_manifest(prepared), storage.read_manifest(adapter)
    assert all(before[key] == after[key] for key in ("reference", "reference_size", "prepared"))


def test_what_cannot_be_prepared_is_one_line(prepared, tmp_path, monkeypatch, capfd):
    questions = tmp_path / "q.csv"
    questions.write_text("answer\nx\n", encoding="utf-8")
    (tmp_path / "empty.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.txt").write_text("mine", encoding="utf-8")
    new = str(tmp_path / "new")
    for arguments, message in (
        (("--out", new, "--questions", str(tmp_path / "no.jsonl")), "no question file at"),
        (("--out", new, "--questions", str(tmp_path / "empty.txt")), "holds no questions; write one per line"),
        (("--out", new, "--questions", str(questions)), "no column that looks like the question"),
        (("--out", new, "--questions", str(questions), "--question-column", "q"), "has no column 'q'"),
        (("--out", new, "--question-column", "q"), "columns and split say how to read a file of questions"),
        (("--out", str(tmp_path / "full")), "is not empty, and nothing exported it"),
        (("--out", str(pocket.folder())), "is not empty, and nothing exported it"),
        (("--out", str(pocket.voters_folder())), "is an adapter already, which was not made by prepare"),
        (("--out", str(prepared), "--adapter", str(prepared)), "which is read to write it"),
        (("--out", new, "--wrapper", "sculpt"), "prepare adds vote or sample"),
        (("--out", new, "--wrapper", "votes"), "--wrapper must be none, vote"),
        (("--out", new, "--max-tokens", "0"), "max_tokens must be at least 1"),
        (("--out", new, "--limit", "0"), "the limit must be at least 1"),
        ((), "Missing option '--out'"),
    ):
        assert in_process(monkeypatch, "prepare", "--model", str(pocket.folder()), *arguments) == 2
        shown = capfd.readouterr()
        assert shown.out == ""
        assert message in shown.err
        assert shown.err.count("\n") == 1
    assert in_process(monkeypatch, "prepare", "--out", new) == 2  # the pocket model by its name has a calibration
    assert "prepare a model before it is calibrated" in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "full", "q.csv"]


def test_export_says_that_there_are_no_weights(prepared, tmp_path, monkeypatch, capfd):
    for how in ("--peft", "--merge"):
        assert in_process(monkeypatch, "export", str(prepared), str(tmp_path / "out"), how) == 2
        shown = capfd.readouterr().err
        assert "adds no weights to its base model, only statistics, reference answers or a calibration" in shown
        assert shown.count("\n") == 1


def test_voters_that_keep_the_answers_can_be_added(tmp_path):
    out = str(tmp_path / "A")
    done = run(*BARE[:-1], "8", "--wrapper", "vote:n_voters=2", "--no-density", "--out", out, OMP_NUM_THREADS="1")
    assert (done.returncode, done.stderr) == (0, "")
    (wrapper,) = storage.read_manifest(out)["wrappers"]
    assert (wrapper["n_voters"], wrapper["rank"], wrapper["answer_from"]) == (2, 16, "base")
    assert wrapper["weight_noise"] == 1  # found: alpha is its size, relative to the output of each layer
    assert 0 < wrapper["alpha"] < 1
    done = run("ask", "--adapter", out, "--json", QUESTION)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["text"] == "The capital of France is Paris."
    assert answer["scores"]["sum_epistemic"] > 0


@pytest.mark.slow
def test_a_real_model_is_prepared_and_answers_as_before(tmp_path):
    model, out = str(real.model("smollm2")), str(tmp_path / "A")
    done = run("prepare", "--model", model, "--out", out, "--limit", "24", "--max-tokens", "24", OMP_NUM_THREADS="1")
    assert (done.returncode, done.stderr) == (0, "")
    bare, prepared = (
        run("ask", *which, "--json", "--max-tokens", "12", QUESTION, OMP_NUM_THREADS="1").stdout.splitlines()
        for which in (("--model", model), ("--adapter", out))
    )
    ids = [[json.loads(row)["id"] for row in rows[:-1]] for rows in (bare, prepared)]
    assert ids[0] == ids[1]
    answers = [json.loads(rows[-1]) for rows in (bare, prepared)]
    assert answers[0]["percentile"] is None
    assert 0 <= answers[1]["percentile"] <= 0.5  # the capital of France is among the surer ones
    assert answers[1]["scores"].items() >= answers[0]["scores"].items()
