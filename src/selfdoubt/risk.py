"""The maths of doubt: pure functions of one tensor of logits, ``(members, *batch, classes)``.

Probabilities are averaged, never logits. Entropies are in nats. All sums run in float32 (float64 stays float64) on the
tensor's own device. Definitions: total = H(mean_m p_m), aleatoric = mean_m H(p_m), epistemic = total - aleatoric, the
mutual information between member and class (Houlsby et al., 2011, "Bayesian active learning by disagreement").
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.errors import NonFiniteError, ShapeError


class TokenScores(NamedTuple):
    """Scores of chosen classes; every field has the shape of ``chosen``."""

    logprob: Tensor  #: log of the mean probability of the chosen class, nats, <= 0
    total: Tensor  #: entropy of the mean, in [0, log classes]
    aleatoric: Tensor  #: mean of the members' entropies, in [0, log classes]
    epistemic: Tensor  #: total - aleatoric, in [0, log members]
    disagreement: Tensor  #: share of members whose most probable class is not the chosen one, in [0, 1]
    spread: Tensor  #: standard deviation over members of the chosen class's probability, in [0, 0.5]


def mix(logits: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Logits whose softmax is the mean of the members' probabilities; one member comes back unchanged.

    The free constant is set to the mean of the members' log-normalisers, so the result is on the members' own scale.

    Raises:
        ShapeError: If there is no member axis.
    """
    _check(logits)
    if logits.shape[0] == 1:
        return logits[0]
    wide = _wide(logits)
    lse = wide.logsumexp(-1, keepdim=True)
    mixed = (wide - lse).logsumexp(0) - math.log(logits.shape[0]) + lse.mean(0)
    return mixed.to(logits.dtype)


def total(logits: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch"]:
    """Entropy of the mean distribution, in nats.

    Example:
        >>> round(total(torch.zeros(3, 1, 4)).item(), 4)
        1.3863
    """
    return _entropies(logits)[0]


def aleatoric(logits: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch"]:
    """Mean of the members' entropies, in nats: doubt that more members would not remove.

    Example:
        >>> round(aleatoric(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])).item(), 4)
        0.0
    """
    return _entropies(logits)[1]


def epistemic(logits: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch"]:
    """Mutual information between the class and the member, in nats.

    Zero when all members agree, at most ``log(members)``: I = H(mean_m p_m) - mean_m H(p_m)  (Houlsby et al., 2011).

    Args:
        logits: Unnormalised scores, one slice per member.

    Raises:
        ShapeError: If there is no member axis.
        NonFiniteError: If a logit is NaN or infinite.

    Example:
        >>> round(epistemic(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])).item(), 4)
        0.6931
    """
    h_total, h_aleatoric = _entropies(logits)
    return (h_total - h_aleatoric).clamp_min(0)


def token_scores(logits: Float[Tensor, "members *batch classes"], chosen: Int[Tensor, "*batch"]) -> TokenScores:
    """All token scores in one pass over the classes.

    Args:
        logits: Unnormalised scores, one slice per member.
        chosen: Index of the class that was taken.

    Raises:
        ShapeError: If there is no member axis.
        NonFiniteError: If a logit is NaN or infinite.
    """
    _check(logits)
    wide = _wide(logits)
    logp = wide.log_softmax(-1)
    probs = logp.exp()
    mean = probs.mean(0)
    # x log x at x = 0 is 0; the clamp keeps the logarithm finite there.
    h_total = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum(-1)
    h_members = -(probs * logp).sum(-1)
    index = chosen.unsqueeze(-1)
    member_probs = probs.gather(-1, index.expand(probs.shape[0], *index.shape)).squeeze(-1)
    member_logp = logp.gather(-1, index.expand(logp.shape[0], *index.shape)).squeeze(-1)
    h_aleatoric = h_members.mean(0)
    scores = TokenScores(
        # Rounding may bring the mean of near certainties above 1.
        logprob=(member_logp.logsumexp(0) - math.log(logits.shape[0])).clamp_max(0),
        total=h_total,
        aleatoric=h_aleatoric,
        epistemic=(h_total - h_aleatoric).clamp_min(0) if logits.shape[0] > 1 else torch.zeros_like(h_total),
        disagreement=(wide.argmax(-1) != chosen).to(h_total.dtype).mean(0),
        spread=member_probs.std(0, correction=0),
    )
    # One infinite or NaN logit makes its row's entropy NaN: checking the small result checks the large tensor.
    _check_finite(scores.total + scores.aleatoric)
    return scores


def percentile(value: float, reference: Sequence[float]) -> float:
    """Share of reference values below ``value`` (ties count half), in [0, 1].

    Args:
        value: A risk.
        reference: Ascending values or quantiles of the same risk.

    Raises:
        ShapeError: If the reference is empty.
        NonFiniteError: If the value is not finite.

    Example:
        >>> percentile(2.5, [1.0, 2.0, 3.0, 4.0])
        0.5
    """
    if not reference:
        raise ShapeError("a percentile needs at least one reference value, got none")
    if not math.isfinite(value):
        raise NonFiniteError(f"a percentile needs a finite risk, got {value}")
    return (bisect_left(reference, value) + bisect_right(reference, value)) / (2 * len(reference))


def _entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    _check(logits)
    logp = _wide(logits).log_softmax(-1)
    probs = logp.exp()
    mean = probs.mean(0)
    h_total = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum(-1)
    h_aleatoric = -(probs * logp).sum(-1).mean(0)
    _check_finite(h_total + h_aleatoric)
    return h_total, h_aleatoric


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which sums over ``x`` run: float32, or float64 where ``x`` has it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(logits: Tensor) -> Tensor:
    return logits.to(wide_dtype(logits))


def _check(logits: Tensor) -> None:
    if logits.ndim < 2 or not logits.shape[0] or not logits.shape[-1]:
        raise ShapeError(
            f"logits must be (members, ..., classes), got shape {tuple(logits.shape)}; "
            "for a single model add the axis with logits[None]"
        )


def _check_finite(entropy: Tensor) -> None:
    finite = entropy.isfinite()
    if not finite.all():
        raise NonFiniteError(
            f"{int((~finite).sum())} of {entropy.numel()} positions have NaN or infinite logits; a risk cannot be "
            "computed from them: check the model's weights and dtype (float16 overflows; try bfloat16 or float32)"
        )
