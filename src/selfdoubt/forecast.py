"""``Forecast``: the members' predictions of one output, with the answer, their spread and its parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from selfdoubt import risk
from selfdoubt.distributions import wide_dtype
from selfdoubt.errors import NonFiniteError
from selfdoubt.tree import iter_tensors, tree_map

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

    is_leaf: ClassVar[bool] = True  #: to those who walk a structure of outputs

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
    def total(self) -> Tensor | None:
        """All uncertainty. Values: ``std``, None for one member without a sculpt. Logits: entropy of the mean (with a
        base: of the base), nats."""
        if self.kind == "values":
            return None if self._is_alone and self.scale_std is None else self.std
        return risk.total(self.members if self.base is None else self.base[None])

    @property
    def aleatoric(self) -> Tensor | None:
        """Noise of the data. Values: ``scale``; without a sculpt zero, and None for one member. Logits: mean entropy of
        the members, nats."""
        if self.kind == "logits":
            return risk.aleatoric(self.members)
        return self.scale if self.scale_std is not None or self._is_alone else torch.zeros_like(self.std)

    @property
    def epistemic(self) -> Tensor | None:
        """Disagreement of the members; None for one member, which has no other. Values: their std without the scale.
        Logits: mutual information between class and member, nats."""
        if self._is_alone:
            return None
        if self.kind == "logits":
            return risk.epistemic(self.members)
        if not self.members.is_floating_point():
            return self.std
        return self._variance().sqrt().to(self.members.dtype)

    @property
    def _is_alone(self) -> bool:
        return self.base is None and len(self.members) == 1

    def _variance(self) -> Tensor:
        wide = self.members.to(wide_dtype(self.members))
        variance = wide.var(0, correction=0) if self.base is None else (wide - self.base).square().mean(0)
        if torch.compiler.is_compiling() or variance.isfinite().all():
            return variance
        check_no_nan(self.members.transpose(0, 1), "predictions")
        check_no_nan(self.base, "predictions")
        # Scores of minus infinity, say for classes that cannot be: members that agree on them do not disagree.
        return variance.masked_fill((wide == (wide[0] if self.base is None else self.base)).all(0), 0)

    def _scale_variance(self) -> Tensor:
        assert self.scale_std is not None
        check_no_nan(self.scale_std.transpose(0, 1), "predicted scales")
        return self.scale_std.to(wide_dtype(self.members)).square().mean(0)


def check_no_nan(outputs: Any, name: str) -> None:
    """Check that no number among a model's outputs is NaN; a graph runs without checks.

    Args:
        outputs: Tensors ``(batch, ...)``, in any structure.
        name: Name of the numbers, for the message.

    Raises:
        NonFiniteError: If one is.
    """
    if torch.compiler.is_compiling():
        return
    for x in iter_tensors(outputs):
        wrong = x.isnan()
        if wrong.any():
            rows = wrong.reshape(len(x) if x.ndim else 1, -1).any(1).nonzero().flatten().tolist()
            where = f"row {rows[0]}" + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")
            raise NonFiniteError(
                f"{int(wrong.sum())} of {x.numel()} {name} are NaN, in {where} of {len(x) if x.ndim else 1}: they have "
                "no risk; check the inputs, the weights and the dtype of the model"
            )


def summarise(forecast: Any, *, return_risk: bool) -> Any:
    """Return the mean of each forecast in a structure of outputs; with ``return_risk`` also its std, None elsewhere."""
    mean = tree_map(lambda f: f.mean if isinstance(f, Forecast) else f, forecast)
    if not return_risk:
        return mean
    return mean, tree_map(lambda f: f.std if isinstance(f, Forecast) else None, forecast)
