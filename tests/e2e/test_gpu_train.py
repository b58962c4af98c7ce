"""Training, evaluating and diagnosing on a GPU, on the pocket model; skipped where there is none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfdoubt import RiskAwareLM, sculpt, vote
from selfdoubt.train import TrainConfig, fit
from selfdoubt.train.config import load_config
from tests.e2e.test_cli import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32"),  # compiled products in float32
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

WRAPPERS = {"none": None, "vote": vote.Wrapper(rank=16), "sculpt": sculpt.Wrapper()}


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    pairs = [{"question": f"How much is {i} and {i}?", "answer": f"It is {i + i}." * (1 + i % 3)} for i in range(120)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    return TrainConfig(
        data=str(tmp_path / "data.jsonl"), out=str(tmp_path / "adapter"), max_steps=20, max_length=96, lr=1e-3,
        loggers="none", progress=False, reference=8, reference_tokens=8, accelerator="gpu",
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "selfdoubt.json").read_text())["training"]["losses"]


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("pack", [False, True])
def test_twenty_steps_learn_and_what_they_leave_answers(config, name, pack):
    folder = fit(replace(config, wrapper=WRAPPERS[name], pack=pack))
    found = losses(folder)
    assert len(found) == 20
    assert sum(found[-5:]) < sum(found[:5])
    answer = RiskAwareLM.load(adapter=folder).generate("How much is 2 and 2?", max_tokens=8)
    assert 0 <= answer.percentile <= 1


def test_a_gpu_trains_as_a_cpu_does(config):
    config = replace(config, wrapper=WRAPPERS["vote"], precision="32-true", dtype="float32", max_steps=5, pad_to=32)
    theirs = losses(fit(replace(config, accelerator="cpu", out=f"{config.out}-cpu")))
    assert losses(fit(config)) == pytest.approx(theirs, rel=1e-3)


def test_checkpointing_changes_no_loss(config):
    config = replace(config, precision="32-true", dtype="float32", max_steps=4)
    again = losses(fit(replace(config, checkpointing=True, out=f"{config.out}-again")))
    assert again == pytest.approx(losses(fit(config)), rel=1e-4)


@pytest.mark.slow
def test_compiled_layers_change_no_loss(config):
    config = replace(config, wrapper=WRAPPERS["vote"], precision="32-true", dtype="float32", max_steps=5)
    compiled = losses(fit(replace(config, compile=True, out=f"{config.out}-compiled")))
    assert compiled == pytest.approx(losses(fit(config)), rel=1e-3)


@pytest.mark.parametrize("name", ["vote", "none"])
def test_four_bit_weights_train_and_load(config, name):
    pytest.importorskip("bitsandbytes")
    folder = fit(replace(config, wrapper=WRAPPERS[name], quantize="nf4"))
    found = losses(folder)
    assert sum(found[-5:]) < sum(found[:5])
    answer = RiskAwareLM.load(adapter=folder, quantize="nf4").generate("How much is 2 and 2?", max_tokens=4)
    assert answer.risk >= 0


def test_a_batch_size_by_memory(config):
    chosen = load_config(fit(replace(config, batch_size="auto", max_steps=2)) / "run" / "config.toml", {})
    assert (chosen.batch_size, chosen.accumulate) == (12, 1)  # the pocket fits any GPU


def test_twenty_questions_are_evaluated(tmp_path):
    out = tmp_path / "run"
    done = run("evaluate", "--data", "pocket", "--limit", "20", "--draws", "50", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "report.json").read_text())["counts"]["judged"] == 20


def test_doctor_measures_the_gpu():
    done = run("doctor", "--model", "pocket", "--device", "cuda", "--steps", "4", "--json")
    assert done.returncode == 0, done.stderr
    diagnosis = json.loads(done.stdout)
    assert diagnosis["device"]["kind"] == "cuda"
    assert diagnosis["steps"]["measured"] > 0
