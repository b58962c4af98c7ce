"""``Forecast``: the members' predictions of one output, with the answer, their spread and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Shaped
from torch import Tensor

from selfdoubt import risk
from selfdoubt.distributions import wide_dtype

OutputKind = Literal["values", "logits"]


@dataclass(frozen=True, eq=False)
class Forecast:
    """All members' predictions of one output tensor, ``(members, batch, ...)``, with their mean and spread.

    ``kind="logits"`` means that the last axis holds unnormalised class scores: then ``mean`` averages probabilities
    and returns logits of that mixture. ``kind="values"`` averages the values.

    Where the base model answers (``answer_from="base"``), ``base`` is its prediction, which is not one of the members.
    It alone is the answer, with its entropy; the members only say how far they are from it and from each other.
    """

    members: Shaped[Tensor, "members batch *rest"]
    #: Predicted std, from a sculpt inside: each member's, or the base's alone where that answers.
    scale_std: Shaped[Tensor, "scales batch *rest"] | None = None
    kind: OutputKind = "values"
    base: Shaped[Tensor, "batch *rest"] | None = None  #: None where the members' mean answers

    @property
    def mean(self) -> Tensor:
        """The prediction, ``(batch, ...)``: the base's, or the members' mean (integers and booleans: their mode)."""
        if self.base is not None:
            return self.base
        if self.members.shape[0] == 1:
            return self.members[0]
        if not self.members.is_floating_point():
            return self.members.mode(0).values
        return risk.mix(self.members) if self.kind == "logits" else self.members.mean(0)

    @property
    def std(self) -> Tensor:
        """Population standard deviation over members, ``(batch, ...)``.

        Around the base where that answers: the root mean square of the members' distances from it. A predicted scale
        joins by the law of total variance: var_m(mean_m) + mean_m(scale_m^2). Integers and booleans: the share of
        members that differ from ``mean``.
        """
        if not self.members.is_floating_point():
            return (self.members != self.mean).float().mean(0)
        wide = self.members.to(wide_dtype(self.members))
        variance = wide.var(0, correction=0) if self.base is None else (wide - self.base).square().mean(0)
        if self.scale_std is not None:
            variance = variance + self.scale_std.to(variance.dtype).square().mean(0)
        return variance.sqrt().to(self.members.dtype)

    @property
    def total(self) -> Tensor:
        """Entropy of the mean (with a base: of the base), last axis as classes, nats."""
        return risk.total(self.members if self.base is None else self.base[None])

    @property
    def aleatoric(self) -> Tensor:
        """Mean entropy of the members, last axis as classes, nats."""
        return risk.aleatoric(self.members)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between class and member, last axis as classes, nats."""
        return risk.epistemic(self.members)
