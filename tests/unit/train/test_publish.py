"""What a finished run leaves: all that could fail at its end is tried before its first step, and no run is lost."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selfdoubt import RiskAwareLM, sample, vote
from selfdoubt.errors import ConfigError, SelfdoubtError, WrapError
from selfdoubt.lm.adapters.adapter import save_adapter
from selfdoubt.lm.load import load_model
from selfdoubt.train import TrainConfig, fit, publish, run
from selfdoubt.train.checkpoint import export_checkpoint
from tests.unit.train.conftest import WRAPPERS
from tests.zoo import causal, talker, tokenizer


@pytest.fixture
def config(float32_folder, data_file, tmp_path):
    return TrainConfig(
        model=float32_folder, data=data_file, out=str(tmp_path / "adapter"), accelerator="cpu", precision="32-true",
        batch_size=6, max_steps=2, lr=1e-2, loggers="none", progress=False, reference=2, reference_tokens=3,
        wrapper=vote.Wrapper(rank=4), lora_r=4, max_length=200,
    )  # fmt: skip


def saved(model, folder):
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory):
    """GPT-2: its head is its embedding, and its linear layers are Hugging Face's Conv1D."""
    model = causal("gpt2", torch.float32)
    wide = type(model)(
        type(model.config)(**model.config.to_dict() | {"vocab_size": len(tokenizer()), "n_positions": 256})
    )
    assert wide.config.tie_word_embeddings
    return saved(wide, tmp_path_factory.mktemp("tied"))


def answers(adapter, model):
    lm = RiskAwareLM.load(model, adapter=adapter, dtype="float32")
    return lm.generate("What is the capital of France?", max_tokens=4).scores


@pytest.mark.parametrize("wrapper", ["none", "sample", "sculpt"])
@pytest.mark.parametrize("targets", ["embed_tokens|q_proj", "lm_head|q_proj", "embed_tokens|lm_head"])
def test_lora_on_embeddings_and_heads_trains_loads_and_answers(config, wrapper, targets):
    folder = fit(replace(config, wrapper=WRAPPERS[wrapper], lora_targets=targets))
    found = answers(folder, config.model)
    assert found["sum_nll"] >= 0
    assert not (folder / "run" / run.FINISHED).exists()
    assert not (folder / "run" / "trial").exists()
    # What was learnt is in the answers.
    bare, _ = load_model(config.model, dtype="float32", device="cpu")
    model = RiskAwareLM.load(config.model, adapter=folder, dtype="float32").model
    ids = torch.tensor([[5, 6, 7, 8]])
    assert not torch.equal(model.eval()(input_ids=ids).logits, bare(input_ids=ids).logits)


@pytest.mark.parametrize("targets", [r"wte|c_attn", r"wpe|c_proj", r"lm_head|c_attn"])
def test_lora_on_a_tied_model_trains_loads_and_answers(config, tied_folder, targets):
    folder = fit(replace(config, model=tied_folder, wrapper=None, lora_targets=targets))
    assert answers(folder, tied_folder)["sum_nll"] >= 0


@pytest.mark.parametrize("param_filter", ["embed_tokens|q_proj", "lm_head"])
def test_voters_of_embeddings_and_heads_too(config, param_filter):
    folder = fit(replace(config, wrapper=vote.Wrapper(rank=4, param_filter=param_filter)))
    assert answers(folder, config.model)["sum_nll"] >= 0


@pytest.fixture
def no_training(monkeypatch):
    """Nothing of a training may begin."""
    monkeypatch.setattr(run, "build_trainer", lambda *_, **__: pytest.fail("the training began"))


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "out", ["{tmp}/file/below", "{tmp}/file", "{tmp}/" + "n" * 300, "{tmp}/a\0b", "", "/proc/nowhere"]
)
def test_a_folder_that_cannot_be_written_is_said_before_the_first_step(config, no_training, tmp_path, out):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"^out=") as error:
        fit(replace(config, out=out.format(tmp=tmp_path)))
    one_line(error)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_models_folder_is_not_written_over(config, no_training, tmp_path):
    folder = saved(talker(), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    with pytest.raises(ConfigError, match=r"is a model's folder \(it has a config\.json\); give another one"):
        fit(replace(config, out=folder))
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()} == before


