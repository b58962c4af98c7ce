"""The recipe as a whole, in one process on a tiny model: against a plain loop, cut off, resumed, and what it leaves."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from selfdoubt import RiskAwareLM, sample, sculpt, vote
from selfdoubt.errors import ConfigError, LoadError, NonFiniteError
from selfdoubt.lm.load import load_model
from selfdoubt.rows import list_added_names
from selfdoubt.storage import from_json
from selfdoubt.train import InstructionData, RiskAwareModule, TrainConfig, fit
from selfdoubt.train.batches import StepSampler, collate
from selfdoubt.train.build import build_model, build_trainer
from selfdoubt.train.config import load_config
from selfdoubt.train.encode import encode_chat, prepare_splits
from tests.unit.train.conftest import WRAPPERS


@pytest.fixture
def config(float32_folder, data_file, tmp_path):
    return TrainConfig(
        model=float32_folder, data=data_file, out=str(tmp_path / "adapter"), accelerator="cpu", precision="32-true",
        batch_size=6, max_steps=10, lr=1e-2, loggers="none", progress=False, reference=4, reference_tokens=4,
        wrapper=WRAPPERS["vote"], lora_r=4, checkpoint_every=4, max_length=200,
    )  # fmt: skip


def card(folder):
    return json.loads((Path(folder) / "selfdoubt.json").read_text())


def losses(folder):
    return card(folder)["training"]["losses"]


def batches_of(config, tmp_path):
    """The run's own batches, read beside it."""
    _, words = load_model(config.model)
    data = InstructionData(prepare_splits(config, words, tmp_path / "again"), config)
    for epoch in range(9):
        loader = data.train_dataloader()
        assert isinstance(loader.sampler, StepSampler)
        loader.sampler.set_epoch(epoch)
        yield from loader


@pytest.mark.parametrize("wrapper", ["vote", "none"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit_against_a_plain_loop(config, tmp_path, wrapper, accumulate):
    """All logits, an ordinary loss, torch's own AdamW: the same ten losses."""
    config = replace(config, wrapper=WRAPPERS[wrapper], accumulate=accumulate, batch_size=6 // accumulate)
    found = losses(fit(config))
    model, _ = build_model(config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
    batches, expected = batches_of(config, tmp_path), []
    for _ in range(10):
        total = 0.0
        for _ in range(accumulate):
            batch = next(batches)
            extra = {"training": True} if wrapper == "vote" else {}
            logits = model(input_ids=batch.ids, attention_mask=(batch.segments > 0).long(), **extra).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum") / batch.step_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(total)
    assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-4, atol=1e-5)
    assert found[-1] < found[0]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_a_run_leaves_answers_as_the_model_did(config, wrapper):
    folder = fit(replace(config, wrapper=WRAPPERS[wrapper]))
    lm = RiskAwareLM.load(config.model, adapter=folder)
    answer = lm.generate("What is the capital of France?", max_tokens=4)
    assert 0 <= answer.percentile <= 1
    assert {"README.md", "selfdoubt.json", "tokenizer.json", "run"} <= set(os.listdir(folder))
    training = card(folder)["training"]
    assert (training["config"]["wrapper"] or {"method": "none"})["method"] == wrapper
    assert len(training["losses"]) == 10
    assert training["val_loss"] > 0
    assert 0 <= training["val_accuracy"] <= 1
    assert (folder / "run" / "config.toml").is_file()
    text = (folder / "README.md").read_text()
    assert "license: unknown" in text
    assert f'{"wrapper" if wrapper == "none" else "method"} = "{wrapper}"' in text


@pytest.mark.parametrize("wrapper", ["vote", "sample"])
@pytest.mark.parametrize("killed_after", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 9)), 6])
def test_a_killed_run_goes_on_with_the_same_losses(config, tmp_path, wrapper, killed_after):
    """Nine batches an epoch, a checkpoint every other step: cut off within, at the end of, and after an epoch."""
    config = replace(config, wrapper=WRAPPERS[wrapper], checkpoint_every=1 if killed_after == 1 else 2, max_steps=14)
    unbroken = losses(fit(replace(config, out=str(tmp_path / "unbroken"))))

    class CutOffError(Exception):
        pass

    class Killer(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == killed_after and not config.resume:
                raise CutOffError

    from selfdoubt.train import run

    def with_killer(*args, **kwargs):
        trainer: Any = build_trainer(*args, **kwargs)  # Lightning's types do not know its list of callbacks
        trainer.callbacks.append(Killer())
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_trainer", with_killer)
        with pytest.raises(CutOffError):
            fit(config)
    with pytest.raises(LoadError):
        RiskAwareLM.load(config.model, adapter=config.out)  # a run that was cut off leaves nothing that loads
    assert losses(fit(replace(config, resume=True))) == pytest.approx(unbroken, rel=1e-6)


def test_resuming_needs_something_to_resume(config):
    with pytest.raises(ConfigError, match="train without --resume first"):
        fit(replace(config, resume=True))


@pytest.mark.parametrize("wrapper", ["vote", "none"])
def test_packing_gives_the_losses_of_rows_apart(config, wrapper):
    """One step over the same examples, packed and not: the mean over the same tokens."""
    config = replace(config, wrapper=WRAPPERS[wrapper], pack=True)
    model, words = build_model(config)
    module = RiskAwareModule(model.eval(), config)
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": q}] for q in ("What is it?", "Zürich")]
    examples = [encode_chat(words, chat, loss_on="all", max_length=64)._asdict() for chat in chats]
    voters = 3 if wrapper == "vote" else 1
    together = module.loss(collate([examples] * voters, 1, 96, packed=True))
    separately = module.loss(collate([[e] for _ in range(voters) for e in examples], 1))
    assert_close(together, separately, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapper", ["vote", "sculpt", "none"])
def test_padding_to_few_shapes_changes_neither_losses_nor_gradients(config, tmp_path, wrapper):
    gradients = []
    for pad_to in (1, 64):
        settings = replace(config, wrapper=WRAPPERS[wrapper], pad_to=pad_to)
        model, _ = build_model(settings)
        module = RiskAwareModule(model.eval().double(), settings)
        batch = next(batches_of(settings, tmp_path))
        loss = module.loss(batch)
        gradients.append([loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])])
        widths = {b.ids.shape[1] for b, _ in zip(batches_of(settings, tmp_path), range(9), strict=False)}
        assert len(widths) > 1 if pad_to == 1 else widths == {64}
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_voter_learns_nothing_from_other_voters_rows(config, tmp_path, checkpointing):
    config = replace(config, checkpointing=checkpointing)
    model, _ = build_model(config)
    module = RiskAwareModule(model, config).train()
    batch = next(batches_of(config, tmp_path))
    for voter in range(3):
        labels = torch.full_like(batch.labels, -100)
        labels[voter * 2 : voter * 2 + 2] = batch.labels[voter * 2 : voter * 2 + 2]
        chosen = (labels.flatten() >= 0).nonzero().flatten()
        loss = module.loss(batch._replace(labels=labels, chosen=chosen))
        for deviation in torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]):
            others = [m for m in range(3) if m != voter]
            assert torch.equal(deviation[others], torch.zeros_like(deviation[others]))
            assert deviation[voter].abs().sum() > 0


