"""GGUF files: a model of one is the model that was written, by whatever name, and a broken one costs one line."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfdoubt import RiskAwareLM, vote
from selfdoubt.errors import BaseMismatchError, ConfigError, LoadError, MissingExtraError
from selfdoubt.lm.adapters.export import export_merged, export_peft
from selfdoubt.lm.adapters.lora import add_lora
from selfdoubt.lm.gguf import fetch_gguf, read_gguf_header
from selfdoubt.lm.load import load_model, load_skeleton, resolve_model
from selfdoubt.serve.chat.page import get_display_name
from selfdoubt.train.config import TrainConfig
from selfdoubt.train.publish import find_licence
from tests import gguf_file, real
from tests.zoo import tokenizer

pytest.importorskip("gguf")

QUESTIONS = ["What is the capital of France?", "Which currency do they use in Japan?"]
TEXT = "São Paulo  is\n\nnot 東京<|end|>\n<|user|>1234 😀"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    gguf_file.write(path)
    return path


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "packed.gguf"
    gguf_file.write(path, kind="Q8_0")
    return path


def fail(name, **options):
    with pytest.raises(LoadError) as error:
        load_model(name, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_the_model_and_the_tokenizer_are_those_that_were_written(file, tmp_path):
    model, words = load_model(file)
    exact, before = gguf_file.write(tmp_path / "again.gguf").state_dict(), tokenizer()
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    state = model.state_dict()
    assert state.keys() == exact.keys()
    assert all(torch.equal(state[name], exact[name]) for name in exact)
    assert words(TEXT).input_ids == before(TEXT).input_ids
    assert words.chat_template == before.chat_template
    assert (words.eos_token, words.bos_token, words.pad_token) == ("<|end|>", "<|bos|>", "<|end|>")
    assert model.config.name_or_path == str(file)


def test_the_tokens_are_those_of_the_model_that_transformers_loads(packed):
    lm = RiskAwareLM.load(packed, dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    assert lm.stop_ids == {words.eos_token_id}
    for question in QUESTIONS:
        answer = lm.generate(question, max_tokens=12)
        messages = [{"role": "user", "content": question}]
        text = words.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        chat = words(text, add_special_tokens=False, return_tensors="pt").input_ids
        ids = model.generate(chat, max_new_tokens=12, do_sample=False)[0, chat.shape[1] :].tolist()
        assert [t.id for t in answer.tokens] == [i for i in ids if i != words.eos_token_id]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16), ("Q8_0", torch.bfloat16)],
)
def test_the_type_is_the_files_or_bfloat16_where_weights_are_packed(tmp_path, kind, dtype):
    gguf_file.write(tmp_path / "x.gguf", kind=kind)
    assert read_gguf_header(tmp_path / "x.gguf").dtype == dtype
    model, _ = load_model(tmp_path / "x.gguf", device="cpu")
    assert model.dtype == (torch.bfloat16 if dtype == torch.float16 else dtype)
    assert load_model(tmp_path / "x.gguf", dtype="float64")[0].dtype == torch.float64


def test_packed_weights_are_near_those_that_were_packed(packed, tmp_path):
    exact = gguf_file.write(tmp_path / "x.gguf").state_dict()
    state = load_model(packed, dtype="float32")[0].state_dict()
    for name, weight in exact.items():
        step = weight.abs().max() / 127  # a block's largest value is 127 steps; a value is off by half a step
        assert (state[name] - weight).abs().max() <= (0.51 * step if weight.ndim > 1 else 0)


def test_every_way_to_name_one(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    named = (str(file), file.name, f"./{file.name}", f"{file.parent}:{file.name}", str(file.parent), f".:{file.name}")
    assert [resolve_model(name) for name in named] == [
        str(file), file.name, file.name, str(file), str(file), file.name,
    ]  # fmt: skip
    assert all(load_skeleton(name).config.vocab_size == len(tokenizer()) for name in named)
    assert resolve_model("org/some-model-GGUF:sub/x-Q4_K_M.gguf") == "org/some-model-GGUF:sub/x-Q4_K_M.gguf"
    assert fetch_gguf("org/some-model") is None


def test_a_file_without_the_suffix_counts_by_its_first_bytes(file, tmp_path):
    shutil.copy(file, tmp_path / "sha256-0123")
    assert load_skeleton(tmp_path / "sha256-0123").config.hidden_size == 64


def test_a_folder_with_a_config_is_the_folder(file, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "both")
    shutil.copy(file, folder)
    assert resolve_model(folder) == str(folder)
    assert load_skeleton(folder).config.hidden_size == 16
    model, words = load_model(folder / file.name)  # and nothing of the folder counts for the file
    assert model.config.hidden_size == 64
    assert words.name_or_path == str(folder / file.name)


def test_several_files_are_named(file, tmp_path):
    for name in ("b-Q8_0.gguf", "a-Q4_K_M.gguf"):
        shutil.copy(file, tmp_path / name)
    text = fail(tmp_path)
    assert "2 GGUF files (a-Q4_K_M.gguf, b-Q8_0.gguf): name one" in text
    assert "there are a-Q4_K_M.gguf, b-Q8_0.gguf" in fail(tmp_path / "c.gguf")
    assert "there are a-Q4_K_M.gguf, b-Q8_0.gguf" in fail(f"{tmp_path}:c.gguf")


def test_a_file_on_the_hub_without_a_network():
    assert "the hub cannot be reached" in fail("nobody/nothing:x.gguf")
    assert "org/name:file.gguf" in fail("nobody/nothing/x.gguf")


@pytest.mark.parametrize("keep", [4, 23, 24, 300, 5000, -1, -2000])
def test_a_truncated_file(file, tmp_path, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:keep])
    text = fail(path)
    assert str(path) in text
    assert "truncated" in text
    assert text.endswith("download it again")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"GG"])
def test_a_file_that_is_something_else(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    assert "is not a GGUF file: it begins with" in fail(tmp_path / "x.gguf")


def test_an_unknown_version(file, tmp_path):
    data = bytearray(file.read_bytes())
    data[4] = 9
    (tmp_path / "x.gguf").write_bytes(data)
    assert "its version is 9" in fail(tmp_path / "x.gguf")


@pytest.mark.parametrize("architecture", ["rwkv7", "clip", "some-new-one"])
def test_an_architecture_that_transformers_cannot_read(tmp_path, architecture):
    gguf_file.write(tmp_path / "x.gguf", architecture=architecture)
    text = fail(tmp_path / "x.gguf")
    assert f"of the architecture {architecture!r}, which transformers" in text
    with pytest.raises(LoadError, match="of the architecture"):
        load_skeleton(tmp_path / "x.gguf")


def test_one_part_of_a_split_model(tmp_path):
    gguf_file.write(tmp_path / "x-00001-of-00003.gguf", split__count=3)
    assert "is one of 3 files of one model; join them" in fail(tmp_path / "x-00001-of-00003.gguf")


def test_missing_weights_are_never_drawn_at_random(tmp_path):
    gguf_file.write(tmp_path / "x.gguf", leave_out="blk.1.ffn_up")
    assert "lacks 1 of the model's weights, as transformers reads it (e.g. model.layers.1.mlp.up_proj.weight" in fail(
        tmp_path / "x.gguf"
    )


def test_four_bit_weights_take_a_folder(file, tmp_path):
    with pytest.raises(ConfigError, match=r"is a GGUF file, whose weights are dequantised: quantize='nf4' takes a fol"):
        load_model(file, quantize="nf4")
    pytest.importorskip("bitsandbytes")
    for part in load_model(file):  # the repair
        part.save_pretrained(tmp_path)
    assert load_model(tmp_path, quantize="nf4", device="cpu")[0].config.hidden_size == 64


def test_the_missing_package_is_named(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"'gguf', which is not installed; .*selfdoubt\[lm\]"):
        load_model(file)


def test_an_adapter_finds_its_base_again_and_checks_it(file, tmp_path):
    wrapper = vote.Wrapper(n_voters=2, rank=2, param_filter="q_proj|v_proj")
    with pytest.warns(match="untrained"):
        lm = RiskAwareLM.load(file, wrapper=wrapper)
    before = lm.generate(QUESTIONS[0], max_tokens=6)
    lm.save(tmp_path / "a")
    again = RiskAwareLM.load(adapter=tmp_path / "a")
    assert again.name == str(file)
    assert again.generate(QUESTIONS[0], max_tokens=6) == before
    assert export_peft(tmp_path / "a", tmp_path / "peft")[1].name == "voter-1"
    other = tmp_path / "other.gguf"
    gguf_file.write(other, norm=1.5)
    with pytest.raises(BaseMismatchError, match="was made for another base"):
        RiskAwareLM.load(other, adapter=tmp_path / "a")


def test_lora_on_one_is_merged_into_a_folder(file, tmp_path):
    pytest.importorskip("peft")
    lm = RiskAwareLM(*load_model(file))
    add_lora(lm.model, r=2, alpha=2.0, targets="q_proj")
    lm.save(tmp_path / "a")
    merged = export_merged(tmp_path / "a", tmp_path / "merged")
    answers = [RiskAwareLM.load(**where).generate(QUESTIONS[0], max_tokens=6).text for where in (
        {"adapter": tmp_path / "a"}, {"name": merged})]  # fmt: skip
    assert answers[0] == answers[1]
    shutil.copy(file, merged / "base.gguf")
    with pytest.raises(ConfigError, match=r"holds .*base\.gguf, which is read to write it"):
        export_merged(tmp_path / "a", merged, base=f"{merged}:base.gguf")


def test_the_licence_and_the_name_that_people_see(file):
    assert find_licence(TrainConfig(data="x.jsonl", out="x", model=str(file))) == "cc0-1.0"
    assert get_display_name(RiskAwareLM.load(file).front) == "tiny.gguf"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2"),
        ("gemma-3-270m.Q4_K_M.gguf", "gemma"),
        ("Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf", "qwen"),
    ],
)
def test_real_files_are_their_folders(name, folder):
    """The folders were made from these files, by transformers, in bfloat16."""
    expected, words = load_model(real.model(folder))
    if not (real.FOLDER / name).is_file():
        pytest.skip(f"{real.FOLDER} has no {name}")
    model, parsed = load_model(real.FOLDER / name)
    state, exact = model.state_dict(), expected.state_dict()
    assert state.keys() == exact.keys()
    assert all(torch.equal(state[key], exact[key]) for key in exact)
    assert parsed(TEXT).input_ids == words(TEXT).input_ids
    assert parsed.chat_template == words.chat_template
    lms = [RiskAwareLM(model, parsed), RiskAwareLM(expected, words)]
    assert lms[0].stop_ids == lms[1].stop_ids
