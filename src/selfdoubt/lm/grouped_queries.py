"""Attention of one position on a CPU with heads that share keys: these heads are the queries of one head.

A position that is the last sees all keys that a mask leaves, and so do all the heads that share these keys. So they may
be the positions of one head: keys and values are read once for all of them. PyTorch's kernel for a CPU reads them for
each head, which takes 3 to 8 times as long.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_ACTIVE = threading.local()  #: its ``depth`` is the number of blocks around this thread
#: Number of blocks around compiled steps, and if there is one: a compiler, which reads no variables of a thread, would
#: compile again for each number.
_COMPILED = {"blocks": 0, "any": False}
_LOCK = threading.Lock()
_ORIGINAL: dict[str, Any] = {}


@contextmanager
def group_queries() -> Iterator[None]:
    """Let the ``sdpa`` attention of Hugging Face models in this thread run by ``attend_grouped`` where it can."""
    _register()
    _ACTIVE.depth = getattr(_ACTIVE, "depth", 0) + 1
    try:
        yield
    finally:
        _ACTIVE.depth -= 1


@contextmanager
def group_compiled_queries() -> Iterator[None]:
    """Let steps that are compiled within the block run by ``attend_grouped``, on any device.

    Hugging Face repeats the keys for each head that shares them where it is compiled: a copy of the whole cache.
    """
    _register()
    _count_block(1)
    try:
        yield
    finally:
        _count_block(-1)


def _count_block(more: int) -> None:
    with _LOCK:
        _COMPILED["blocks"] += more
        _COMPILED["any"] = _COMPILED["blocks"] > 0


def attend_grouped(
    query: Float[Tensor, "rows heads 1 width"],
    key: Float[Tensor, "rows key_heads t width"],
    value: Float[Tensor, "rows key_heads t out"],
    mask: Shaped[Tensor, "#rows 1 1 t"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "rows heads 1 out"]:
    """Return softmax(q k^T scale + mask) v, where consecutive heads share a key's head.

    Args:
        query: One query per row and head; the number of heads is a multiple of the keys'.
        key: Keys.
        value: Values.
        mask: True where the query sees a key, or a number to add.
        scale: None takes ``width ** -0.5``.
    """
    grouped = query.reshape(len(query), key.shape[1], -1, query.shape[-1])
    y = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
    return y.reshape(*query.shape[:3], -1)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Run ``sdpa`` attention, by ``attend_grouped`` within a block of ``group_queries``."""
    compiling = torch.compiler.is_compiling()
    is_plain = (
        (_COMPILED["any"] if compiling else getattr(_ACTIVE, "depth", 0) > 0 and query.is_cpu)
        and query.shape[2] == 1
        and key.shape[1] < query.shape[1]
        and not torch.is_grad_enabled()
        and not options.get("dropout")
        and all(options.get(name) is None for name in ("position_bias", "cache", "softcap"))
        and (attention_mask is None or (attention_mask.ndim == 4 and attention_mask.shape[1:3] == (1, 1)))
    )
    if not is_plain:
        return _ORIGINAL["sdpa"](module, query, key, value, attention_mask, **options)
    return attend_grouped(query, key, value, attention_mask, options.get("scaling")).transpose(1, 2).contiguous(), None


def _register() -> None:
    """Put ``_attend`` in the place of transformers' own function, which it runs outside of all blocks."""
    if _ORIGINAL:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    with _LOCK:
        if not _ORIGINAL:
            _ORIGINAL["sdpa"] = ALL_ATTENTION_FUNCTIONS["sdpa"]
            AttentionInterface.register("sdpa", _attend)
