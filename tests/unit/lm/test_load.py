"""Folders, and names that are none: what loads, and what is said in one line when it does not."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from selfdoubt import vote
from selfdoubt.errors import ConfigError, LoadError, MissingExtraError, WrapError, require
from selfdoubt.lm.load import choose_dtype, load_model, resolve_model
from tests.zoo import talker, tokenizer


@pytest.fixture
def broken(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "broken")


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_folder_comes_back_frozen_and_in_evaluation_mode(model_folder):
    model, words = load_model(model_folder)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.dtype == torch.float64
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, talker()(ids).logits)
    assert words.chat_template == tokenizer().chat_template
    assert words.pad_token_id is not None


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float32])
def test_the_float_type_may_be_chosen(model_folder, dtype):
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert load_model(model_folder, dtype=dtype)[0].dtype == wanted


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_that_emulates_bfloat16_computes_in_float32(monkeypatch, native, expected):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert choose_dtype(torch.nn.Linear(2, 2).to(torch.bfloat16)) == expected
    assert choose_dtype(torch.nn.Linear(2, 2).double()) == torch.float64
    monkeypatch.setattr(os, "sysconf", lambda name: 1)  # a machine of one byte
    assert choose_dtype(torch.nn.Linear(2, 2).to(torch.bfloat16)) == torch.bfloat16


def test_half_precision_becomes_bfloat16_on_a_cpu(model_folder):
    assert load_model(model_folder, dtype="float16", device="cpu")[0].dtype == torch.bfloat16


def test_a_tokenizer_without_padding_pads_with_its_end(broken):
    path = broken / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token", None)
    path.write_text(json.dumps(settings))
    _, words = load_model(broken)
    assert words.pad_token_id == words.eos_token_id
    assert len(words) == len(tokenizer())


def test_four_bit_weights(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), num_hidden_layers=2, **sizes)).eval()
    base.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, quantize="nf4", device="cpu")
    assert isinstance(model.model.layers[0].self_attn.q_proj, bnb.nn.Linear4bit)
    ids = torch.tensor([[5, 6, 7]])
    found, exact = model(ids).logits.double().flatten(), base(ids).logits.double().flatten()
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.9
    low = vote.Wrapper(n_voters=3, rank=2, weight_noise=0.0)(model)(ids).logits
    assert_close(low, model(ids).logits, rtol=0.02, atol=0.02)
    with pytest.raises(WrapError, match=r"^model\.layers\.0\.self_attn\.q_proj holds packed .*rank=16"):
        vote.Wrapper(n_voters=3)(model)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere-at-all", "a/b/c"])
def test_an_unknown_folder(name):
    with pytest.raises(LoadError) as error:
        load_model(name)
    text = one_line(error)
    assert repr(name) in text
    assert "config.json" in text


def test_a_folder_that_holds_no_model(tmp_path):
    with pytest.raises(LoadError, match=r"is not a model folder: it has no config\.json and no GGUF file; .*folder$"):
        load_model(tmp_path)


def test_a_file_is_no_folder(model_folder):
    with pytest.raises(LoadError, match=r"no model folder"):
        load_model(model_folder / "config.json")


def test_a_hub_name_without_a_network_says_so():
    with pytest.raises(LoadError) as error:
        load_model("nobody/nothing-at-all")
    assert "hub" in one_line(error)


def test_pickled_weights_are_never_read(broken):
    (broken / "model.safetensors").unlink()
    torch.save(talker().state_dict(), broken / "pytorch_model.bin")
    with pytest.raises(LoadError) as error:
        load_model(broken)
    assert "safetensors" in one_line(error)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("keep", [0, 50])
def test_a_truncated_file(broken, name, keep):
    path = broken / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LoadError) as error:
        load_model(broken)
    assert str(broken) in one_line(error)


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"dtype": "floaty"}])
def test_unknown_options(model_folder, options):
    with pytest.raises(ConfigError) as error:
        load_model(model_folder, **options)
    assert repr(next(iter(options.values()))) in one_line(error)


def test_names_are_told_from_folders(model_folder):
    assert resolve_model(model_folder) == str(model_folder)
    assert resolve_model("someone/some-model") == "someone/some-model"


def test_a_missing_extra_says_what_to_install():
    with pytest.raises(MissingExtraError) as error:
        require("a_package_that_is_not_there", "quant")
    assert one_line(error).endswith('pip install "selfdoubt[quant]"')
