"""Merges one voter's deviations into the weights of a leaf."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from selfdoubt import compat, kernels
from selfdoubt.errors import WrapError


@torch.no_grad()
def merge_deviation(voting: Any, name: str, voter: int) -> nn.Module:
    """Return the leaf of a ``VotingLeaf`` with one voter's weights, which are new parameters of it.

    Args:
        voting: The voting leaf; the leaf inside it changes.
        name: Its name, for messages.
        voter: Number of the voter.

    Raises:
        WrapError: If the weights are packed.
    """
    leaf: nn.Module = voting.leaf
    base = compat.get_base_layer(leaf)
    if compat.is_quantized(base):
        raise WrapError(
            f"{name} holds packed {type(base).__name__} weights, which cannot take a deviation; merge voters of the "
            "model in 16 bits, or export them as adapters: selfdoubt export FOLDER OUT --peft"
        )
    deviations = {key.replace("/", "."): value[voter] for key, value in voting.deviations.items()}
    if "weight_a" in deviations:
        a, b = deviations.pop("weight_a"), deviations.pop("weight_b")
        if voting.kernel is kernels.embedding:
            deviations["weight"] = a @ b
        else:
            deviations["weight"] = a.T @ b if compat.is_transposed(base) else b.T @ a
    for path, deviation in deviations.items():
        owner, _, parameter = path.rpartition(".")
        module = (leaf if voting.kernel is None else base).get_submodule(owner)
        before = module.get_parameter(parameter)
        merged = before + voting.alpha * deviation.to(before.dtype)
        setattr(module, parameter, nn.Parameter(merged, requires_grad=before.requires_grad))
    return leaf
