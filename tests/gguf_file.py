"""A tiny model as a GGUF file, written by the package gguf, as llama.cpp's converter writes a Llama."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tests.zoo import packable, tokenizer

_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def write(
    path: Path,
    *,
    kind: str = "F32",
    architecture: str = "llama",
    leave_out: str = "",
    norm: float = 1.0,
    **numbers: int,
) -> nn.Module:
    """Write ``zoo.packable()`` with ``zoo.tokenizer()``, its matrices as ``kind`` ("F32", "F16", "Q8_0").

    Args:
        path: The file.
        kind: ggml's name for the type of the matrices; norms are F32.
        architecture: llama.cpp's name for it.
        leave_out: Start of the names of tensors that are not written.
        norm: Factor of the norms' weights, for another model.
        numbers: Further metadata, with two underscores for a dot.

    Returns:
        The model.
    """
    import gguf

    model, config = packable(), packable().config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    out = gguf.GGUFWriter(path, architecture)
    out.add_name("a tiny model")
    out.add_license("cc0-1.0")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(heads)
    out.add_head_count_kv(groups)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, number in numbers.items():
        out.add_uint16(name.replace("__", "."), number)
    _add_tokenizer(out)
    for name, parameter in model.state_dict().items():
        short = _rename(name)
        if leave_out and short.startswith(leave_out):
            continue
        weight: Any = parameter.numpy() * (norm if parameter.ndim == 1 else 1)
        if ".attn_q." in short or ".attn_k." in short:
            weight = _interleave(weight, heads if ".attn_q." in short else groups)
        dtype = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        out.add_tensor(short, gguf.quantize(np.ascontiguousarray(weight), dtype), raw_dtype=dtype)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return model


def _rename(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_LAYER[inner]}.{kind}"


def _interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of each head as llama.cpp's rotary embedding has them (convert_hf_to_gguf.py, ``permute``)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _add_tokenizer(out: Any) -> None:
    import gguf

    words = tokenizer()
    tokens = words.convert_ids_to_tokens(range(len(words)))
    special = set(words.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(kinds)
    out.add_token_merges([" ".join(pair) for pair in merges])
    out.add_bos_token_id(words.bos_token_id)
    out.add_eos_token_id(words.eos_token_id)
    out.add_pad_token_id(words.pad_token_id)
    out.add_add_bos_token(False)
    out.add_chat_template(words.chat_template)
