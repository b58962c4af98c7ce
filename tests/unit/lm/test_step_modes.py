"""Step modes: their choice by device, attention without cuDNN, and models that cannot be static."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
import transformers

from selfdoubt import RiskAwareLM, vote
from selfdoubt.errors import ConfigError, SlowWarning
from selfdoubt.lm.answer_from import set_answer_from
from selfdoubt.lm.attention_backends import steady_attention
from selfdoubt.lm.decoding import StepMemory, find_decoder, measure_step_memory, start_decoding
from selfdoubt.lm.static.check import compare_static_step
from selfdoubt.lm.static.decoder import StaticDecoder
from selfdoubt.lm.static.slots import choose_bucket
from selfdoubt.lm.step_modes import check_step_mode, choose_step_mode
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.wrapping import innermost
from tests import zoo
from tests.plain import run


def speaker(**settings):
    return RiskAwareLM(zoo.talker(), zoo.tokenizer(), **settings)


def test_auto_captures_on_a_gpu_only():
    assert choose_step_mode("auto", torch.device("cpu")) == "eager"
    assert choose_step_mode("auto", torch.device("cuda")) == "captured"
    assert choose_step_mode("compiled", torch.device("cpu")) == "compiled"
    with pytest.raises(
        ConfigError, match=r"step='captured' needs a CUDA GPU, and the model is on cpu; use step='static'"
    ):
        choose_step_mode("captured", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"step must be one of auto, eager, static, captured, compiled, got 'fast'"):
        check_step_mode("fast")


def test_a_way_that_the_device_lacks_is_an_error_before_the_first_token():
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        speaker(step="captured")


def test_buckets_grow_by_half_at_most_from_some_size_on():
    assert [choose_bucket(n, 256, 1024) for n in (1, 257, 1000, 1025, 1600, 2049)] == [256, 512, 1024, 1536, 2048, 3072]
    assert choose_bucket(5000, 256, 1024, most=5120) == 5120
    sizes = [choose_bucket(n, 1, 8) for n in range(1, 300)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size < 2 * n for n, size in enumerate(sizes, 1))
    assert all(size <= 1.5 * n for n, size in enumerate(sizes, 1) if n > 8)


@pytest.mark.parametrize("before", [True, False])
def test_attention_runs_without_cudnn_and_the_setting_comes_back(before):
    setting = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(before)
        with steady_attention():
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            with steady_attention():
                assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
        with pytest.raises(KeyError), steady_attention():
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(setting)


def test_the_model_runs_without_cudnn():
    seen = []
    model = zoo.causal("llama")
    handle = model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    try:
        list(HFStepper(model).start([[5, 6, 7]]))
    finally:
        handle.remove()
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_static_answers_are_the_eager_ones(temperature):
    answers = []
    questions = ["What?", "Where is the capital of France, Japan and São Paulo?", "yen?"]
    for step in ("eager", "static"):
        lm = speaker(step=step, layers=[0, 1])
        answers.append(lm.generate(questions, temperature=temperature, seeds=[1, 2, 3], max_tokens=30))
        assert (find_decoder(lm) is None) == (step == "eager")
    for a, b in zip(*answers, strict=True):
        assert [t.id for t in a.tokens] == [t.id for t in b.tokens]
        assert dict(a.scores) == pytest.approx(dict(b.scores), abs=1e-6)
        assert "rauq" in a.scores
        assert torch.allclose(a.states.mean, b.states.mean, atol=1e-5)
        assert torch.allclose(a.states.first, b.states.first, atol=1e-5)


def test_a_decoder_is_built_once_for_a_model_and_its_layers():
    lm = speaker(step="static")
    decoder = find_decoder(lm)
    assert find_decoder(lm) is decoder
    assert (decoder.graphs, decoder.graph_bytes) == (0, 0)
    lm.layers = [1]
    assert find_decoder(lm) is not decoder


def test_a_decoder_is_built_again_for_other_settings_and_other_weights():
    base = copy.deepcopy(zoo.talker())
    lm = RiskAwareLM(vote.Wrapper(n_voters=2, rank=2)(base).eval(), zoo.tokenizer(), step="static")
    seen = [find_decoder(lm)]
    set_answer_from(lm.model, "base")
    seen.append(find_decoder(lm))
    for leaf in lm.model.modules():
        if isinstance(leaf, vote.VotingLeaf):
            leaf.set_noise(0.5)
    seen.append(find_decoder(lm))
    lm.model.float()
    seen.append(find_decoder(lm))
    assert len(set(map(id, seen))) == 4
    assert find_decoder(lm) is seen[-1]


def test_a_decoder_goes_with_its_model():
    lm = speaker(step="static")
    lm.generate("What?", max_tokens=3)
    decoder = weakref.ref(find_decoder(lm))
    assert measure_step_memory(lm) == StepMemory()  # the batch has ended, and nothing is kept for a graph
    del lm
    gc.collect()
    assert decoder() is None


def test_the_memory_of_running_batches_is_known():
    lm = speaker(step="static")
    stream = lm.stream("What?", max_tokens=8)
    next(stream), next(stream)
    layers, heads, width = 2, 2, 4
    assert measure_step_memory(lm) == StepMemory(2 * layers * heads * width * 256 * 8)


def test_streams_leave_no_slot_behind():
    lm = speaker(step="static")
    first, second = lm.stream("What?", max_tokens=8), lm.stream("Where is Paris?", max_tokens=8)
    pairs = list(zip(first, second, strict=False))
    assert pairs
    list(first), list(second)
    assert first.answer.text == lm.generate("What?", max_tokens=8).text
    assert second.answer.text == lm.generate("Where is Paris?", max_tokens=8).text


def recurrent():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(
        "qwen3_next", **sizes, vocab_size=len(zoo.tokenizer()), intermediate_size=16, moe_intermediate_size=16,
        num_experts=2, num_experts_per_tok=1, shared_expert_intermediate_size=16, head_dim=4, linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=4, linear_value_head_dim=4, pad_token_id=0,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_a_recurrent_model_is_decoded_step_by_step_with_one_warning():
    lm = RiskAwareLM(recurrent(), zoo.tokenizer(), step="static")
    with pytest.warns(SlowWarning, match=r"Qwen3NextForCausalLM is decoded step by step: its cache has a Linear"):
        answer = lm.generate("What?", max_tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lm.generate("What?", max_tokens=5).text == answer.text


def test_a_model_that_reads_positions_in_a_way_of_its_own_is_found():
    lm = speaker(step="static")
    lm.replace_model(copy.deepcopy(zoo.talker()))
    base = innermost(lm.model)
    # It takes no notice of the positions that it is given.
    base.model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "position_ids": torch.zeros_like(kwargs["position_ids"])})
        if kwargs.get("position_ids") is not None and kwargs["input_ids"].shape[1] == 1 else None,
        with_kwargs=True,
    )  # fmt: skip
    reason = compare_static_step(HFStepper(lm.model), lambda: HFStepper(lm.model))
    assert "over a static cache its logits differ by" in reason
    with pytest.warns(SlowWarning, match="its logits differ"):
        lm.generate("What?", max_tokens=4)


def test_a_model_that_takes_no_static_cache_is_found():
    def refuse(_module, args, kwargs):
        if isinstance(kwargs.get("attention_mask"), torch.Tensor) and kwargs["attention_mask"].ndim == 4:
            raise ValueError("only two axes")

    model = zoo.causal("qwen2")
    handle = model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        decoder = StaticDecoder(lambda: HFStepper(model), "static")
        stepper = HFStepper(model)
        (*_, (_, last)) = stepper.start([[5, 6, 7]])
        with pytest.warns(SlowWarning, match=r"takes? a static cache \(ValueError: only two axes\)"):
            assert decoder.start(stepper, last.at(-1), []) is None
    finally:
        handle.remove()


def test_eager_decoding_needs_no_decoder():
    lm = speaker()
    stepper = HFStepper(lm.model)
    (*_, (_, last)) = stepper.start([[5, 6, 7]])
    assert type(start_decoding(lm, stepper, last.at(-1), [])).__name__ == "DecodeBatch"


COMPILED = """
import warnings
from selfdoubt import RiskAwareLM, vote
from selfdoubt.errors import SlowWarning
warnings.simplefilter("error", SlowWarning)
from tests import zoo
answers = []
for step in ("eager", "compiled"):
    lm = RiskAwareLM(vote.Wrapper(n_voters=2, rank=2)(zoo.talker()).eval(), zoo.tokenizer(), step=step, layers=[1])
    answers.append(lm.generate(["What?", "yen?"], temperature=0.9, seeds=[1, 2], max_tokens=12))
for a, b in zip(*answers, strict=True):
    assert [t.id for t in a.tokens] == [t.id for t in b.tokens]
    assert all(abs(a.scores[k] - b.scores[k]) < 1e-5 for k in a.scores | b.scores)
from selfdoubt.lm.decoding import find_decoder
print(find_decoder(lm).mode)
"""


@pytest.mark.slow
def test_compiled_answers_are_the_eager_ones():
    assert run(COMPILED, timeout=1500).strip().endswith("compiled")
