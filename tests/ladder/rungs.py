"""The slow ways that fast ones are compared with: one plain model per member, and a loop over members per leaf."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from selfdoubt import sample
from selfdoubt.lm.prefill import prefill
from selfdoubt.lm.stepper import HFStepper
from selfdoubt.members import Wrapped
from selfdoubt.random_numbers import uniforms
from selfdoubt.sample import NoisyLeaf
from selfdoubt.vote import VotingLeaf


def full_deviations(leaf: VotingLeaf) -> dict[str, Tensor]:
    """A leaf's deviations as full tensors: low-rank factors multiplied out by hand."""
    deviations = dict(leaf.deviations.items())
    if "weight_a" in deviations:
        a, b = deviations.pop("weight_a"), deviations.pop("weight_b")
        product = a @ b if isinstance(leaf.leaf, nn.Embedding) else a.transpose(1, 2) @ b  # (members, in, out)
        is_stored_as_out_in = isinstance(leaf.leaf, nn.Linear)
        deviations["weight"] = product.transpose(1, 2) if is_stored_as_out_in else product
    return deviations


def voter(wrapped: Wrapped, base: nn.Module, m: int) -> nn.Module:
    """A plain copy of the base model with voter ``m``'s deviations merged into its weights."""
    alone = copy.deepcopy(base)
    for name in wrapped.leaf_names:
        leaf = wrapped.module.get_submodule(name)
        for path, deviation in full_deviations(leaf).items():
            owner, _, parameter = f"{name}.{path.replace('/', '.')}".rpartition(".")
            merged = getattr(alone.get_submodule(owner), parameter).detach() + leaf.alpha * deviation[m].detach()
            # A new parameter, not a change of the old one: that may be tied to another layer.
            setattr(alone.get_submodule(owner), parameter, nn.Parameter(merged))
    return alone


def looped(wrapped: Wrapped) -> Wrapped:
    """The same voters, each leaf run once per voter with its own full weights."""
    slow = copy.deepcopy(wrapped)
    for leaf in slow.modules():
        if isinstance(leaf, VotingLeaf):
            leaf.deviations = nn.ParameterDict(full_deviations(leaf))
            leaf.kernel = None
    return slow


def noisy(wrapped: Wrapped, base: nn.Module, m: int) -> nn.Module:
    """A plain copy of the base model with hooks that multiply by sample ``m``'s noise."""
    alone = copy.deepcopy(base)
    for name in wrapped.leaf_names:
        leaf = wrapped.module.get_submodule(name)
        assert isinstance(leaf, NoisyLeaf)
        here = alone.get_submodule(name)
        if isinstance(here, nn.Embedding):
            here.register_forward_hook(lambda _, args, y, leaf=leaf: with_noise(y, leaf, m))
        else:
            here.register_forward_pre_hook(lambda _, args, leaf=leaf: (with_noise(args[0], leaf, m), *args[1:]))
    return alone


def with_noise(x: Tensor, leaf: NoisyLeaf, m: int) -> Tensor:
    """A tensor times the noise that a leaf has in sample ``m``."""
    uniform = uniforms(leaf.key, m + 1, x.shape[-1], x.device)[m].double()
    if isinstance(leaf.distribution, sample.Bernoulli):
        p = leaf.distribution.p
        return x * (uniform >= p) / (1 - p)
    standard = torch.special.ndtri(uniform.clamp(2**-23, 1 - 2**-23))
    return x * (1 + leaf.distribution.std * standard)


def stepped(model: nn.Module, prompts: Sequence[Sequence[int]], following: Tensor) -> Tensor:
    """Logits ``(members, batch, 1 + steps, classes)`` after prompts and each following token, by cached steps."""
    stepper = HFStepper(model)
    _, last = prefill(stepper, prompts)
    found = [last.logits, *(stepper.step(ids).logits for ids in following.T)]
    return torch.stack(found, 2)


def whole(model: nn.Module, prompt: Sequence[int], following: Tensor) -> Tensor:
    """The same logits for one sequence, ``(1 + steps, classes)``, of a plain model without a cache."""
    ids = torch.tensor([[*prompt, *following.tolist()]])
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
