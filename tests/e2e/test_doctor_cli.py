"""``selfdoubt doctor`` as its users run it."""

from __future__ import annotations

import json

import pytest

from tests.e2e.test_cli import in_process, run


def test_doctor_prints_what_it_measured_and_what_to_change() -> None:
    done = run("doctor", "--model", "pocket", "--steps", "2", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in ("weights", "key-value cache", "longest context", "graphs need a CUDA GPU", "bandwidth", "attention"):
        assert name in done.stdout
    assert "Nothing to change." in done.stdout or "1. " in done.stdout


def test_doctor_gives_programs_one_object() -> None:
    done = run("doctor", "--wrapper", "sculpt", "--model", "pocket", "--dtype", "float32", "--steps", "1", "--json")
    assert done.returncode == 0, done.stderr
    diagnosis = json.loads(done.stdout)
    assert diagnosis["type"] == "diagnosis"
    assert diagnosis["wrapper"].startswith("sculpt(")
    assert diagnosis["dtype"] == "float32"
    assert diagnosis["weights"]["bytes_by_dtype"].keys() == {"float32"}
    assert diagnosis["steps"]["measured"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model"], "no model folder at 'no/such/model'"),
        (["--device", "nonsense"], "no device is called 'nonsense'"),
        (["--adapter", "no-such-folder"], "no-such-folder"),
        (["--dtype", "float8"], "dtype must be auto"),
        (["--wrapper", "vote:n_voters=0"], "n_voters"),
        (["--steps", "600"], "600 steps do not fit the model's context of 512 tokens"),
        (["--batch", "0"], "greater than or equal to 1"),
    ],
)
def test_bad_input_gets_one_line(arguments, message, monkeypatch, capsys) -> None:
    assert in_process(monkeypatch, "doctor", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
