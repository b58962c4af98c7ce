"""``Forecast``: the members' predictions of one output, with the answer, their spread and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from selfdoubt import risk
from selfdoubt.distributions import wide_dtype
from selfdoubt.errors import NonFiniteError

OutputKind = Literal["values", "logits"]


class Prediction(NamedTuple):
    """A prediction and its risk, both in the structure of the model's output; see ``Wrapped.forward``."""

    mean: Any
    risk: Any


@dataclass(frozen=True, eq=False)
class Forecast:
    """All members' predictions of one output tensor, ``(members, batch, ...)``, with their mean and spread.

    ``kind="logits"`` means that the last axis holds unnormalised class scores: then ``mean`` averages probabilities
    and returns logits of that mixture, and ``total``, ``aleatoric`` and ``epistemic`` are entropies in nats,
    ``(batch, ...)`` without the last axis. ``kind="values"`` averages the values, and the three are standard deviations
    in their units, ``(batch, ...)``; by the law of total variance (Kendall and Gal, 2017, equation 9):

        total^2 = aleatoric^2 + epistemic^2 = mean_m(scale_m^2) + var_m(mean_m)

    Where the base model answers (``answer_from="base"``), ``base`` is its prediction, which is not one of the members.
    It alone is the answer, with its entropy; the members only say how far they are from it and from each other.
    """

    members: Shaped[Tensor, "members batch *rest"]
    #: Predicted std, from a sculpt inside: each member's, or the base's alone where that answers.
    scale_std: Shaped[Tensor, "scales batch *rest"] | None = None
    kind: OutputKind = "values"
    base: Shaped[Tensor, "batch *rest"] | None = None  #: None where the members' mean answers
    #: Distance of the features from the usual, ``(batch, *positions)``: the members' mean, or the base's where that
    #: answers. None without a density, or before it is fitted.
    density: Shaped[Tensor, "batch *positions"] | None = None

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

        Raises:
            NonFiniteError: If a prediction is NaN.
        """
        if not self.members.is_floating_point():
            return (self.members != self.mean).float().mean(0)
        variance = self._variance()
        if self.scale_std is not None:
            variance = variance + self._scale_variance()
        return variance.sqrt().to(self.members.dtype)

    @property
    def scale(self) -> Tensor | None:
        """Std that the model predicts for its targets, ``(batch, ...)``: root mean square over members (with a base:
        the base's). None without a sculpt."""
        return None if self.scale_std is None else self._scale_variance().sqrt().to(self.members.dtype)

    @property
    def total(self) -> Tensor:
        """All uncertainty. Values: ``std``. Logits: entropy of the mean (with a base: of the base), nats."""
        if self.kind == "values":
            return self.std
        return risk.total(self.members if self.base is None else self.base[None])

    @property
    def aleatoric(self) -> Tensor:
        """Noise of the data. Values: ``scale``, zero without a sculpt. Logits: mean entropy of the members, nats."""
        if self.kind == "values":
            return torch.zeros_like(self.std) if self.scale is None else self.scale
        return risk.aleatoric(self.members)

    @property
    def epistemic(self) -> Tensor:
        """Disagreement of the members. Values: their std without the scale. Logits: mutual information between class
        and member, nats."""
        if self.kind == "logits":
            return risk.epistemic(self.members)
        if not self.members.is_floating_point():
            return self.std
        return self._variance().sqrt().to(self.members.dtype)

    def _variance(self) -> Tensor:
        wide = self.members.to(wide_dtype(self.members))
        variance = wide.var(0, correction=0) if self.base is None else (wide - self.base).square().mean(0)
        if torch.compiler.is_compiling() or variance.isfinite().all():
            return variance
        if self.members.isnan().any() or (self.base is not None and self.base.isnan().any()):
            raise NonFiniteError(
                f"{int(self.members.isnan().sum())} of {self.members.numel()} predictions are NaN, which have no risk; "
                "check the inputs, the weights and the dtype of the model"
            )
        # Scores of minus infinity, say for classes that cannot be: members that agree on them do not disagree.
        return variance.masked_fill((wide == (wide[0] if self.base is None else self.base)).all(0), 0)

    def _scale_variance(self) -> Tensor:
        assert self.scale_std is not None
        return self.scale_std.to(wide_dtype(self.members)).square().mean(0)
