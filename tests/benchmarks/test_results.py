"""Rows of a benchmark are written one by one, and a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json

import pytest

from benchmarks import results


@pytest.fixture
def commit(monkeypatch):
    """A commit that a test can change."""
    now = ["abc"]
    monkeypatch.setattr(results, "read_commit", lambda: now[0])
    return now


def open_rows(folder, **options):
    return results.RowFile("decode", ("model", "arm"), folder, **{"tokens": 8, **options})


def test_each_row_is_written_at_once_and_not_measured_again(tmp_path, commit):
    rows = open_rows(tmp_path)
    assert not rows.has(model="1b", arm="hf")
    rows.add({"model": "1b", "arm": "hf", "median": 1.0})
    stored = json.loads(rows.path.read_text())
    assert stored["rows"] == [{"model": "1b", "arm": "hf", "median": 1.0, "commit": "abc"}]
    assert stored["settings"] == {"tokens": 8}
    later = open_rows(tmp_path)
    assert later.has(model="1b", arm="hf")
    assert not later.has(model="1b", arm="plain")
    later.add({"model": "1b", "arm": "plain", "median": 2.0})
    assert [r["arm"] for r in json.loads(rows.path.read_text())["rows"]] == ["hf", "plain"]


def test_another_commit_measures_again_and_replaces_the_row(tmp_path, commit):
    rows = open_rows(tmp_path)
    rows.add({"model": "1b", "arm": "hf", "median": 1.0})
    rows.add({"model": "1b", "arm": "plain", "median": 2.0})
    commit[0] = "def"
    later = open_rows(tmp_path)
    assert not later.has(model="1b", arm="hf")
    later.add({"model": "1b", "arm": "hf", "median": 3.0})
    stored = {r["arm"]: (r["median"], r["commit"]) for r in json.loads(rows.path.read_text())["rows"]}
    assert stored == {"hf": (3.0, "def"), "plain": (2.0, "abc")}


def test_rows_of_other_settings_are_not_kept_and_again_measures_all(tmp_path, commit):
    rows = open_rows(tmp_path)
    rows.add({"model": "1b", "arm": "hf", "median": 1.0})
    assert not open_rows(tmp_path, again=True).has(model="1b", arm="hf")
    assert open_rows(tmp_path, again=True).rows  # until they are measured
    other = open_rows(tmp_path, tokens=16)
    assert not other.rows
    assert not other.has(model="1b", arm="hf")
