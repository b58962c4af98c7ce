"""Adapters as other tools want them: what plain PEFT makes of each voter, and what a merged model answers."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from selfdoubt import RiskAwareLM, sample, sculpt, storage, vote
from selfdoubt.errors import BaseMismatchError, ConfigError, LoadError, UploadError, WrapError
from selfdoubt.lm.adapters.adapter import save_adapter
from selfdoubt.lm.adapters.export import export_merged, export_peft
from selfdoubt.lm.adapters.lora import add_lora
from selfdoubt.lm.adapters.new_folder import MARK, check_upload, new_folder, upload
from selfdoubt.lm.load import load_model
from tests.zoo import causal, mlp, packable, prompts, talker, tokenizer

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft asks by the old name
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),  # and has one setting for both kinds of linear layers
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),  # a head's voters leave the embedding alone
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),  # voters are not merged
]

IDS = torch.tensor(prompts(6, 6))
VOTERS = {
    "low rank": vote.Wrapper(n_voters=3, rank=4, weight_noise=0.5),
    "scaled": vote.Wrapper(n_voters=2, rank=3, weight_noise=0.5, alpha=-0.7),
    "all layers": vote.Wrapper(n_voters=2, rank=2, param_filter=r"(attn|mlp|attention)\..*weight"),
    "some layers": vote.Wrapper(n_voters=2, rank=2, param_filter=r"\.1\..*(q_proj|c_attn|query_key_value)\.weight"),
}
LARGE = {
    "full": vote.Wrapper(n_voters=2, weight_noise=0.5),
    "full everywhere": vote.Wrapper(n_voters=2, param_filter=r"(attn|mlp|attention)\..*weight", alpha=2.0),
}


def shaken(model):
    """The same, as if it had been trained."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def members(wrapped):
    with torch.no_grad():
        return wrapped.forecast(input_ids=IDS)["logits"].members


def with_peft(base, folder):
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(input_ids=IDS).logits


def assert_voters(wrapped, base, folders):
    expected = members(wrapped)
    assert len(folders) == len(expected)
    for logits, folder in zip(expected, folders, strict=True):
        assert sorted(f.name for f in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        assert_close(with_peft(base, folder), logits, rtol=1e-10, atol=1e-10)


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("name", VOTERS)
def test_plain_peft_gives_each_voters_logits(tmp_path, family, name):
    wrapped = shaken(VOTERS[name](causal(family)))
    folders = export_peft(wrapped, tmp_path / "out", base="me/base")
    assert_voters(wrapped, causal(family), folders)
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"
    assert config["lora_alpha"] / config["r"] == pytest.approx(wrapped.spec.alpha)
    assert config["r"] == wrapped.spec.rank
    if name != "some layers":
        assert not [t for t in config["target_modules"] if "." in t]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", LARGE)
def test_full_deviations_are_exact_too_and_said_to_be_large(tmp_path, family, name):
    wrapped = shaken(LARGE[name](causal(family)))
    with pytest.warns(UserWarning, match=r"^full deviations become LoRA of rank 16, \d.* MiB a voter"):
        folders = export_peft(wrapped, tmp_path / "out")
    assert_voters(wrapped, causal(family), folders)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.filterwarnings("ignore:full deviations become LoRA")
def test_embeddings_and_heads(tmp_path, rank):
    wrapped = shaken(vote.Wrapper(n_voters=2, rank=rank, param_filter="embed_tokens|v_proj|lm_head")(causal("llama")))
    assert_voters(wrapped, causal("llama"), export_peft(wrapped, tmp_path / "out"))


def test_a_sculpt_inside_changes_no_voter(tmp_path):
    inside = sculpt.Wrapper()(causal("llama"))
    wrapped = shaken(vote.Wrapper(n_voters=2, rank=2, param_filter="v_proj|lm_head.leaf")(inside))
    assert_voters(wrapped, causal("llama"), export_peft(wrapped, tmp_path / "out"))


def test_models_that_are_no_language_models(tmp_path):
    wrapped = shaken(vote.Wrapper(n_voters=2, rank=2)(base := mlp()))
    x = torch.randn(5, 4, dtype=torch.float64)
    expected = wrapped.forecast(x).members
    for logits, folder in zip(expected, export_peft(wrapped, tmp_path / "out"), strict=True):
        assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder))(x), logits)