def test_checkpointing_changes_no_loss(config):
    plain, again = (losses(fit(replace(config, checkpointing=c, max_steps=4))) for c in (False, True))
    assert again == pytest.approx(plain, rel=1e-5)


def test_voters_may_all_see_everything(config):
    config = replace(config, voter_batch="repeat", batch_size=4)
    found = losses(fit(config))
    assert found[-1] < found[0]


@pytest.mark.parametrize(
    "wrapper",
    [
        sample.Wrapper(2, sample.Normal(0.2)),
        sample.Wrapper(2, sample.Bernoulli(0.2, trainable=True)),
        sample.Wrapper(2, sample.Normal(0.2, trainable=True)),
        sculpt.Wrapper(sculpt.Laplace, n_layers=1, rank=3),
        sculpt.Wrapper(sculpt.Normal, rank=5, initial_scale=0.3),
        vote.Wrapper(2, rank=None, alpha=2.0),
    ],
    ids=repr,
)
def test_every_setting_of_a_wrapper_can_be_trained(config, wrapper):
    folder = fit(replace(config, wrapper=wrapper, max_steps=2, batch_size=4, reference=2))
    assert len(losses(folder)) == 2
    (stored,) = card(folder)["wrappers"]
    assert from_json(stored) == wrapper == from_json(card(folder)["training"]["config"]["wrapper"])
    assert load_config(folder / "run" / "config.toml", {}).wrapper == wrapper
    fresh, _ = build_model(replace(config, wrapper=wrapper))
    trained = RiskAwareLM.load(config.model, adapter=folder, dtype="float32").model.state_dict()
    added = [name for name, p in fresh.named_parameters() if p.requires_grad and name in list_added_names(fresh)]
    assert added or not getattr(getattr(wrapper, "distribution", None), "trainable", True)
    start = fresh.state_dict()
    assert all(not torch.equal(trained[name], start[name]) for name in added)


def test_a_scale_must_be_that_of_the_output_layer(config):
    with pytest.raises(ConfigError, match=r"^a language model learns the scale of its output layer; leave .* out$"):
        fit(replace(config, wrapper=sculpt.Wrapper(param_filter=r"layers\.0\.mlp\.down_proj")))


@pytest.mark.parametrize("sculpt_loss", ["draws", "closed"])
def test_sculpt_learns_its_scale(config, sculpt_loss):
    folder = fit(replace(config, wrapper=WRAPPERS["sculpt"], sculpt_loss=sculpt_loss))
    lm = RiskAwareLM.load(config.model, adapter=folder)
    start = sculpt.Wrapper().initial_scale
    scales = [t.scale for t in lm.generate("What is the capital of France?", max_tokens=4).tokens]
    assert all(scale > 0 and abs(scale - start) > 1e-4 for scale in scales)


