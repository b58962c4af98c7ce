"""``Forecast``: the members' predictions of one output, with their mean, their spread and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Shaped
from torch import Tensor

from selfdoubt import risk

OutputKind = Literal["values", "logits"]


@dataclass(frozen=True, eq=False)
class Forecast:
    """All members' predictions of one output tensor, ``(members, batch, ...)``, with their mean and spread.

    ``kind="logits"`` means that the last axis holds unnormalised class scores: then ``mean`` averages probabilities
    and returns logits of that mixture. ``kind="values"`` averages the values.
    """

    members: Shaped[Tensor, "members batch *rest"]
    scale_std: Shaped[Tensor, "members batch *rest"] | None = None  #: predicted std, from a sculpt inside
    kind: OutputKind = "values"

    @property
    def mean(self) -> Tensor:
        """The prediction, ``(batch, ...)``. Integers and booleans: the most frequent value."""
        if self.members.shape[0] == 1:
            return self.members[0]
        if not self.members.is_floating_point():
            return self.members.mode(0).values
        return risk.mix(self.members) if self.kind == "logits" else self.members.mean(0)

    @property
    def std(self) -> Tensor:
        """Population standard deviation over members, ``(batch, ...)``.

        A predicted scale joins by the law of total variance: var_m(mean_m) + mean_m(scale_m^2). Integers and booleans:
        the share of members that differ from the most frequent value.
        """
        if not self.members.is_floating_point():
            return (self.members != self.mean).float().mean(0)
        variance = self.members.to(risk.wide_dtype(self.members)).var(0, correction=0)
        if self.scale_std is not None:
            variance = variance + self.scale_std.to(variance.dtype).square().mean(0)
        return variance.sqrt().to(self.members.dtype)

    @property
    def total(self) -> Tensor:
        """Entropy of the mean, last axis as classes, nats."""
        return risk.total(self.members)

    @property
    def aleatoric(self) -> Tensor:
        """Mean entropy of the members, last axis as classes, nats."""
        return risk.aleatoric(self.members)

    @property
    def epistemic(self) -> Tensor:
        """Mutual information between class and member, last axis as classes, nats."""
        return risk.epistemic(self.members)