def saved(path, model, words=None):
    model.save_pretrained(path)
    (words or tokenizer()).save_pretrained(path)
    return path


@pytest.mark.parametrize("wrapper", ["vote", "vote-sculpt"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_of_voters_needs_no_weights_of_the_base(tmp_path, family, wrapper):
    base = causal(family)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    wrapped = vote.Wrapper(n_voters=2, rank=2)(base) if wrapper == "vote" else (
        vote.Wrapper(n_voters=2, rank=2, param_filter=r"v_proj|c_attn|lm_head\.leaf")(sculpt.Wrapper()(base))
    )  # fmt: skip
    shaken(wrapped)
    adapter = save_adapter(wrapped, tmp_path / "adapter", base=str(tmp_path / "base"))
    folders = export_peft(adapter, tmp_path / "out")
    assert_voters(wrapped, base, folders)
    direct = export_peft(wrapped, tmp_path / "direct", base=str(tmp_path / "base"))
    for a, b in zip(folders, direct, strict=True):
        assert all((b / file.name).read_bytes() == file.read_bytes() for file in a.iterdir())


def test_voters_beside_packed_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = saved(tmp_path / "base", packable())

    def packed():
        return load_model(base, quantize="nf4", device="cpu")[0]

    wrapped = shaken(vote.Wrapper(n_voters=2, rank=4, weight_noise=0.5)(packed()))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:  # PEFT computes in float32
            parameter.data = parameter.data.float()
    expected = members(wrapped)
    for logits, path in zip(expected, export_peft(wrapped, tmp_path / "out"), strict=True):
        assert_close(with_peft(packed(), path), logits, rtol=1e-3, atol=1e-3)
    assert (expected[0] - expected[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (lambda m: m, "only voters become PEFT adapters, and this is a plain LlamaForCausalLM"),
        (lambda m: sample.Wrapper()(m), r"only voters become PEFT adapters, and this is Wrapper\(n_samples"),
        (lambda m: vote.Wrapper(finetune=False, param_filter="q_proj")(m), "train with finetune=True"),
        (lambda m: vote.Wrapper(rank=2, param_filter="v_proj|input_layernorm")(m), "layernorm is LlamaRMSNorm"),
        (lambda m: vote.Wrapper(rank=2, param_filter="v_proj")(shaken(add_lora(m, r=2))), "voters on top of LoRA"),
        (lambda m: vote.Wrapper(rank=2, param_filter="branch")(sculpt.Wrapper()(m)), "which another wrapper added"),
    ],
)
def test_what_no_peft_adapter_can_hold_is_refused(tmp_path, wrap, words):
    with pytest.raises(WrapError, match=words) as error:
        export_peft(wrap(copy.deepcopy(causal("llama"))), tmp_path / "out")
    one_line(error)
    assert not list(tmp_path.iterdir())


def test_biases_and_embeddings_do_not_go_together(tmp_path):
    wrapped = vote.Wrapper(rank=2, param_filter="embed_tokens|q_proj")(causal("qwen2"))
    with pytest.raises(WrapError, match=r"biases together with those of the embedding model\.embed_tokens"):
        export_peft(wrapped, tmp_path / "out")


def test_folders_that_do_not_fit(tmp_path, model_folder):
    wrapped = vote.Wrapper(n_voters=2, rank=2)(talker())
    adapter = save_adapter(wrapped, tmp_path / "adapter", base=str(model_folder))
    other = tmp_path / "other"
    causal("gpt2").save_pretrained(other)
    with pytest.raises(BaseMismatchError, match=r"it deviates in model\.layers\.0.*, which the model lacks"):
        export_peft(adapter, tmp_path / "out", base=str(other))
    tensors = load_file(adapter / "added.safetensors")
    save_file({n: t[:, :, :5].contiguous() for n, t in tensors.items()}, adapter / "added.safetensors")
    storage.stamp(adapter)
    with pytest.raises(BaseMismatchError, match=r"is \(2, 2, 5\), and the model wants \(2, 2, 16\)"):
        export_peft(adapter, tmp_path / "out")
    with pytest.raises(LoadError, match=r"no model folder at"):
        export_peft(adapter, tmp_path / "out", base="./nowhere")
    nameless = save_adapter(wrapped, tmp_path / "nameless")
    with pytest.raises(ConfigError, match=r"does not say which model it was made for; name it"):
        export_peft(nameless, tmp_path / "out")
    noisy = save_adapter(sample.Wrapper()(talker()), tmp_path / "noisy", base=str(model_folder))
    with pytest.raises(WrapError, match=r"only voters become PEFT adapters, and .*noisy holds Wrapper"):
        export_peft(noisy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def trained():
    return shaken(add_lora(copy.deepcopy(talker()), r=4))


def test_lora_is_exported_as_it_is(tmp_path, model_folder):
    adapter = save_adapter(sample.Wrapper()(model := trained()), tmp_path / "adapter", base=str(model_folder))
    assert export_peft(adapter, tmp_path / "out") == [tmp_path / "out"]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", MARK,
    ]  # fmt: skip
    with torch.no_grad():
        assert torch.equal(with_peft(talker(), tmp_path / "out"), model(input_ids=IDS).logits)


WRAPPERS = {
    "none": lambda model: model,
    "sample": sample.Wrapper(n_samples=3),
    "sample-trainable": sample.Wrapper(n_samples=2, distribution=sample.Normal(0.3, trainable=True)),
    "sculpt": sculpt.Wrapper(),
    "sample-sculpt": lambda model: sample.Wrapper(n_samples=2)(sculpt.Wrapper()(model)),
    "vote": vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_merged_model_answers_as_before(tmp_path, model_folder, name):
    adapter = save_adapter(
        shaken(WRAPPERS[name](trained())), tmp_path / "adapter", base=str(model_folder),
        extra={"reference": {"sum_nll": [0.0, 9.0]}},
    )  # fmt: skip
    out = export_merged(adapter, tmp_path / "out")
    before = RiskAwareLM.load(model_folder, adapter=adapter)
    after = RiskAwareLM.load(out, adapter=out / "adapter")
    assert not [n for n in after.model.state_dict() if "lora_" in n]
    a, b = (lm.generate("What is the capital?", max_tokens=8, temperature=1.0) for lm in (before, after))
    assert a.text == b.text
    assert dict(a.scores) == pytest.approx(dict(b.scores), rel=1e-6, abs=1e-9)
    manifest = storage.read_manifest(out / "adapter")
    assert "lora" not in manifest
    assert manifest["reference"] == {"sum_nll": [0.0, 9.0]}
    assert manifest["base"]["name"] == str(out)


def test_without_wrapper_and_reference_a_merged_model_stands_alone(tmp_path, model_folder):
    adapter = save_adapter(shaken(trained()), tmp_path / "adapter", base=str(model_folder))
    out = export_merged(adapter, tmp_path / "out")
    assert not (out / "adapter").exists()
    assert RiskAwareLM.load(out, wrapper=None).generate("Why?", max_tokens=2).risk >= 0


def test_voters_on_lora_become_peft_adapters_of_the_merged_model(tmp_path, model_folder):
    wrapped = shaken(WRAPPERS["vote"](trained()))
    adapter = save_adapter(wrapped, tmp_path / "adapter", base=str(model_folder))
    with pytest.raises(WrapError, match=r"merge the LoRA first"):
        export_peft(adapter, tmp_path / "voters")
    merged = export_merged(adapter, tmp_path / "merged")
    assert_voters(wrapped, load_model(merged, device="cpu")[0], export_peft(merged / "adapter", tmp_path / "voters"))


def test_plain_peft_is_merged_too(tmp_path, model_folder):
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"])
    theirs = shaken(peft.get_peft_model(load_model(model_folder, device="cpu")[0], config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    merged = load_model(export_merged(tmp_path / "theirs", tmp_path / "out"), device="cpu")[0]
    assert_close(merged(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_the_float_type_of_a_merged_model(tmp_path, model_folder):
    adapter = save_adapter(trained(), tmp_path / "adapter", base=str(model_folder))
    assert load_model(export_merged(adapter, tmp_path / "out", dtype="bfloat16"))[0].dtype == torch.bfloat16


def test_what_cannot_be_merged(tmp_path, model_folder):
    voters = save_adapter(vote.Wrapper(rank=2)(talker()), tmp_path / "voters", base=str(model_folder))
    with pytest.raises(WrapError, match=r"has no LoRA to merge; voters become PEFT adapters instead"):
        export_merged(voters, tmp_path / "out")
    exact = sample.Wrapper(param_filter=r"base_layer|lora_A")(trained())
    picky = save_adapter(exact, tmp_path / "picky", base=str(model_folder))
    with pytest.raises(LoadError, match=r"does not fit LlamaForCausalLM: .*matches none"):
        export_merged(picky, tmp_path / "out")
    some = sample.Wrapper(param_filter=r"lora_A|layers\.0\.")(trained())
    picky = save_adapter(some, tmp_path / "some", base=str(model_folder))
    with pytest.raises(ConfigError, match=r"picks other layers once LoRA is merged \(as module\.model\.layers\.1"):
        export_merged(picky, tmp_path / "out")
    assert not [f.name for f in tmp_path.iterdir() if "out" in f.name]


def test_a_new_folder_is_whole_or_not_there(tmp_path):
    def fail():
        with new_folder(tmp_path / "a" / "b", {}) as new:
            (new / "half").write_text("x")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert not list((tmp_path / "a").iterdir())
    for text in ("one", "two"):  # an export may be replaced
        with new_folder(tmp_path / "out", {"kind": "test"}) as new:
            (new / text).write_text(text)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [MARK, "two"]
    assert json.loads((tmp_path / "out" / MARK).read_text())["kind"] == "test"
    assert [f.name for f in tmp_path.iterdir()] in (["a", "out"], ["out", "a"])


def test_a_new_folder_takes_nobodys_place(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, words in {"full": r"is not empty, and nothing exported it", "file": r"is a file"}.items():
        with pytest.raises(ConfigError, match=words), new_folder(tmp_path / name, {}):
            pass
    assert (tmp_path / "full" / "mine").exists()
    with new_folder(tmp_path / "out", {}):
        pass
    (tmp_path / "out" / "adapter").mkdir()
    for source in (tmp_path / "out", tmp_path / "out" / "adapter"):
        with (
            pytest.raises(ConfigError, match=r"which is read to write it"),
            new_folder(tmp_path / "out", {}, (source,)),
        ):
            pass
    with pytest.raises(ConfigError, match=r"cannot be written"), new_folder(tmp_path / "file" / "below", {}):
        pass


def test_uploading_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    for name in ("me", "me/", "me/a/b", "./a", "me/a b"):
        with pytest.raises(ConfigError, match=r"^a name on the hub looks like user/name"):
            check_upload(name)
    with pytest.raises(UploadError) as error:
        upload(tmp_path, "me/model")
    assert "and uploading it to me/model failed (OfflineModeIsEnabled" in one_line(error)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match=r"^uploading needs a token: set HF_TOKEN"):
        check_upload("me/model")


def test_uploading_makes_the_repository_and_fills_it(tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, name, exist_ok):
            calls.append((name, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, repo_id, folder_path, ignore_patterns):
            calls.append((repo_id, folder_path))
            assert ignore_patterns is None

    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert upload(tmp_path, "me/model") == "https://hub/me/model"
    assert calls == [("me/model", True), ("me/model", str(tmp_path))]