def test_the_best_weights_are_kept(config):
    """A rate far too high: the last weights are worse than earlier ones, and not those that are written."""
    folder = fit(replace(config, lr=0.5, max_steps=12, val_every=0.2, val_share=0.2, reference=0))
    training = card(folder)["training"]
    lm = RiskAwareLM.load(config.model, adapter=folder)
    module = RiskAwareModule(lm.model, config)
    found = prepare_splits(replace(config, val_share=0.2), lm.tokenizer, folder / "again")
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    measured = trainer.validate(module, InstructionData(found, config), verbose=False)[0]["val/loss"]
    assert measured == pytest.approx(training["val_loss"], rel=1e-3)


def test_a_build_trainer_ones_own_drives_the_module(config):
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, enable_checkpointing=False,
    )  # fmt: skip
    assert len(losses(fit(config, trainer))) == 3


def test_early_stopping_and_schedules(config):
    folder = fit(replace(config, lr=0.5, max_steps=None, epochs=9, patience=1, val_every=0.5, schedule="cosine",
                         warmup=2, reference=0))  # fmt: skip
    assert len(losses(folder)) < 9 * 9


@pytest.mark.parametrize("logger", ["csv", "tensorboard", pytest.param("wandb", marks=pytest.mark.slow)])
def test_loggers_write_the_losses(config, logger, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = fit(replace(config, loggers=logger, max_steps=2, reference=0))
    if logger == "csv":
        assert "train/loss" in (folder / "run" / "log" / "metrics.csv").read_text()
    else:
        assert any((folder / "run" / logger).rglob("*tfevents*" if logger == "tensorboard" else "*.wandb"))


def test_a_loss_that_is_no_number_stops_the_run(config, monkeypatch):
    monkeypatch.setattr(RiskAwareModule, "loss", lambda self, batch: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(NonFiniteError, match="the loss of step 0 is nan; lower lr"):
        fit(config)
    assert not (Path(config.out) / "selfdoubt.json").exists()


def test_an_over_long_length_is_said(config):
    with pytest.raises(ConfigError, match="reads at most 256 tokens"):
        fit(replace(config, max_length=257))


def test_nothing_to_train_is_said(config):
    model, _ = load_model(config.model)
    with pytest.raises(ConfigError, match="nothing of this model trains"):
        RiskAwareModule(model, config)


def test_fresh_voters_are_the_base_where_their_noise_is_nothing(config):
    """Before the first step, voters without noise have the base's loss."""
    model, _ = build_model(replace(config, wrapper=vote.Wrapper(rank=4, weight_noise=0.0)))
    assert isinstance(model.spec, vote.Wrapper)
    base, _ = load_model(config.model)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert_close(model.eval()(input_ids=ids).logits, base(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_four_bit_weights_train_beside_what_is_added(config, wrapper):
    pytest.importorskip("bitsandbytes")
    config = replace(
        config, wrapper=WRAPPERS[wrapper], quantize="nf4", precision="bf16-mixed", val_every=0.3, max_steps=12
    )
    folder = fit(config)
    found = losses(folder)
    # A validation in between must not end the learning below it.
    assert sum(found[-3:]) < sum(found[:3])
    answer = RiskAwareLM.load(config.model, adapter=folder, quantize="nf4").generate("What?", max_tokens=3)
    assert answer.risk >= 0


def test_an_optimizer_with_a_state_of_8_bits(config):
    pytest.importorskip("bitsandbytes")
    found = losses(fit(replace(config, optimizer="adamw8bit")))
    assert found[-1] < found[0]


@pytest.mark.parametrize("wrapper", ["sample", "none"])
def test_lora_is_merged_on_request(config, wrapper):
    folder = fit(replace(config, wrapper=WRAPPERS[wrapper], merge=True, max_steps=3))
    merged = RiskAwareLM.load(folder / "merged", adapter=folder / "merged" / "adapter")
    whole = RiskAwareLM.load(config.model, adapter=folder)
    ours, theirs = (lm.score("In France.", "Where is Paris?") for lm in (whole, merged))
    assert ours.scores == pytest.approx(theirs.scores, rel=1e-3, abs=1e-5)


def test_pushing_is_refused_before_the_work_begins(config, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ConfigError, match=r"looks like user/name|needs a token"):
        fit(replace(config, push="nobody"))
    assert not Path(config.out).exists()


def test_pushing_leaves_checkpoints_and_logs_here(config, monkeypatch):
    from selfdoubt.train import run

    sent = []
    monkeypatch.setattr(run, "check_upload", lambda name: None)

    def upload(folder, name, without):
        sent.append((folder, name, without))
        return "there"

    monkeypatch.setattr(run, "upload", upload)
    folder = fit(replace(config, push="user/name", max_steps=2, reference=0))
    assert sent == [(folder, "user/name", "run")]
