"""Compatibility with bitsandbytes, PEFT and Hugging Face: every use of their classes by name, and their quirks.

None of these packages is imported before a function needs it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import nn

from selfdoubt.errors import require


def is_transposed(leaf: nn.Module) -> bool:
    """Return True for Hugging Face's ``Conv1D``: a linear layer with its weight stored as ``(in, out)``."""
    return type(leaf).__name__ == "Conv1D" and type(leaf).__module__ == "transformers.pytorch_utils"


def is_quantized(leaf: nn.Module) -> bool:
    """Return True for a linear layer with packed weights (bitsandbytes): its weight has neither shape nor gradient."""
    return isinstance(leaf, nn.Linear) and type(leaf).__module__.startswith("bitsandbytes")


def list_quantization_states(model: nn.Module) -> list[Any]:
    """Return the objects that bitsandbytes keeps next to packed weights, as attributes, and moves about."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    return [value for value in attributes if type(value).__module__.startswith("bitsandbytes")]


def forbid_repacking(model: nn.Module) -> None:
    """Keep 4-bit weights as they were packed, in place.

    On some CPUs a pass without gradients repacks them for good: what follows differs by 1e-2 from what was before, and
    no gradient comes through the layer any more.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def build_nf4_config() -> Any:
    """Build the settings for loading 4-bit weights (double quantisation, bfloat16 compute).

    Raises:
        MissingExtraError: If bitsandbytes or transformers is not installed.
    """
    require("bitsandbytes", "quant")
    return require("transformers", "lm").BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def find_eight_bit_adamw() -> type:
    """Return AdamW with its state in 8 bits, by bitsandbytes.

    Raises:
        MissingExtraError: If bitsandbytes is not installed.
    """
    optimizer: type = require("bitsandbytes", "quant").optim.AdamW8bit
    return optimizer


def allow_clipping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let Lightning clip the gradients of a fused optimiser, in place; for training without a scaler of gradients.

    A fused optimiser can take the scale of float16's gradients away itself, so Lightning refuses to clip before it;
    bfloat16 and float32 have no such scale.
    """
    vars(optimizer)["_step_supports_amp_scaling"] = False
    return optimizer


def get_base_layer(module: nn.Module) -> nn.Module:
    """Return the layer inside an adapter layer (PEFT), or the module itself."""
    inner = getattr(module, "base_layer", None)
    return get_base_layer(inner) if isinstance(inner, nn.Module) else module


def is_adapter_layer(module: nn.Module) -> bool:
    """Return True for a layer of PEFT's around another one."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def list_lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the layers with LoRA, by name."""
    for name, module in model.named_modules():
        if is_adapter_layer(module) and "lora_A" in dict(module.named_children()):
            yield name, module


def is_lora_weight(name: str) -> bool:
    """Return True for the full name of one of LoRA's own parameters."""
    return ".lora_" in name


def is_beneath_adapter(name: str) -> bool:
    """Return True for the full name of a parameter beneath an adapter layer."""
    return ".base_layer." in name


def has_output_head(module: nn.Module) -> bool:
    """Return True for a Hugging Face model that can have an output head: a language model, in most cases."""
    return callable(getattr(module, "get_output_embeddings", None))


def get_output_head(module: nn.Module) -> nn.Module | None:
    """Return the output head of a Hugging Face model; None where it has none."""
    head: nn.Module | None = module.get_output_embeddings() if has_output_head(module) else None  # type: ignore[operator]
    return head


def is_joinable_cache_layer(layer: Any) -> bool:
    """Return True for a cache layer that keeps keys and values, and nothing else (a recurrent state, say)."""
    kinds = require("transformers.cache_utils", "lm")
    return type(layer) in (kinds.DynamicLayer, kinds.DynamicSlidingWindowLayer)


def keeps_keys_only(layer: Any) -> bool:
    """Return True for a layer of a dynamic cache that keeps keys and values, or nothing, because it reads another's."""
    return is_joinable_cache_layer(layer) or type(layer) is require("transformers.cache_utils", "lm").DummyLayer


def find_cache_window(layer: Any) -> int | None:
    """Return the number of positions that a sliding layer of a dynamic cache attends to; None for a full one."""
    return int(layer.sliding_window) if layer.is_sliding else None


def build_cache(layers: Sequence[Any]) -> Any:
    """Build a Hugging Face cache of layers that have the interface of ``CacheLayerMixin`` without being such.

    None stands for a layer that keeps nothing, because it reads another layer's keys and values.
    """
    kinds = require("transformers.cache_utils", "lm")
    for kind in {type(layer) for layer in layers if layer is not None}:
        kinds.CacheLayerMixin.register(kind)
    return kinds.Cache(layers=[kinds.DummyLayer() if layer is None else layer for layer in layers])


_READS_GGUF = Lock()


@contextmanager
def read_gguf_once() -> Iterator[None]:
    """Let transformers parse a GGUF file and map its names once in the block, and show no progress bar.

    Elsewhere it parses the vocabulary, in Python, for each of config, tokenizer and weights, and makes the table of
    names for every module: three times the time.
    """
    gguf: Any = require("gguf", "lm")
    loader: Any = require("transformers.modeling_gguf_pytorch_utils", "lm")
    with _READS_GGUF:
        before = gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm
        gguf.GGUFReader, gguf.get_tensor_name_map = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)
        loader.tqdm = lambda items, **_: items
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map, loader.tqdm = before


def silence_libraries() -> None:
    """Let only errors of the libraries reach the terminal, and no progress bars."""
    transformers = require("transformers", "lm")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    require("huggingface_hub", "lm").utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it, and it names kernels that it lacks
