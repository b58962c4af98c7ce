"""The batch size that fits the memory: it decides how many rows run at a time, and never what is learnt."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfdoubt.errors import ConfigError
from selfdoubt.lm.load import load_model
from selfdoubt.train import TrainConfig, batch_size, fit
from selfdoubt.train.batch_size import (
    build_longest_batch,
    count_peak_bytes,
    list_batch_sizes,
    resolve_batch_size,
)
from selfdoubt.train.build import build_model
from selfdoubt.train.config import load_config
from selfdoubt.train.encode import prepare_splits
from selfdoubt.train.module import compute_loss
from tests.unit.train.conftest import WRAPPERS
from tests.unit.train.test_run import losses

MEGABYTE = 2**20


@pytest.fixture
def config(float32_folder, data_file, tmp_path):
    return TrainConfig(
        model=float32_folder, data=data_file, out=str(tmp_path / "adapter"), accelerator="cpu", precision="32-true",
        batch_size="auto", max_steps=4, lr=1e-2, loggers="none", progress=False, reference=0, lora_r=4,
        checkpoint_every=2, max_length=200,
    )  # fmt: skip


def give_memory(monkeypatch, free):
    monkeypatch.setattr(batch_size, "read_cpu_memory", lambda: (2 * free, free))


def measure(config, tmp_path, size):
    """Bytes of a step of the longest examples."""
    model, words = build_model(config)
    examples = prepare_splits(config, words, tmp_path / "encoded").train
    batch = build_longest_batch(config, examples, size)
    return count_peak_bytes(lambda: compute_loss(model.train(), config, batch).backward())


@given(st.integers(1, 200), st.integers(1, 7))
def test_sizes_divide_a_step_and_halve(per_group, groups):
    rows = per_group * groups
    sizes = list_batch_sizes(rows, groups)
    assert sizes[0] == rows
    assert sizes[-1] == groups
    assert all(rows % size == 0 and size % groups == 0 for size in sizes)
    assert all(2 * b <= a for a, b in pairwise(sizes))


def test_bytes_are_counted_while_tensors_live():
    def run():
        a = torch.ones(MEGABYTE, dtype=torch.uint8)
        b = a + 1
        del a
        c = b.view(2, -1)[1]  # nothing new
        b += 1
        d = b * 2
        del b, c, d
        torch.ones(10)

    assert count_peak_bytes(run) == 2 * MEGABYTE
    x = torch.ones(MEGABYTE // 4, requires_grad=True)
    # The exponential is kept for the backward pass, and next to it are a sum's gradient, expanded, and x's.
    assert 2 * MEGABYTE <= count_peak_bytes(lambda: x.exp().sum().backward()) <= 3 * MEGABYTE + 64


@pytest.mark.parametrize("wrapper", ["vote", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_grows_linearly_with_the_rows(config, tmp_path, wrapper, checkpointing):
    """So that two small steps say what a large one takes."""
    config = replace(config, wrapper=WRAPPERS[wrapper], checkpointing=checkpointing)
    few, more, many = (measure(config, tmp_path, size) for size in (3, 6, 12))
    assert few + 3 * (more - few) == pytest.approx(many, rel=0.1)


@pytest.mark.parametrize("wrapper", ["vote", "none"])
def test_little_memory_splits_a_step_and_changes_no_loss(config, tmp_path, monkeypatch, wrapper):
    config = replace(config, wrapper=WRAPPERS[wrapper])
    whole = losses(fit(replace(config, batch_size=12, out=str(tmp_path / "whole"))))
    model, _ = build_model(config)
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    give_memory(monkeypatch, round((1.05 * measure(config, tmp_path, 3) + 3 * trained) / 0.8))
    folder = fit(config)
    chosen = load_config(folder / "run" / "config.toml", {})
    assert (chosen.batch_size, chosen.accumulate) == (3, 4)
    assert losses(folder) == pytest.approx(whole, rel=1e-4)
    give_memory(monkeypatch, 2**40)
    assert len(losses(fit(replace(config, resume=True, max_steps=6)))) == 6
    assert load_config(folder / "run" / "config.toml", {}).batch_size == 3  # as the run began


def test_much_memory_takes_a_step_at_once(config, monkeypatch):
    give_memory(monkeypatch, 2**40)
    config = replace(config, accumulate=2, val_share=0, max_steps=1)
    chosen = load_config(fit(config) / "run" / "config.toml", {})
    assert (chosen.batch_size, chosen.accumulate) == (24, 1)


def test_trials_leave_no_gradient_and_draw_nothing(config, tmp_path):
    config = replace(config, wrapper=WRAPPERS["sample"])
    model, words = build_model(config)
    examples = prepare_splits(config, words, tmp_path / "encoded").train
    before = torch.get_rng_state()
    resolve_batch_size(config, examples, compute_loss, model, Path("nowhere"))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("pack", [False, True])
def test_the_longest_batch_is_of_the_longest_examples(config, tmp_path, pack):
    config = replace(config, pack=pack, max_length=64, pad_to=16)
    _, words = load_model(config.model)
    examples = prepare_splits(config, words, tmp_path / "encoded").train
    batch = build_longest_batch(config, examples, 80)  # more than there are
    longest = max(examples["length"])
    assert batch.ids.shape == (80, 64 if pack else 16 * -(-longest // 16))
    assert (batch.segments[0] > 0).sum() > 32 if pack else (batch.segments[0] > 0).sum() == longest


@pytest.mark.parametrize(
    ("settings", "free", "message"),
    [
        ({}, 1000, "a step of a single row does not fit the memory; use --checkpointing"),
        ({"devices": 2}, 2**40, "measures one device; give a number"),
        ({"wrapper": "vote5"}, 2**40, "the 12 rows of batch_size='auto' do not divide; use batch_size=15"),
    ],
)
def test_what_cannot_be_is_said(config, monkeypatch, settings, free, message):
    from selfdoubt import vote

    give_memory(monkeypatch, free)
    if "wrapper" in settings:
        settings = {"wrapper": vote.Wrapper(5, rank=2)}
    with pytest.raises(ConfigError, match=message):
        fit(replace(config, **settings))


def test_resuming_with_another_step_is_said(config, monkeypatch):
    give_memory(monkeypatch, 2**40)
    fit(config)
    with pytest.raises(ConfigError, match=r"accumulate=3 is 36 rows a step, and the run to resume had 12 \* 1"):
        fit(replace(config, resume=True, accumulate=3))


@pytest.mark.parametrize("value", ["12", "all", 0, 2.5, True])
def test_other_values_are_refused(value):
    with pytest.raises(ConfigError, match="batch_size must be"):
        load_config(None, {"data": "", "out": "", "batch_size": value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_halves_until_a_step_fits(config, tmp_path, monkeypatch):
    config = replace(config, accelerator="gpu")
    model, words = build_model(config)
    examples = prepare_splits(config, words, tmp_path / "encoded").train
    sizes = []

    def loss(model, config, batch):
        sizes.append(len(batch.ids))
        if len(batch.ids) > 3:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")  # more than there is
        return compute_loss(model, config, batch)

    chosen = resolve_batch_size(config, examples, loss, model, Path("nowhere"))
    assert sizes == [12, 6, 3]
    assert (chosen.batch_size, chosen.accumulate) == (3, 4)
