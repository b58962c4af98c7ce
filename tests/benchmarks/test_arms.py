"""The arms of ``benchmarks.decode`` and ``batch`` run on a tiny model, and their rows say what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import arms, attention, batch, decode, gpu, results, train

NAMES = (
    "hf", "hf-rows", "bare", "plain", "free", "vote3", "vote3-late", "vote3-answer", "sample5", "sculpt", "separate3",
    "plain+static", "vote3+static", "sample5+static", "vote3-late+static", "vote3-answer+static",
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return arms.build("tiny")


@pytest.mark.parametrize("name", NAMES)
def test_every_arm_answers(tiny, name):
    arm = arms.parse_arm(name)
    assert arm.name == name
    assert arm.about
    times = arms.build_run(arm, tiny)([[5, 6, 7, 8], [9, 10, 11, 12]], 4)
    assert times.prompt > 0
    assert times.token > 0


@pytest.mark.parametrize("name", ["", "vote", "hf+captured+", "vote3-early", "separate", "sample5-late-answer"])
def test_an_unknown_arm_is_refused(name):
    with pytest.raises(ValueError, match="no arm is called"):
        arms.parse_arm(name)


def test_the_weights_that_a_step_reads_are_counted_once(tiny):
    assert arms.count_bytes(tiny) == 2 * sum(p.numel() for p in tiny.parameters())
    assert tiny.lm_head.weight is tiny.model.embed_tokens.weight


def test_a_cell_is_measured_once_and_tells_of_arms_that_fail(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(results, "read_commit", lambda: "abc")
    monkeypatch.setattr(arms, "build", lambda name: tiny)
    rows = results.RowFile("decode", decode.KEYS, tmp_path, prompt=8, tokens=4)
    cell = decode.Cell("tiny", 1, 8, 4, 2)
    decode.measure(cell, ["hf", "vote3", "vote3+captured"], rows)
    stored = {row["arm"]: row for row in json.loads(rows.path.read_text())["rows"]}
    assert stored["hf"]["ratio"] == stored["hf"]["ratio_to_best"] == 1
    assert stored["vote3"]["rounds"] == 2
    assert stored["vote3"]["ratio"] > 0
    assert "CUDA" in stored["vote3+captured"]["error"]
    monkeypatch.setattr(arms, "build", lambda name: pytest.fail("measured again"))
    decode.measure(cell, ["hf", "vote3", "vote3+captured"], rows)
    record = json.loads(rows.path.read_text())
    assert "tiny: vote, 3 voters" in decode.table(record)
    assert "tokens/s" in batch.table(record)


def test_the_cost_of_members_is_drawn(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(arms, "build", lambda name: tiny)
    rows = results.RowFile("members", decode.KEYS, tmp_path, prompt=8, tokens=4)
    decode.measure(decode.Cell("tiny", 1, 8, 4, 1), decode.name_sweep([1, 2, 3], ["eager", "static"]), rows)
    picture = tmp_path / "members.png"
    assert decode.plot_members(json.loads(rows.path.read_text()), picture)
    assert picture.stat().st_size > 10_000


def test_a_stage_that_fails_does_not_stop_the_next(tmp_path, capfd):
    stages = [
        gpu.Stage("broken", 1, ("-c", "raise SystemExit(3)"), takes_minutes=False),
        gpu.Stage("fine", 1, ("-c", "import sys; assert sys.argv[1] == '--minutes'")),
    ]
    assert gpu.run(stages, 1, tmp_path) == ["fine"]
    assert "broken: code 3" in capfd.readouterr().out
    assert gpu.run(stages, 0, None) == []


def test_every_stage_is_a_program_that_takes_its_arguments(monkeypatch):
    stages = gpu.build_stages(("1b", "3b", "8b"), "tests", Path("alpaca.json"))
    assert len({stage.name for stage in stages}) == len(stages)
    programs = {"decode": decode, "batch": batch, "attention": attention, "train": train}
    for stage in stages:
        program = programs.get(stage.command[1].removeprefix("benchmarks."))
        assert program is not None or stage.command[1] == "pytest"
        if stage.command[1] == "pytest":
            assert all(Path(path).exists() for path in stage.command if path.startswith("tests"))
            continue
        for name in stage.command[stage.command.index("--arms") + 1 :] if "--arms" in stage.command else ():
            assert arms.parse_arm(name).name == name
        minutes = ("--minutes", "0.001") if stage.takes_minutes else ()
        monkeypatch.setattr(sys, "argv", ["benchmark", *stage.command[2:], *minutes, "--help"])
        with pytest.raises(SystemExit) as ended:  # all other arguments are read before the help is shown
            program.main()
        assert ended.value.code == 0
