"""The pure parts of ``benchmarks.train``: rows of each step, ratios, and which rows stand."""

from __future__ import annotations

import json

import pytest

from benchmarks import results
from benchmarks.train import ARMS, ON_A_CPU, WARM_COMPILED, add_ratios, name_model, order_rows, read_rows, table

RECORDS = [{"instruction": "word " * (1 + i % 17), "input": "", "output": "yes " * (1 + i % 5)} for i in range(90)]
OPTIONS = {"shape": "tiny", "vocabulary": 512, "batch": 3, "length": 64, "steps": 7, "nf4": False, "tokenizer": ""}


def row(arm, speed, peak=10):
    return {"model": name_model(OPTIONS), "arm": arm, "speed": speed, "peak": peak, "spread": [speed, speed]}


@pytest.mark.parametrize("arm", ["peft", "ours-vote"])
def test_all_arms_learn_from_the_same_records(arm):
    steps = order_rows(arm, RECORDS, OPTIONS)
    assert [len(step) for step in steps] == [3] * 7
    records = [record for step in steps for (record,) in step]
    warm = 3 * WARM_COMPILED
    assert records[:warm] == RECORDS[:warm]
    assert sorted(map(str, records)) == sorted(map(str, RECORDS[:21]))


def test_too_few_records_are_said():
    with pytest.raises(SystemExit, match="peft needs 21 rows, and the records fill 20"):
        order_rows("peft", RECORDS[:20], OPTIONS)


def test_ratios_are_to_the_same_way_of_the_same_model():
    other = row("tutorial-vote", 1.0) | {"model": "another"}
    rows = add_ratios([other, row("peft", 50.0), row("tutorial-vote", 20.0, 30), row("ours-vote-packed", 60.0)])
    assert rows[-1]["ratio"] == 1.2
    assert rows[-1]["speed_to_tutorial"] == 3.0
    assert rows[-1]["memory_to_tutorial"] == pytest.approx(1 / 3)
    assert rows[1]["speed_to_tutorial"] is None


def test_rows_of_another_commit_or_other_settings_are_measured_again(tmp_path):
    path = tmp_path / "rows.json"
    now = results.read_commit()
    rows = [row("peft", 1.0) | {"commit": now}, row("ours-vote", 2.0) | {"commit": "0000000"}]
    path.write_text(json.dumps({"rows": rows, "settings": {"batch": 3, "nf4": False}}))
    assert [r["arm"] for r in read_rows(path, {"batch": 3, "nf4": False}, again=False)] == ["peft"]
    assert read_rows(path, {"batch": 6, "nf4": False}, again=False) == []
    assert read_rows(path, {"batch": 3, "nf4": False}, again=True) == []
    assert read_rows(tmp_path / "none.json", {}, again=False) == []


def test_a_table_shows_what_is_there():
    versions = dict.fromkeys(("torch", "transformers", "peft"), "1")
    settings = {"nf4": True, "batch": 3, "length": 400, "rounds": 2, "lightning": "2"}
    record = {"rows": add_ratios([row(arm, 10.0) for arm in ARMS]), "settings": settings, "device": "a GPU"}
    text = table(record | {"commit": "abc", "versions": versions})
    assert all(f": {name} |" in text for name in ARMS.values())
    assert set(ON_A_CPU) < set(ARMS)
