"""``benchmarks.vision`` at a size that says nothing: rows, resuming, and the table."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import vision
from benchmarks.seeds import compare_arms
from benchmarks.vision_arms import ARMS, MODELS, PEERS, Encoder, run_arm
from examples.comparison import Budget
from examples.handwriting import draw_letters, read_digits
from tests import oracles

SETTINGS = {"members": 3, "training": 60, "steps": 3, "batch": 30}


@pytest.fixture
def layers():
    for name in ("packed", "batch_ensemble"):
        oracles.load_alone(f"torch_uncertainty.layers.{name}")
    return vision.load_layers()


def test_every_arm_predicts_all_digits_and_letters(layers):
    data = read_digits(0, training=60, letters=20)
    for arm in ARMS:
        outcome = run_arm(arm, "cnn", data, Budget(6, 30, 1e-3), 3, layers)
        assert outcome.members.shape[1:] == (1737, 10)
        assert outcome.doubt.shape == (1737,)
        assert outcome.strange.shape == (20,)
        assert torch.isfinite(torch.cat([outcome.doubt, outcome.strange])).all()
        assert outcome.training.processor > 0 < outcome.prediction.processor


def test_ensembles_of_others_have_members_that_differ(layers):
    data = read_digits(0, training=60, letters=20)
    for arm in PEERS:
        members = run_arm(arm, "mlp", data, Budget(6, 30, 1e-3), 3, layers).members
        assert len(members) == 3
        assert not torch.equal(members[0], members[1])


def test_a_run_goes_on_where_it_stopped_and_its_table_pairs_seeds(tmp_path, monkeypatch):
    arms = ["separate", "vote", "plain+density"]
    file = vision.run(["mlp"], arms, 2, SETTINGS, folder=tmp_path, again=False)
    assert [(r["arm"], r["seed"]) for r in file.rows] == [
        ("separate", 0), ("vote", 0), ("plain+density", 0), ("vote", 1), ("plain+density", 1), ("separate", 1),
    ]  # fmt: skip
    monkeypatch.setattr(vision, "run_arm", lambda *_: pytest.fail("measured again"))
    vision.run(["mlp"], arms, 2, SETTINGS, folder=tmp_path, again=False)
    record = json.loads(file.path.read_text())
    gap = compare_arms(record["rows"], "vote", vision.BASELINE, "NLL", model="mlp")
    by = {(r["arm"], r["seed"]): r["NLL"] for r in record["rows"]}
    expected = sum(by["vote", seed] - by["separate", seed] for seed in (0, 1)) / 2
    assert gap is not None
    assert gap.value == pytest.approx(expected)
    text = vision.table(record)
    assert "| mlp: vote: a batch for each voter |" in text
    assert "1.00x" in next(row for row in text.splitlines() if "mlp: 3 networks |" in row)


def test_models_give_ten_classes():
    for build in MODELS.values():
        assert build()(torch.rand(4, 64)).shape == (4, 10)
    assert Encoder(dropout=0.5)(torch.rand(4, 64)).shape == (4, 10)


def test_letters_are_drawn_again_from_their_seed():
    letters = draw_letters(30, seed=3)
    assert torch.equal(letters, draw_letters(30, seed=3))
    assert not torch.equal(letters, draw_letters(30, seed=4))
    assert letters.min() == 0
    assert letters.max() == 1
    assert torch.equal(letters * 16, (letters * 16).round())
