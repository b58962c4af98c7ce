"""Checkpoints are data: what could run code when it is unpickled is refused, and does not run."""

from __future__ import annotations

import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from selfdoubt.errors import LoadError
from selfdoubt.train import TrainConfig
from selfdoubt.train.checkpoint import SETTINGS, export_checkpoint, read_checkpoint
from tests.unit.train.conftest import WRAPPERS

STATE = {"state_dict": {"model.a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(4, dtype=torch.bfloat16)}}


class Trap:
    """An object that leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def run(float32_folder, data_file, tmp_path) -> Path:
    """The folder of a run, without a checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = TrainConfig(model=float32_folder, data=data_file, out=str(tmp_path), wrapper=WRAPPERS["vote"])
    (folder / SETTINGS).write_text(config.to_toml())
    return folder


def write_shards(folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(dict(STATE, notes={"epoch": 3}), checkpoint_id=folder, no_dist=True)
    torch.save({"train_losses": [1.0, 0.5]}, folder / "meta.pt")
    return folder


def of_one_file(run, trap):
    torch.save({**STATE, "trap": trap}, run / "last.ckpt")
    return run / "last.ckpt", run / "last.ckpt"


def plain_pickle(run, trap):
    (run / "last.ckpt").write_bytes(pickle.dumps(trap))
    return run / "last.ckpt", run / "last.ckpt"


def of_the_index(run, trap):
    folder = write_shards(run / "last.ckpt")
    (folder / ".metadata").write_bytes(pickle.dumps(trap))
    return folder, folder / ".metadata"


def inside_the_index(run, trap):
    folder = write_shards(run / "last.ckpt")
    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data["trap"] = trap
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    return folder, folder / ".metadata"


def of_an_entry(run, trap):
    """An entry of the weights that is not a tensor."""
    folder = run / "last.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save({"state_dict": {**STATE["state_dict"], "model.trap": trap}}, checkpoint_id=folder, no_dist=True)
    return folder, folder / "__0_0.distcp"


def next_to_the_shards(run, trap):
    folder = write_shards(run / "last.ckpt")
    torch.save({"train_losses": trap}, folder / "meta.pt")
    return folder, folder / "meta.pt"


@pytest.mark.parametrize(
    "place", [of_one_file, plain_pickle, of_the_index, inside_the_index, of_an_entry, next_to_the_shards]
)
def test_a_checkpoint_with_an_object_that_runs_code_is_refused_and_runs_nothing(run, tmp_path, place):
    mark = tmp_path / "mark"
    checkpoint, file = place(run, Trap(mark))
    mark.unlink(missing_ok=True)
    with pytest.raises(LoadError) as raised:
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    assert "which could run code" in str(raised.value)
    assert "\n" not in str(raised.value)
    if place is of_an_entry:  # the trap lies among tensors in this file
        assert b"touch" in file.read_bytes()
    else:
        unpickle(file)
        assert mark.exists(), "the trap does not work, so the test says nothing"


def unpickle(file: Path) -> None:
    """Read a file as torch and pickle do when they trust it."""
    try:
        torch.load(file, weights_only=False)
    except Exception:
        pickle.load(io.BytesIO(file.read_bytes()))


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_and_numbers_are_read(run, sharded):
    if sharded:
        content = read_checkpoint(write_shards(run / "last.ckpt"))
        assert content["train_losses"] == [1.0, 0.5]
    else:
        torch.save(STATE, run / "last.ckpt")
        content = read_checkpoint(run / "last.ckpt")
    for name, tensor in STATE["state_dict"].items():
        assert torch.equal(content["state_dict"][name], tensor)
        assert content["state_dict"][name].dtype == tensor.dtype


def test_a_broken_checkpoint_is_one_line(run, tmp_path):
    (run / "last.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(LoadError) as raised:
        export_checkpoint(run / "last.ckpt", tmp_path / "out")
    assert "\n" not in str(raised.value)
