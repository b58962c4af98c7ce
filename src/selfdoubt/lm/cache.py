"""Joins and trims the key-value caches of Hugging Face models, whose sequences are right-aligned.

A layer has one row per member and sequence, member-major, or below a late fork one row per sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.compat import is_joinable_cache_layer
from selfdoubt.errors import WrapError
from selfdoubt.rows import unfold


def select_sequences(cache: Any, sequences: Int[Tensor, " kept"], batch: int, members: int) -> None:
    """Keep only these sequences of a batch, in place; one that is named twice is kept twice."""
    for layer in cache.layers:
        layer.batch_select_indices(_find_rows(sequences, batch, _count_members(layer, batch, members)))


def grow_cache(cache: Any, batch: int, members: int, first: int = 0) -> None:
    """Repeat the rows of a batch for every member, in place, in the layers from ``first`` on."""
    rows = torch.arange(batch)
    for layer in cache.layers[first:]:
        layer.batch_select_indices(rows.repeat(members).to(getattr(layer, "device", None) or "cpu"))


def _count_members(layer: Any, batch: int, members: int) -> int:
    keys = getattr(layer, "keys", None)
    return len(keys) // batch if isinstance(keys, Tensor) and keys.ndim == 4 else members


def _find_rows(sequences: Int[Tensor, " kept"], batch: int, members: int) -> Int[Tensor, " rows"]:
    return (torch.arange(members, device=sequences.device)[:, None] * batch + sequences).flatten()


def join_caches(mine: Any, theirs: Any, batch: int, other_batch: int) -> Any:
    """Return ``mine`` with the sequences of ``theirs`` behind its own, member by member; the shorter is left-padded.

    Entries of padding are zero and must be masked. ``theirs`` is emptied.

    Args:
        mine: The cache that is extended.
        theirs: Another of the same model.
        batch: Number of sequences in ``mine``.
        other_batch: Number of sequences in ``theirs``.

    Raises:
        WrapError: If a layer keeps something else than keys and values (a recurrent state, say).
    """
    strange = [layer for layer in (*mine.layers, *theirs.layers) if not is_joinable_cache_layer(layer)]
    if strange:
        raise WrapError(f"caches with a {type(strange[0]).__name__} cannot be joined: their sequences run one by one")
    length = max(mine.get_seq_length(), theirs.get_seq_length())
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        if not a.is_initialized:
            continue  # it shares another layer's keys and values
        width = length if not a.is_sliding else min(length, a.sliding_window - 1)
        members = len(a.keys) // batch
        if len(b.keys) != members * other_batch:
            raise WrapError("the caches fork into members at different layers, so they cannot be joined")
        a.keys = _beside(a.keys, b.keys, width, members)
        a.values = _beside(a.values, b.values, width, members)
        if a.is_sliding:
            a.cumulative_length = length
    return mine


def trim(cache: Any, columns: int) -> None:
    """Forget the first ``columns`` columns, on which every sequence has padding."""
    length = cache.get_seq_length() - columns
    for layer in cache.layers:
        if layer.is_initialized:
            unused = max(0, layer.keys.shape[-2] - length)
            layer.keys, layer.values = layer.keys[:, :, unused:], layer.values[:, :, unused:]
            if layer.is_sliding:
                layer.cumulative_length = length


def _beside(
    a: Float[Tensor, "rows heads t width"], b: Float[Tensor, "rows2 heads t2 width"], columns: int, members: int
) -> Float[Tensor, "rows3 heads columns width"]:
    by_member = [unfold(F.pad(x, (0, 0, columns - x.shape[-2], 0)), members) for x in (a, b)]
    return torch.cat(by_member, 1).flatten(0, 1)
