"""``TrainedState``: knows whether the members of a wrapped model are trained."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

_version = attrgetter("_version")


class TrainedState:
    """The record of a wrapped model's training: members are trained once a parameter has changed.

    Torch counts the changes in place of each tensor; those made in inference mode have no count. The parameters that
    matter are those that make the members. Where there are none that train, as for samples, they are all that train,
    and only after a training pass: the model may be trained without noise, too.

    Args:
        model: The wrapped model.
        members: Names of the parameters that make the members, and that train.
        trained: True if its members are trained already.

    Attributes:
        is_trained: The answer of the last ``read``.
    """

    def __init__(self, model: nn.Module, members: frozenset[str], *, trained: bool = False) -> None:
        self.members = members
        self.is_trained, self._has_met_training = trained, False
        self._known = {
            name: (ref(p), _version(p))
            for name, p in model.named_parameters()
            if (name in members if members else p.requires_grad) and not p.is_inference()
        }

    def note_training(self) -> None:
        """Note a training pass, after which a change of weights is training."""
        self._has_met_training |= torch.is_grad_enabled()

    def read(self, model: nn.Module) -> bool:
        """Return True if the members are trained; within a graph, which sees no counts, after a training pass.

        Args:
            model: The wrapped model, as it is now.
        """
        if torch.compiler.is_compiling():
            return self.is_trained or self._has_met_training
        if not self.is_trained and (self.members or self._has_met_training):
            self.is_trained = self._have_changed() or (self._has_met_training and self._were_replaced(model))
        return self.is_trained

    def _have_changed(self) -> bool:
        pairs = ((parameter(), before) for parameter, before in self._known.values())
        return any(p is not None and not p.is_inference() and _version(p) != before for p, before in pairs)

    def _were_replaced(self, model: nn.Module) -> bool:
        """Return True if other tensors have the places of known ones, as after sharding: their changes are not seen."""
        now: dict[str, Tensor] = dict(model.named_parameters())
        return any(name in now and parameter() is not now[name] for name, (parameter, _) in self._known.items())


def has_other_weights(model: nn.Module, state: Mapping[str, Any], prefix: str = "") -> bool:
    """Return True if a state has other values for a parameter that trains.

    Args:
        model: A model.
        state: A state, with the model's names after a prefix.
        prefix: The prefix.
    """
    mine = model.state_dict()
    trains = (name for name, p in model.named_parameters() if p.requires_grad and name in mine)
    pairs = ((mine[name], state.get(prefix + name)) for name in trains)
    return any(isinstance(other, Tensor) and not _are_equal(value, other) for value, other in pairs)


def _are_equal(mine: Tensor, theirs: Tensor) -> bool:
    kinds = {type(mine.detach()), type(theirs.detach())}  # a shard cannot be compared with a whole tensor
    if mine.is_meta or theirs.is_meta or mine.shape != theirs.shape or len(kinds) > 1:
        return False
    return torch.equal(mine.detach().cpu(), theirs.detach().to(mine.dtype).cpu())
