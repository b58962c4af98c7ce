"""``selfdoubt train`` as its users run it: processes that are killed, several of them at once, and bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.pocket import evaluation
from recipes.pocket.phrasings import sentence
from selfdoubt import pocket
from tests.e2e.test_cli import in_process, run
from tests.waiting import wait_until

SMALL = (
    "--accelerator", "cpu", "--precision", "32-true", "--dtype", "float32", "--loggers", "none", "--no-progress",
    "--reference", "3", "--reference-tokens", "8", "--max-length", "64", "--rank", "4", "--lora-r", "4",
)  # fmt: skip


@pytest.fixture(scope="module")
def geography(tmp_path_factory) -> Path:
    """The pocket model's own questions with their answers, as instruction data."""
    file = tmp_path_factory.mktemp("data") / "geography.jsonl"
    questions = [q for q in evaluation.read_questions(pocket.reference_file()) if q.answers][:120]
    pairs = [{"question": q.question, "answer": sentence(q.relation, q.subject, q.answers[0])} for q in questions]
    file.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return file


def train(data: Path, out: Path, *arguments: str) -> list[float]:
    done = run("train", "--data", str(data), "--out", str(out), *SMALL, *arguments, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return losses(out)


def losses(out: Path) -> list[float]:
    return json.loads((out / "selfdoubt.json").read_text())["training"]["losses"]


@pytest.mark.parametrize(
    "wrapper",
    ["vote", pytest.param("sample", marks=pytest.mark.slow), pytest.param("sculpt", marks=pytest.mark.slow), "none"],
)
def test_an_adapter_is_trained_and_asked(geography, tmp_path, wrapper):
    found = train(geography, tmp_path / "out", "--wrapper", wrapper, "--max-steps", "8", "--lr", "1e-3")
    assert len(found) == 8
    done = run("ask", "What is the capital of France?", "--adapter", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert 0 <= answer["percentile"] <= 1
    assert "France" in answer["text"]


def test_a_process_killed_in_the_middle_goes_on_as_if_nothing_had_happened(geography, tmp_path):
    settings = ("--wrapper", "sample", "--max-steps", "12", "--checkpoint-every", "3", "--lr", "1e-3")
    unbroken = train(geography, tmp_path / "whole", *settings)
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "selfdoubt",
        "train",
        "--data",
        str(geography),
        "--out",
        str(out),
        *SMALL,
        *settings,
    ]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: (out / "run" / "last.ckpt").exists() or process.poll() is not None, 240)
        process.send_signal(signal.SIGKILL)
    finally:
        process.wait()
    if (out / "selfdoubt.json").exists():
        pytest.skip("the process was done before it could be killed")
    refused = run("ask", "hi", "--adapter", str(out))
    assert refused.returncode == 2
    assert "selfdoubt.json" in refused.stderr
    assert train(geography, out, *settings, "--resume") == pytest.approx(unbroken, rel=1e-6)


@pytest.mark.parametrize(
    ("wrapper", "strategy"),
    [
        ("vote", "ddp"),
        pytest.param("sculpt", "ddp", marks=pytest.mark.slow),
        pytest.param("vote", "fsdp", marks=pytest.mark.slow),
        ("none", "fsdp"),
    ],
)
def test_two_processes_give_the_losses_of_one(geography, tmp_path, wrapper, strategy):
    # Less than an epoch: the last weights are the ones that are kept.
    settings = ("--wrapper", wrapper, "--max-steps", "5", "--lr", "1e-3", "--val-share", "0.1", "--val-every", "1")
    alone = train(geography, tmp_path / "one", *settings, "--batch-size", "12")
    together = train(
        geography, tmp_path / "two", *settings, "--batch-size", "6", "--devices", "2", "--strategy", strategy,
        "--checkpoint-every", "5",
    )  # fmt: skip
    assert together == pytest.approx(alone, rel=1e-4)
    first, second = (json.loads((tmp_path / n / "selfdoubt.json").read_text())["training"] for n in ("one", "two"))
    assert second["val_loss"] == pytest.approx(first["val_loss"], rel=1e-3)
    if strategy == "fsdp":
        assert (tmp_path / "two" / "run" / "last.ckpt").is_dir()  # sharded
        done = run("export", str(tmp_path / "two" / "run" / "last.ckpt"), str(tmp_path / "exported"), "--checkpoint")
        assert done.returncode == 0, done.stderr
        texts = [
            run("ask", "Where is Tartu?", "--adapter", str(tmp_path / name), "--dtype", "float32", "--json").stdout
            for name in ("one", "exported")
        ]
        risks = [json.loads(text.splitlines()[-1])["scores"]["sum_nll"] for text in texts]
        assert risks[1] == pytest.approx(risks[0], rel=1e-3)


def test_a_config_file_and_flags(geography, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text(f'data = "{geography}"\nmax_steps = 99\nwrapper = "none"\nlora_r = 2\n')
    done = run(
        "train", "--config", str(file), "--out", str(tmp_path / "out"), "--max-steps", "1", "--accelerator", "cpu",
        "--no-progress", "--reference", "0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "out" / "selfdoubt.json").read_text())
    assert card["training"]["config"]["lora_r"] == 2
    assert len(card["training"]["losses"]) == 1


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["train", "--out", "x"], "give --data"),
        (["train", "--data", "./nowhere.json", "--out", "{tmp}/x"], "no data file at"),
        (["train", "--data", "{data}", "--out", "{data}"], "is a file; give a folder"),
        (["train", "--data", "{data}", "--out", "{tmp}/x", "--resume"], "train without --resume first"),
        (["train", "--data", "{data}", "--out", "{tmp}/x", "--lr", "hot"], "--lr"),
        (["train", "--data", "{data}", "--out", "{tmp}/x", "--wrapper", "guess"], "--wrapper"),
        (
            ["train", "--data", "{data}", "--out", "{tmp}/x", "--wrapper", "vote", "--batch-size", "7"],
            "use batch_size=9",
        ),
        (["train", "--data", "{data}", "--out", "{tmp}/x", "--model", "./nowhere"], "no model folder at"),
        (
            ["train", "--data", "{data}", "--out", "{tmp}/x", "--wrapper", "vote", "--batch-size", "300"],
            "lower batch_size",
        ),
        (["train", "--data", "{data}", "--out", "{tmp}/x", "--max-length", "9000"], "reads at most 512"),
        (["train", "--data", "{data}", "--out", "{tmp}/x", "--param-filter", "nothing_like_it"], "nearest"),
        (["train", "--data", "{data}", "--out", "{tmp}/x", "--strategy", "magic"], "--strategy"),
        (["train", "--config", "{tmp}/nowhere.toml"], "cannot be read"),
        (["train", "--data", "{data}", "--out", "{tmp}/x", "--wrapper", "sample:p=3"], "the key 'p'"),
        (["export", "{data}", "{tmp}/y", "--checkpoint"], "is not a checkpoint of a run"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(arguments, wanted, geography, tmp_path, monkeypatch, capsys):
    filled = [a.format(tmp=tmp_path, data=geography) for a in arguments]
    assert in_process(monkeypatch, *filled) == 2
    error = capsys.readouterr().err
    assert error.startswith("selfdoubt: "), error
    assert error.count("\n") == 1, error
    assert wanted in error
    assert not list(tmp_path.rglob("selfdoubt.json"))
