"""LoRA in place: what trains, what is written, what plain PEFT makes of it, and what merging gives."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import selfdoubt
from selfdoubt import RiskAwareLM, sample, sculpt, storage, vote
from selfdoubt.errors import BaseMismatchError, ConfigError, LoadError, TargetError, WrapError
from selfdoubt.lm.adapters.adapter import load_adapter, save_adapter
from selfdoubt.lm.adapters.lora import add_lora, has_lora, list_lora_names, load_lora, merge_lora, save_lora
from tests.zoo import causal, packable, prompts, talker, tokenizer

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks by the old name

IDS = torch.tensor(prompts(6, 6))
WRAPPERS = {
    "none": lambda model: model,
    "sample": sample.Wrapper(n_samples=3),
    "sample-trainable": sample.Wrapper(n_samples=2, distribution=sample.Normal(0.3, trainable=True)),
    "sculpt": sculpt.Wrapper(),
    "sample-sculpt": lambda model: sample.Wrapper(n_samples=2)(sculpt.Wrapper()(model)),
    "vote": vote.Wrapper(n_voters=2, rank=2),
}


def fresh(family="llama", dtype=torch.float64):
    return copy.deepcopy(causal(family)).to(dtype)


def shaken(model):
    """The same, as if it had been trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def trained(family="llama", dtype=torch.float64, **options):
    return shaken(add_lora(fresh(family, dtype), **{"r": 4, "alpha": 6.0} | options))


def logits(model):
    with torch.no_grad():
        if isinstance(model, selfdoubt.Wrapped):
            return model.forecast(input_ids=IDS)["logits"].members
        return model(input_ids=IDS).logits


