"""A diagnosis: sizes against closed forms, and advice for each thing that can be wrong."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from selfdoubt import RiskAwareLM, sample, sculpt, vote
from selfdoubt.errors import ConfigError
from selfdoubt.lm.adapters.lora import add_lora
from selfdoubt.lm.doctor import (
    CacheSizes,
    StepTimes,
    WeightSizes,
    advise,
    diagnose,
    find_longest,
    measure_cache_layers,
    measure_weights,
    without_members,
)
from selfdoubt.lm.hardware import Device, list_attention_kernels, read_cpu_memory, read_device
from selfdoubt.rows import Replacement
from tests.zoo import causal, packable, talker, tokenizer

WRAPPERS = {
    "none": None,
    "vote": vote.Wrapper(n_voters=2, rank=2, weight_noise=0.5),
    "sample": sample.Wrapper(n_samples=3),
    "sculpt": sculpt.Wrapper(rank=3),
    "vote over sculpt": None,
}


def wrapped(name):
    if name == "vote over sculpt":
        return vote.Wrapper(n_voters=2, rank=2, param_filter=".*")(sculpt.Wrapper(rank=3)(talker())).eval()
    return talker() if WRAPPERS[name] is None else WRAPPERS[name](talker()).eval()


@pytest.mark.parametrize("name", WRAPPERS)
def test_sizes_are_those_of_the_tensors(name):
    model = wrapped(name)
    sizes, added, added_bytes, read = measure_weights(model)
    base = talker()
    assert sizes.parameters == sum(p.numel() for p in base.parameters())
    assert sizes.bytes == sum(t.nbytes for t in (*base.parameters(), *base.buffers()))
    assert not sizes.quantized
    assert added == sum(p.numel() for p in model.parameters()) - sizes.parameters
    assert added_bytes == 8 * added
    assert read == sizes.bytes + added_bytes - base.get_input_embeddings().weight.nbytes


def test_lora_counts_as_added():
    model = add_lora(packable(), r=2)
    sizes, added, _, _ = measure_weights(model)
    assert sizes.parameters == sum(p.numel() for p in packable().parameters())
    assert added == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_plain_row_is_the_base_and_what_was_replaced_comes_back(name):
    model, ids = wrapped(name), torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits if name != "sample" else None
    with without_members(model) as plain:
        assert not any(isinstance(m, Replacement) for m in plain.modules())
        assert_close(plain(input_ids=ids).logits, talker()(input_ids=ids).logits)
    assert any(isinstance(m, Replacement) for m in model.modules()) == (name != "none")
    if before is not None:
        assert_close(model(input_ids=ids).logits, before)


def test_cache_layers_against_the_config():
    layers = measure_cache_layers(causal("gemma2"), [5, 6, 7])
    size = 2 * 2 * 4 * 8  # keys and values, heads, width, float64
    assert sorted(layers, key=str) == [(size, 5), (size, None)]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.none() | st.integers(1, 30)), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 900),
    st.integers(1, 60),
)
def test_the_longest_context_is_the_last_that_fits(layers, rows, free, context):
    def used(length):
        return rows * sum(size * min(length, window or length) for size, window in layers)

    expected = max(length for length in range(context + 1) if used(length) <= free)
    assert find_longest(layers, rows, free, context) == expected


def test_a_diagnosis_of_the_pocket():
    lm = RiskAwareLM.load("pocket")
    diagnosis = diagnose(lm, batch=4, steps=2)
    config = lm.model.module.config
    row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert diagnosis.cache.bytes_per_1000_tokens == 1000 * row * next(lm.model.parameters()).element_size()
    assert diagnosis.cache.members == lm.model.spec.n_voters
    assert diagnosis.cache.longest_alone == diagnosis.cache.context == config.max_position_embeddings
    assert diagnosis.wrapper == "vote(rank=16, weight_noise=0.5)"
    assert diagnosis.steps.measured > 0
    assert diagnosis.steps.plain > 0
    assert diagnosis.steps.share == pytest.approx(diagnosis.steps.predicted / diagnosis.steps.measured)
    assert diagnosis.steps.bytes_read > diagnosis.weights.bytes
    assert (
        json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))["graphs"]["note"]
        == "steps are eager, graphs need a CUDA GPU"
    )


def test_a_plain_model_without_members():
    diagnosis = diagnose(RiskAwareLM(talker(), tokenizer()), steps=1)
    assert (diagnosis.wrapper, diagnosis.added_parameters, diagnosis.cache.members) == ("none", 0, 1)


@pytest.mark.parametrize(("settings", "message"), [
    ({"batch": 0}, "batch must be a whole number between 1 and 4096, got 0"),
    ({"steps": True}, "steps must be"),
    ({"steps": 300}, "300 steps do not fit the model's context of 256 tokens; use fewer steps"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        diagnose(RiskAwareLM(talker(), tokenizer()), **settings)


DEVICE = Device("cpu", "a CPU", 10**10, 10**10, 1e10, 4, 4, ("amx_bf16",), ("flash", "math"))
GPU = Device("cuda", "a GPU", 10**11, 10**11, 4e12, None, None, ("tensor cores",), ("flash", "mem-efficient", "math"))
WEIGHTS = WeightSizes(10**9, 2 * 10**9, {"bfloat16": 2 * 10**9}, quantized=False)
CACHE = CacheSizes(10**6, 3, 8192, 8192, 32, 8192)
STEPS = StepTimes(10**9, 0.8, 1.0, 1.1, 0.73, 100.0)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, None),
        ({"dtype": "float32"}, "--dtype bfloat16: this CPU computes it"),
        ({"dtype": "float16"}, "--dtype bfloat16: float16 is emulated"),
        ({"device": replace(DEVICE, bf16=())}, "--dtype float32"),
        ({"device": replace(DEVICE, threads=1)}, "OMP_NUM_THREADS=4"),
        ({"attention": "eager"}, "sdpa"),
        ({"cache": replace(CACHE, longest_in_batch=1024)}, "^serve --batch 8: 32 sequences of 4096 tokens"),
        ({"steps": replace(STEPS, measured=2.0)}, "fewer members .* 2.0 times"),
        ({"added_bytes": 10**9}, "vote:rank=16.* 50% to what a step reads"),
        ({"device": GPU}, None),
        ({"device": GPU, "steps": replace(STEPS, share=0.1)}, "several requests at once .* 10%"),
        ({"device": GPU, "cache": replace(CACHE, longest_in_batch=1024)}, "--quantize nf4, or serve --batch 8"),
    ],
)
def test_each_thing_that_can_be_wrong_has_its_advice(changes, advice):
    given = {
        "device": DEVICE, "dtype": "bfloat16", "attention": "sdpa", "weights": WEIGHTS, "cache": CACHE, "steps": STEPS,
    }  # fmt: skip
    found = advise(**(given | changes))
    assert len(found) == (advice is not None)
    if advice is not None:
        assert re.search(advice, found[0])


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "meta", "mps:x"])
def test_devices_that_are_not_there_are_one_line(name):
    with pytest.raises(ConfigError, match="cpu") as raised:
        read_device(name)
    assert "\n" not in str(raised.value)


def test_free_memory_is_part_of_all():
    total, free = read_cpu_memory()
    assert 0 < free <= total
    assert list_attention_kernels("cpu") == ("flash", "math")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_diagnosis_on_a_gpu():
    diagnosis = diagnose(RiskAwareLM.load("pocket", device="cuda"), batch=4, steps=4)
    assert diagnosis.device.kind == "cuda"
    assert diagnosis.device.bandwidth > 1e11
    assert 0 < diagnosis.steps.share < 1
    assert diagnosis.device.attention
