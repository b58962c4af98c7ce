"""Notices that parameters have changed: torch counts the changes in place of each tensor."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from weakref import ref

from torch import Tensor

_version = attrgetter("_version")


class Versions:
    """The versions of some parameters at one time.

    A parameter that has been replaced by another one (sharding does that) has not changed. Tensors that were made in
    inference mode have no versions.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._known = [(ref(p), _version(p)) for p in parameters if not p.is_inference()]

    def have_changed(self) -> bool:
        """Return True if one of the parameters was changed in place since then."""
        pairs = ((parameter(), before) for parameter, before in self._known)
        return any(p is not None and not p.is_inference() and _version(p) != before for p, before in pairs)
