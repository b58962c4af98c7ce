"""Copies the structure of a model, not its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from selfdoubt.compat import list_quantization_states
from selfdoubt.errors import WrapError
from selfdoubt.rows import list_added_names


def share_module(model: nn.Module, *, freeze: bool, copies: Mapping[int, Any] | None = None) -> nn.Module:
    """Build a new tree of modules over the same parameters and buffers: the original keeps its own leaves.

    Frozen parameters are views that do not train, so that the original's still do. Parameters of an inner wrapper stay
    trainable. ``copies`` are other objects in the place of some, by ``id``.
    """
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # Quantisation states belong to the packed weights, which both trees share.
    memo |= {id(state): state for state in list_quantization_states(model)}
    if freeze:
        added = set(list_added_names(model))
        for name, p in model.named_parameters():
            if name not in added and p.requires_grad:
                memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
    memo |= copies or {}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise WrapError(f"the structure of {type(model).__name__} cannot be copied: {error}") from error
