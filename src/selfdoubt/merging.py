"""Merges deviations into the weights of a leaf: one voter's for good, or all voters' for a pass of training."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from selfdoubt import compat, kernels
from selfdoubt.errors import WrapError

#: Hooks of a leaf, which may read its output.
_HOOKS = attrgetter("_forward_hooks"), attrgetter("_forward_pre_hooks")


def takes_merged(leaf: nn.Module, x: Tensor) -> bool:
    """Return True if one pass with the sums of weights and deviations does for all voters.

    In a narrow dtype the sum would lose small deviations.
    """
    is_wide = x.dtype in (torch.float32, torch.float64) and x.dtype == leaf.weight.dtype
    # Graphs cannot look up hooks, and are made again where there are new ones.
    has_hooks = not torch.compiler.is_compiling() and any(find(leaf) for find in _HOOKS)
    return is_wide and not has_hooks and not torch.is_autocast_enabled(x.device.type)


def run_merged(
    leaf: nn.Module, kernel: kernels.Kernel, deviations: nn.ParameterDict, alpha: float, x: Tensor
) -> Tensor:
    """Run a leaf on member-major rows with each voter's own parameters; those without deviations are the leaf's."""
    voters, merged = len(deviations["weight"]), {}
    for name, parameter in leaf.named_parameters(recurse=False):
        deviation = deviations.get(name)
        shared = parameter.expand(voters, *parameter.shape)
        merged[name] = shared if deviation is None else torch.add(shared, deviation, alpha=alpha)
    # Kernels fold members back by views, and sharded training takes no view for an output of a module.
    return kernel(leaf, x, merged).clone()


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
