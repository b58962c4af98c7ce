"""The kernels of ``benchmarks.attention`` compute the formula, and one that cannot run says so in its row."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import attention, results

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", ["step", "causal", "packed"])
@pytest.mark.parametrize("arm", ["sdpa", "sdpa-math", "sdpa-grouped", pytest.param("flex", marks=pytest.mark.slow)])
def test_kernels_against_the_formula(case, arm):
    if arm in ("flex", "sdpa-grouped") and case != "step":
        pytest.skip("for steps only, or without a backward pass on a CPU")
    row = attention.measure(arm, attention.Shape("tiny", case, 3, 32), CPU, 0)
    assert row["difference"] < 2e-2  # of bfloat16, at values of about 1
    assert 0 < row["spread"][0] <= row["median"] <= row["spread"][1]


def test_a_mask_hides_what_it_says():
    step, packed = (attention.build_mask(attention.Shape("tiny", case, 2, 8), CPU) for case in ("step", "packed"))
    assert step.shape == (2, 1, 1, 8)
    assert step[0, 0, 0].tolist() == [True] * 6 + [False] * 2
    assert packed[0, 0].long().tolist()[2:4] == [[0, 0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0, 0]]
    assert attention.build_mask(attention.Shape("tiny", "causal", 2, 8), CPU) is None


def test_a_run_goes_on_where_it_stopped_and_keeps_what_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results, "tables", lambda: None)
    monkeypatch.setattr(results, "read_commit", lambda: "abc")
    options = ["--models", "tiny", "--lengths", "16", "--training", "--seconds", "0"]
    monkeypatch.setattr(sys, "argv", ["attention", *options, "--arms", "sdpa", "sdpa-cudnn"])
    attention.main()
    record = json.loads(next(tmp_path.glob("attention-*.json")).read_text())
    good, bad = record["rows"]
    assert good["arm"] == "sdpa"
    assert "median" in good
    assert "median" not in bad
    assert bad["error"]
    shown = attention.table(record)
    assert "tiny, step, 3 x 16: SDPA, as PyTorch chooses" in shown
    assert "1.00x" in shown
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured again"))
    attention.main()