def test_a_merge_that_cannot_be_is_said_before_the_first_step(config, no_training, tied_folder, tmp_path):
    tied = replace(config, model=tied_folder, wrapper=None, lora_targets="wte|c_attn", merge=True)
    with pytest.raises(WrapError, match=r"^the weight of transformer\.wte is tied to another layer's"):
        fit(tied)
    with pytest.raises(ConfigError, match=r"picks other layers once LoRA is merged, so merge=True would change"):
        fit(replace(config, wrapper=sample.Wrapper(param_filter=r"lora_A|layers\.0\."), merge=True))
    (tmp_path / "adapter" / "merged").mkdir(parents=True)
    (tmp_path / "adapter" / "merged" / "mine").write_text("x")
    with pytest.raises(ConfigError, match=r"merged is not empty, and nothing exported it"):
        fit(replace(config, wrapper=None, merge=True))
    assert (tmp_path / "adapter" / "merged" / "mine").exists()
    assert os.listdir(tmp_path / "adapter") == ["merged"]


@pytest.mark.parametrize("wrapper", ["vote", "sample", "none"])
def test_a_run_whose_adapter_cannot_be_written_is_not_lost(config, monkeypatch, tmp_path, wrapper):
    config = replace(config, wrapper=WRAPPERS[wrapper], val_share=0.1)
    expected = answers(fit(replace(config, out=str(tmp_path / "unbroken"))), config.model)

    def full(model, folder, **options):
        if Path(folder).name != "trial":
            raise OSError(28, "No space left on device")
        return save_adapter(model, folder, **options)

    monkeypatch.setattr(publish, "save_adapter", full)
    kept = Path(config.out) / "run" / run.FINISHED
    with pytest.raises(
        SelfdoubtError, match=r"^the run is finished, and its adapter could not be written \(OSError: .*No s"
    ) as e:
        fit(config)
    assert one_line(e).endswith(f"selfdoubt export {kept} NEW_FOLDER --checkpoint")
    monkeypatch.setattr(publish, "save_adapter", save_adapter)
    again = export_checkpoint(kept, tmp_path / "again")
    assert answers(again, config.model) == expected
    losses = json.loads((again / "selfdoubt.json").read_text())["training"]["losses"]
    assert len(losses) == config.max_steps


def test_reference_answers_that_fail_cost_only_the_percentiles(config, monkeypatch, capsys):
    def broken(*_, **__):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(RiskAwareLM, "generate", broken)
    folder = fit(config)
    assert "no reference answers, so risks have no percentile (RuntimeError: out of memory)" in capsys.readouterr().err
    monkeypatch.undo()
    lm = RiskAwareLM.load(config.model, adapter=folder)
    assert lm.generate("What?", max_tokens=2).percentile is None
    assert "There are no reference answers" in (folder / "README.md").read_text()


def test_validation_questions_beyond_the_context_are_left_out(config, tmp_path):
    """What is learnt from is cut to the length; a question is not."""
    long = "What is the capital of France? " * 80
    chats = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "Paris"},
         {"role": "user", "content": long}, {"role": "assistant", "content": "Paris"}]
        for i in range(12)
    ]  # fmt: skip
    chats += [
        [{"role": "user", "content": f"Where is {i}?"}, {"role": "assistant", "content": "Zürich"}] for i in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    folder = fit(replace(config, data=str(tmp_path / "chats.jsonl"), val_share=0.5, reference=12))
    card = json.loads((folder / "selfdoubt.json").read_text())
    text = (folder / "README.md").read_text()
    assert card["reference"]["sum_nll"]
    assert "own answers to 12 validation questions" not in text
    assert "There are no reference answers" not in text


def test_a_card_of_a_run_whose_losses_were_not_kept(config):
    assert "The losses of the steps were not kept." in publish.write_model_card(config, publish.History([], train=1), 0)