def plain_peft(folder, family="llama", dtype=torch.float64):
    return peft.PeftModel.from_pretrained(fresh(family, dtype), str(folder)).eval()


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_fresh_lora_changes_nothing_trains_alone_and_leaves_the_head(family):
    model = fresh(family)
    kind = type(model)
    assert add_lora(model, r=4, alpha=8.0) is model
    assert type(model) is kind
    assert torch.equal(logits(model), logits(causal(family)))
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert training == list_lora_names(model)
    layers = {name.partition(".lora_")[0] for name in training}
    linear = {
        name
        for name, m in causal(family).named_modules()
        if (isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D")
        and m is not causal(family).get_output_embeddings()
    }
    assert layers == linear


def test_targets_are_a_regex_over_parameter_names():
    model = add_lora(fresh(), r=2, targets=r"layers\.1\.self_attn\.[qv]_proj")
    assert {n.partition(".lora_")[0] for n in list_lora_names(model)} == {
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    }  # fmt: skip
    with pytest.raises(TargetError) as error:
        add_lora(fresh(), targets="q_porj")
    assert "LoRA's targets='q_porj' matches none of the" in one_line(error)
    assert "try targets='q_proj'" in one_line(error)
    with pytest.raises(WrapError, match=r"and model\.layers\.0\.input_layernorm is LlamaRMSNorm; narrow the regex"):
        add_lora(fresh(), targets="input_layernorm")


def test_lora_trains_beneath_noise_and_nothing_else_does():
    model = add_lora(fresh(), r=2)
    wrapped = sample.Wrapper(n_samples=2)(model)
    wrapped(input_ids=IDS, training=True).logits.square().mean().backward()
    moved = {name for name, p in wrapped.named_parameters() if p.grad is not None}
    assert moved == list_lora_names(wrapped)
    assert len(moved) == len(list_lora_names(model)) == 28


@pytest.mark.parametrize(
    ("options", "words"), [({"r": 0}, "rank must be at least 1, got 0"), ({"dropout": 1.0}, "below 1, got 1.0")]
)
def test_settings_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        add_lora(fresh(), **options)


def test_half_precision_keeps_float32_lora():
    model = trained(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("wrapper", ["none", "sample", "sample-sculpt"])
def test_plain_peft_reads_what_is_written(tmp_path, family, wrapper):
    model = trained(family)
    save_lora(WRAPPERS[wrapper](model), tmp_path, base="me/base")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert torch.equal(plain_peft(tmp_path, family)(input_ids=IDS).logits, logits(model))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("me/base", 4, 6)
    assert config["target_modules"] == sorted(config["target_modules"])
    again = load_lora(fresh(family), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert all(
        p.requires_grad == (n in list_lora_names(again))
        for n, p in load_lora(fresh(family), tmp_path, trainable=True).named_parameters()
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("targets", ["embed_tokens|wte|embed_in", "embed_tokens|wte|embed_in|q_proj|c_attn|query_key"])
@pytest.mark.parametrize("wrapper", ["none", "sample"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")  # plain PEFT's, of merging
def test_lora_on_embeddings_is_exact_and_answers(tmp_path, family, targets, wrapper):
    model = WRAPPERS[wrapper](trained(family, targets=targets))
    assert any("lora_embedding_A" in name for name in list_lora_names(model))
    save_adapter(model, tmp_path)
    again = load_adapter(fresh(family), tmp_path)
    assert torch.equal(logits(again), logits(model))
    bare = load_lora(fresh(family), tmp_path)
    assert torch.equal(plain_peft(tmp_path, family)(input_ids=IDS).logits, logits(bare))
    assert RiskAwareLM(again, tokenizer()).front.vocabulary == causal(family).get_input_embeddings().num_embeddings


def test_lora_of_plain_peft_on_an_embedding_is_read(tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "v_proj"])
    theirs = shaken(peft.get_peft_model(fresh(), config)).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits(load_adapter(fresh(), tmp_path)), logits(theirs))
    voters = load_adapter(fresh(), tmp_path, vote.Wrapper(n_voters=2, rank=2, param_filter="embed_tokens"))
    assert RiskAwareLM(voters, tokenizer()).front.vocabulary == 61


def test_what_plain_peft_writes_is_read(tmp_path):
    config = peft.LoraConfig(r=3, use_dora=True, use_rslora=True, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(fresh(), config)
    shaken(theirs).eval().save_pretrained(tmp_path)
    assert has_lora(tmp_path)
    assert_close(logits(load_lora(fresh(), tmp_path)), logits(theirs))
    # Without selfdoubt.json: with any wrapper, or without.
    assert_close(logits(load_adapter(fresh(), tmp_path)), logits(theirs))
    voters = load_adapter(fresh(), tmp_path, vote.Wrapper(n_voters=2, rank=2, weight_noise=0.0))
    assert_close(logits(voters)[1], logits(theirs))


@pytest.mark.parametrize("name", WRAPPERS)
def test_an_adapter_folder_gives_what_was_saved(tmp_path, name):
    model = shaken(WRAPPERS[name](trained()))
    folder = save_adapter(model, tmp_path / "new", base="me/base", extra={"reference": {"a": [1.0]}})
    again = load_adapter(fresh(), folder)
    assert torch.equal(logits(again), logits(model))
    manifest = storage.read_manifest(folder)
    assert manifest["lora"] is True
    assert manifest["reference"] == {"a": [1.0]}
    # LoRA is stored once.
    added = load_file(folder / "added.safetensors") if name != "none" else {}
    assert not [n for n in added if "lora_" in n]
    assert (folder / "added.safetensors").exists() == (name != "none")
    # Saving what was loaded, which is frozen, says the same.
    twice = save_adapter(again, tmp_path / "twice", base="me/base", extra={"reference": {"a": [1.0]}})
    for file in folder.iterdir():
        assert (twice / file.name).read_bytes() == file.read_bytes(), file.name


def test_saving_another_adapter_leaves_nothing_of_the_old_one(tmp_path):
    save_adapter(trained(), tmp_path)
    voters = vote.Wrapper(n_voters=2, rank=2)(fresh())
    save_adapter(voters, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["added.safetensors", "selfdoubt.json"]
    assert torch.equal(logits(load_adapter(fresh(), tmp_path)), logits(voters))
    save_adapter(trained(), tmp_path)
    assert "added.safetensors" not in {f.name for f in tmp_path.iterdir()}


def test_a_folder_that_was_cut_off_is_no_adapter(tmp_path, monkeypatch):
    save_adapter(vote.Wrapper(n_voters=2, rank=2)(fresh()), tmp_path)
    monkeypatch.setattr(storage, "save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(sample.Wrapper()(trained()), tmp_path)
    assert not (tmp_path / "selfdoubt.json").exists()


def test_nothing_to_save(tmp_path):
    with pytest.raises(WrapError, match=r"^LlamaForCausalLM is not wrapped, so there is nothing to save"):
        save_adapter(fresh(), tmp_path)
    with pytest.raises(ConfigError, match=r"^the model has no LoRA to save"):
        save_lora(fresh(), tmp_path)


def test_the_core_says_where_lora_is_loaded(tmp_path):
    save_adapter(sample.Wrapper()(trained()), tmp_path / "a")
    with pytest.raises(
        LoadError, match=r"has LoRA beneath its wrapper, and the model has none yet: .*RiskAwareLM\.load"
    ):
        selfdoubt.load(tmp_path / "a", fresh())
    save_adapter(model := trained(), tmp_path / "b")
    with pytest.raises(LoadError, match=r"brings no wrapper .*: load it with RiskAwareLM\.load"):
        selfdoubt.load(tmp_path / "b", model)


def test_another_base(tmp_path):
    save_adapter(trained(), tmp_path, base="me/base")
    for other in (fresh("gpt2"), fresh("gpt_neox")):
        with pytest.raises(BaseMismatchError) as error:
            load_adapter(other, tmp_path)
        assert "made for another base model than this (me/base)" in one_line(error)
    shallow = fresh()
    del shallow.model.layers[1]
    with pytest.raises(BaseMismatchError, match=r"than this \(me/base\): it has .*layers\.1.*, which the model lacks"):
        load_adapter(shallow, tmp_path)
    weights = fresh()
    weights.model.norm.weight.data += 1
    with pytest.raises(BaseMismatchError, match=r"model\.norm\.weight differs; load it onto me/base$"):
        load_adapter(weights, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name, wide = next(iter(tensors.items()))
    save_file(tensors | {name: torch.cat([wide, wide], 1)}, tmp_path / "adapter_model.safetensors")
    storage.stamp(tmp_path)
    with pytest.raises(BaseMismatchError) as error:
        load_adapter(fresh(), tmp_path)
    assert "size mismatch" in one_line(error)
    save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "adapter_model.safetensors")
    storage.stamp(tmp_path)
    with pytest.raises(BaseMismatchError, match=r"it lacks model\.layers\.\d"):
        load_adapter(fresh(), tmp_path)


@pytest.mark.parametrize("with_manifest", [True, False])
@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("adapter_config.json", b"{", r"adapter_config\.json is broken"),
        ("adapter_config.json", b"[]", r"adapter_config\.json is broken"),
        ("adapter_config.json", b"\xff", r"adapter_config\.json is broken"),
        ("adapter_config.json", b'{"peft_type": "IA3"}', "type IA3, and only LORA can be loaded"),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": "x"}', "another base model|broken"),
        ("adapter_config.json", b'{"peft_type": "LORA", "bias": "all"}', "also trains weights of the base"),
        ("adapter_config.json", b'{"peft_type": "LORA", "modules_to_save": ["lm_head"]}', "also trains weights"),
        ("adapter_model.safetensors", b"", r"adapter_model\.safetensors (cannot be read|was changed)"),
        ("adapter_model.safetensors", None, "download it again"),
    ],
)
def test_broken_files_of_peft_get_one_line(tmp_path, file, data, words, with_manifest):
    save_adapter(trained(), tmp_path)
    if not with_manifest:
        (tmp_path / "selfdoubt.json").unlink()
    (tmp_path / file).unlink() if data is None else (tmp_path / file).write_bytes(data)
    with pytest.raises(LoadError, match=words) as error:
        load_adapter(fresh(), tmp_path)
    one_line(error)


def test_a_card_that_says_lora_needs_its_files(tmp_path):
    save_adapter(trained(), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(LoadError, match=r"holds no LoRA: it has no adapter_config\.json"):
        load_adapter(fresh(), tmp_path)


def test_a_card_beside_somebody_elses_lora(tmp_path):
    save_lora(trained(), tmp_path)
    selfdoubt.save(vote.Wrapper(n_voters=2, rank=2)(fresh()), tmp_path)
    with pytest.raises(LoadError, match=r"knows of no LoRA, so one of them belongs elsewhere"):
        load_adapter(fresh(), tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("wrapper", ["none", "sample", "sculpt", "sample-sculpt"])
def test_merging_changes_no_output(family, wrapper):
    model = WRAPPERS[wrapper](trained(family))
    before = logits(model)
    assert merge_lora(model) is model
    assert_close(logits(model), before, rtol=1e-10, atol=1e-10)
    assert not list_lora_names(model)
    with pytest.raises(ConfigError, match=r"^the model has no LoRA to merge"):
        merge_lora(model)


def test_merging_is_refused_where_it_would_be_wrong():
    tied = fresh("llama")
    tied.lm_head.weight = tied.model.embed_tokens.weight
    tied = shaken(add_lora(tied, r=2, targets="lm_head"))
    with pytest.raises(WrapError, match=r"^the weight of lm_head is tied to another layer's"):
        merge_lora(tied)
    broken = trained()
    next(p for p in broken.parameters() if p.requires_grad).data.fill_(torch.nan)
    with pytest.raises(WrapError, match=r"cannot be merged \(NaNs detected"):
        merge_lora(broken)


def test_lora_goes_in_once():
    with pytest.raises(ConfigError, match=r"^the model has LoRA already: merge it first"):
        add_lora(trained(), r=2)
    add_lora(merge_lora(trained()), r=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    talker().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.filterwarnings("ignore::selfdoubt.errors.UntrainedWarning")
@pytest.mark.parametrize("name", ["none", "sample", "sculpt"])
def test_a_language_model_loads_base_lora_and_wrapper(folder, tmp_path, name):
    model = WRAPPERS[name](shaken(add_lora(copy.deepcopy(talker()), r=4)))
    save_adapter(model, tmp_path, base=str(folder), extra={"reference": {"sum_nll": [0.0, 1e9]}})
    lm = RiskAwareLM.load(folder, adapter=tmp_path)
    expected = RiskAwareLM(model.eval(), tokenizer())
    found = lm.generate("What is this?", max_tokens=6)
    assert found.text == expected.generate("What is this?", max_tokens=6).text
    assert found.risk == pytest.approx(expected.generate("What is this?", max_tokens=6).risk)
    assert lm.reference == {"sum_nll": [0.0, 1e9]}
    assert not any(p.requires_grad for n, p in lm.model.named_parameters() if "lora_" in n)
    with pytest.raises(ConfigError, match=r"^an adapter brings its own wrapper"):
        RiskAwareLM.load(folder, adapter=tmp_path, wrapper=sample.Wrapper())
    (tmp_path / "selfdoubt.json").unlink()
    plain = RiskAwareLM.load(folder, adapter=tmp_path)
    assert not isinstance(plain.model, selfdoubt.Wrapped)
    assert RiskAwareLM.load(folder, adapter=tmp_path, wrapper=sample.Wrapper(n_samples=2)).model.spec.n_samples == 2


def test_lora_beside_packed_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    packable().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")

    def load(**options):
        return RiskAwareLM.load(tmp_path / "base", quantize="nf4", device="cpu", **options).model

    model = shaken(add_lora(load(wrapper=None), r=4))
    assert len(list_lora_names(model)) == 28
    save_adapter(sample.Wrapper(n_samples=2)(model), tmp_path / "adapter")
    again = load(adapter=tmp_path / "adapter")
    assert_close(logits(again), logits(sample.Wrapper(n_samples=2)(model.eval())))
    assert not torch.equal(logits(again), logits(sample.Wrapper(n_samples=2)(load(wrapper=None))))
    with pytest.raises(WrapError, match=r"^LoRA cannot be merged into the packed weights of model\.layers\.0"):
        merge_lora(again)
    assert len(list_lora_names(again)) == 28
    # The same adapter beside the unpacked base.
    assert len(list_lora_names(RiskAwareLM.load(tmp_path / "base", adapter=tmp_path / "adapter").model)) == 28
