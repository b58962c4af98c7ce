"""``TrainedState``: knows whether the members of a wrapped model are trained."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

_version = attrgetter("_version")
#: Numbers of a parameter that are compared, evenly spaced.
_COMPARED = 4096


class TrainedState:
    """The record of a wrapped model's training: members are trained once a parameter has other values.

    The parameters that matter are those that make the members. Where there are none that train, as for samples, they
    are all that train, and only after a training pass: the model may be trained without noise, too.

    Values are compared, since fused optimizers and writes to ``.data`` leave no other trace; but only after a training
    pass, or where torch has counted a change in place. Parameters that another tensor replaces, as sharding does, count
    as changed after a training pass.

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
            name: (ref(p), _choose_some(p).clone())
            for name, p in model.named_parameters()
            if not trained and (name in members if members else p.requires_grad) and not p.is_meta
        }
        self._compared = self._count_changes()  # at the last comparison

    def note_training(self) -> None:
        """Note a training pass, after which other values are training."""
        self._has_met_training |= torch.is_grad_enabled()

    def read(self, model: nn.Module) -> bool:
        """Return True if the members are trained; within a graph, which cannot compare, after a training pass.

        Args:
            model: The wrapped model, as it is now.
        """
        if torch.compiler.is_compiling():
            return self.is_trained or self._has_met_training
        if not self.is_trained and (self.members or self._has_met_training):
            count = self._count_changes()
            if self._has_met_training or count != self._compared:
                self.is_trained, self._compared = self._has_changed(model), count
        return self.is_trained

    def _count_changes(self) -> int:
        """Return the number of changes in place of all parameters; those made in inference mode have no count."""
        parameters = (parameter() for parameter, _ in self._known.values())
        return sum(_version(p) for p in parameters if p is not None and not p.is_inference())

    def _has_changed(self, model: nn.Module) -> bool:
        now = dict(model.named_parameters())
        for name, (parameter, before) in self._known.items():
            p = now.get(name)
            if p is None or p is not parameter():
                has_changed = self._has_met_training
            else:
                has_changed = not _are_equal(_choose_some(p), before)
            if has_changed:
                return True
        return False


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


def _choose_some(p: Tensor) -> Tensor:
    """Return some numbers of a parameter, of a sharded one those that lie here; a view where its layout allows it."""
    values = p.detach()
    values = values.to_local() if hasattr(values, "to_local") else values
    return values.reshape(-1)[:: max(1, values.numel() // _COMPARED)]


def _are_equal(mine: Tensor, theirs: Tensor) -> bool:
    kinds = {type(mine.detach()), type(theirs.detach())}  # a shard cannot be compared with a whole tensor
    if mine.is_meta or theirs.is_meta or mine.shape != theirs.shape or len(kinds) > 1:
        return False
    return torch.equal(mine.detach().cpu(), theirs.detach().to(mine.dtype).cpu())
