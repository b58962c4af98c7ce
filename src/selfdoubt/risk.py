"""Entropies and their parts: pure functions of one tensor of logits, ``(members, *batch, classes)``.

Probabilities are averaged, never logits. Where member 0 is the base model (``has_base``), it alone answers: the
distribution of the answer, its log-probability and its entropy are the base's, and the other members only say how far
they disagree. Entropies are in nats. All sums run in float32 (float64 stays float64) on the tensor's own device.
Definitions: total = H(mean_m p_m), aleatoric = mean_m H(p_m), epistemic = total - aleatoric, the mutual information
between member and class (Houlsby et al., 2011, "Bayesian active learning by disagreement").
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfdoubt.distributions import (
    Distributions,
    compute_divergence,
    compute_entropy_of_mean,
    compute_uniform_divergence,
    find_top,
    log_mean_exp,
    wide_dtype,
)
from selfdoubt.errors import NonFiniteError, ShapeError

#: Relative room between a value and its five digits.
_ROUNDING = 5e-5


class TokenScores(NamedTuple):
    """Scores of chosen classes; every field has the shape of ``chosen``.

    With a base row ``logprob`` and ``total`` are the base's, and all others are of the other members: then ``total`` is
    not the sum of ``aleatoric`` and ``epistemic``.
    """

    logprob: Tensor  #: log of the mean probability of the chosen class, nats, <= 0
    total: Tensor  #: entropy of the mean, in [0, log classes]
    aleatoric: Tensor  #: mean of the members' entropies, in [0, log classes]
    epistemic: Tensor  #: entropy of the members' mean - aleatoric, in [0, log members]
    disagreement: Tensor  #: share of members whose most probable class is not the chosen one, in [0, 1]
    spread: Tensor  #: standard deviation over members of the chosen class's probability, in [0, 0.5]
    divergence: Tensor | None = None  #: mean over members of KL(base || member), nats, >= 0; None without a base row


class ConfidenceScores(NamedTuple):
    """Scores of a whole distribution; every field has the shape of the batch. Both grow with doubt."""

    margin: Tensor  #: 1 - (largest - second largest probability), in [0, 1]
    self_certainty: Tensor  #: minus the KL divergence from the uniform distribution, KL(uniform || p), nats, <= 0


def mix(logits: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Return logits whose softmax is the mean of the members' probabilities; a single member's are returned unchanged.

    The free constant is set to the mean of the members' log-normalisers, so the result is on the members' own scale.

    Raises:
        ShapeError: If the member axis is missing.
    """
    _check(logits)
    if logits.shape[0] == 1:
        return logits[0]
    wide = logits.to(wide_dtype(logits))
    lse = wide.logsumexp(-1, keepdim=True)
    return (log_mean_exp(wide - lse) + lse.mean(0)).to(logits.dtype)


def mixture(
    logits: Float[Tensor, "members *batch classes"], *, has_base: bool = False
) -> Float[Tensor, "*batch classes"]:
    """Return ``mix`` in float32 or wider, without rounding: bfloat16 would move probabilities by several percent.

    Several members give the log-probabilities of their mean distribution, in float32 (float64 stays float64); one
    member comes back unchanged, and so does the base's row where there is one.

    Raises:
        ShapeError: If the member axis is missing.
    """
    _check(logits)
    if logits.shape[0] == 1 or has_base:
        return logits[0]
    return log_mean_exp(logits.to(wide_dtype(logits)).log_softmax(-1))


def total(logits: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch"]:
    """Return the entropy of the mean distribution, in nats.

    Example:
        >>> round(total(torch.zeros(3, 1, 4)).item(), 4)
        1.3863
    """
    return _entropies(logits)[0]


def aleatoric(logits: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch"]:
    """Return the mean of the members' entropies, in nats: doubt that more members would not remove.

    Example:
        >>> round(aleatoric(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])).item(), 4)
        0.0
    """
    return _entropies(logits)[1]


def epistemic(logits: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch"]:
    """Return the mutual information between the class and the member, in nats.

    Zero when all members agree, at most ``log(members)``: I = H(mean_m p_m) - mean_m H(p_m)  (Houlsby et al., 2011).

    Args:
        logits: Unnormalised scores, one slice per member.

    Raises:
        ShapeError: If the member axis is missing.
        NonFiniteError: If a logit is NaN or infinite.

    Example:
        >>> round(epistemic(torch.tensor([[[9.0, -9.0]], [[-9.0, 9.0]]])).item(), 4)
        0.6931
    """
    return _entropies(logits)[2]


def confidence_scores(logits: Float[Tensor, "*batch classes"]) -> ConfidenceScores:
    """Return margin and self-certainty of distributions, as scores that grow with doubt.

    Margin: Scheffer et al., 2001, "Active hidden Markov models". Self-certainty: Kang et al., 2025, "Scalable best-of-N
    selection via self-certainty", equation 7: KL(U || p) = -log n - mean_i log p_i over n classes.

    Args:
        logits: Unnormalised scores of one distribution (see ``mixture``), of at least two classes.

    Example:
        >>> scores = confidence_scores(torch.zeros(4))
        >>> scores.margin.item(), round(abs(scores.self_certainty.item()), 4)
        (1.0, 0.0)
    """
    distribution = Distributions.measure(logits)
    return score_confidence(distribution, find_top(distribution.centred, 2))


def token_scores(
    logits: Float[Tensor, "members *batch classes"],
    chosen: Int[Tensor, "*batch"],
    *,
    has_base: bool = False,
    check: bool = True,
) -> TokenScores:
    """Return all token scores in one pass over the classes.

    Args:
        logits: Unnormalised scores, one slice per member.
        chosen: Index of the class that was taken.
        has_base: Member 0 is the base model, which answers alone; there must be others.
        check: False leaves NaN in ``total`` or ``aleatoric`` where a logit is NaN or infinite, and waits for nothing.

    Raises:
        ShapeError: If the member axis is missing.
        NonFiniteError: If a logit is NaN or infinite.
    """
    scores = score_members(measure_members(logits, has_base=has_base), chosen, has_base=has_base)
    if check:
        check_finite(scores.total + scores.aleatoric)
    return scores


def measure_members(logits: Float[Tensor, "members *batch classes"], *, has_base: bool = False) -> Distributions:
    """Return the members' distributions, which are large, and of which all scores are computed.

    Raises:
        ShapeError: If the member axis is missing, or if there is no member next to the base model.
    """
    _check(logits)
    if has_base and len(logits) < 2:
        raise ShapeError("a base row needs at least one more member to disagree with it, got one row")
    return Distributions.measure(logits)


def find_answer(each: Distributions, *, has_base: bool = False) -> Distributions:
    """Return the distribution that answers: the members' mean, or the base's; see ``mixture``."""
    return each.select(0) if has_base else each.mean()


def score_members(
    each: Distributions, chosen: Int[Tensor, "*batch"], answer: Distributions | None = None, *, has_base: bool = False
) -> TokenScores:
    """Return ``token_scores`` of measured members.

    Args:
        each: The members' distributions.
        chosen: Index of the class that was taken.
        answer: The distribution that answers, if it is known: then the mean is not computed again.
        has_base: Member 0 is the base model.
    """
    if not has_base:
        return _score(each, chosen, answer)
    base, others = each.select(slice(1)), each.select(slice(1, None))
    divergence = compute_divergence(base.select(0), others).mean(0).clamp_min(0)
    of_base = _score(base, chosen, None)
    return _score(others, chosen, None)._replace(logprob=of_base.logprob, total=of_base.total, divergence=divergence)


def score_confidence(distribution: Distributions, top: Int[Tensor, "*batch k"]) -> ConfidenceScores:
    """Return ``confidence_scores`` of a measured distribution.

    Args:
        distribution: The distribution.
        top: The most probable classes, at least two, the first ones first.
    """
    first, second = distribution.probs.gather(-1, top[..., :2]).unbind(-1)
    margin = (1 - (first - second)).clamp(0, 1)
    return ConfidenceScores(margin, -compute_uniform_divergence(distribution).clamp_min(0))


def fit_logprobs(
    answer: Distributions, chosen: Int[Tensor, "*batch"], others: Int[Tensor, "*batch k"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch k"]]:
    """Return log-probabilities of the chosen class and of others in its place, float64.

    A class has the same number in both, and the probabilities of all that are named add up to at most 1 whatever the
    rounding.

    Args:
        answer: The distribution that answers.
        chosen: Index of the class that was taken.
        others: Indices of classes, all different; the chosen one may be among them.
    """
    chosen = chosen.unsqueeze(-1)
    logp = answer.logprobs(torch.cat([chosen, others], -1)).double().clamp_max(0)
    probs, is_among = logp.exp(), (others == chosen).any(-1, keepdim=True)
    # Rounding of the normaliser may bring the sum a little above 1: the probabilities are scaled to fit.
    whole = probs.sum(-1, keepdim=True) - probs[..., :1] * is_among
    logp = logp - (whole.log() + 4e-15).clamp_min(0)  # the margin is for sums in another order
    return logp[..., 0], logp[..., 1:]


def check_finite(entropy: Float[Tensor, "*batch"]) -> None:
    """Check the total entropies of scores; one NaN or infinite logit makes its position's entropy NaN.

    Raises:
        NonFiniteError: If one is NaN or infinite.
    """
    finite = entropy.isfinite()
    if not finite.all():
        raise NonFiniteError(
            f"{int((~finite).sum())} of {entropy.numel()} positions have NaN or infinite logits; a risk cannot be "
            "computed from them: check the model's weights and dtype (float16 overflows; try bfloat16 or float32)"
        )


def percentile(value: float, reference: Sequence[float], *, linear: bool = False) -> float:
    """Return the share of reference values below ``value``, in [0, 1].

    Args:
        value: A risk.
        reference: Ascending values or quantiles of the same risk.
        linear: Take the reference as equally spaced quantiles, and interpolate between the neighbours of ``value``.
            Otherwise count values, and ties half; a value is tied to those that five digits cannot tell from it, as
            stored references have no more.

    Raises:
        ShapeError: If the reference is empty.
        NonFiniteError: If the value is not finite.

    Example:
        >>> percentile(2.5, [1.0, 2.0, 3.0, 4.0])
        0.5
        >>> percentile(2.5, [1.0, 2.0, 4.0], linear=True)
        0.625
    """
    if not reference:
        raise ShapeError("a percentile needs at least one reference value, got none")
    if not math.isfinite(value):
        raise NonFiniteError(f"a percentile needs a finite risk, got {value}")
    place = bisect_left(reference, value)
    if not linear:
        room = abs(value) * _ROUNDING
        return (bisect_left(reference, value - room) + bisect_right(reference, value + room)) / (2 * len(reference))
    if place == 0 or place == len(reference):
        return float(place > 0)
    low, high = reference[place - 1], reference[place]
    return (place - 1 + (value - low) / (high - low)) / (len(reference) - 1)


def _score(each: Distributions, chosen: Tensor, mean: Distributions | None) -> TokenScores:
    """Return the scores of members that all answer."""
    members, index = len(each.probs), chosen.unsqueeze(-1)
    entropies = _entropies_of(each, mean)
    differs = each.top != chosen
    if members == 1:
        (logprob,) = each.logprobs(index[None]).squeeze(-1)
        return TokenScores(logprob.clamp_max(0), *entropies, differs[0].to(logprob.dtype), torch.zeros_like(logprob))
    index = index.expand(members, *index.shape)
    return TokenScores(
        # Rounding may bring the mean of near certainties above 1.
        log_mean_exp(each.logprobs(index).squeeze(-1)).clamp_max(0),
        *entropies,
        disagreement=differs.to(each.probs.dtype).mean(0),
        spread=each.probs.gather(-1, index).squeeze(-1).std(0, correction=0).clamp_max(0.5),
    )


def _entropies(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(logits)
    entropies = _entropies_of(Distributions.measure(logits), None)
    check_finite(entropies[0])
    return entropies


def _entropies_of(each: Distributions, mean: Distributions | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return total, aleatoric and epistemic entropy, each within its bounds whatever the rounding.

    One NaN or infinite logit of any member makes its position's total NaN.
    """
    members, classes = len(each.probs), each.probs.shape[-1]
    inside = 1 - torch.finfo(each.probs.dtype).eps  # so that a bound is kept in any wider type, too
    entropies = each.entropy()
    if members == 1:  # the mean is the member
        h_total = entropies[0].clamp(0, math.log(classes) * inside)
        return h_total, h_total, torch.zeros_like(h_total)
    h_aleatoric = entropies.mean(0).clamp(0, math.log(classes) * inside)
    of_mean = compute_entropy_of_mean(each.probs) if mean is None else mean.entropy()
    h_epistemic = (of_mean - h_aleatoric).clamp(0, math.log(members) * inside)
    h_total = (h_aleatoric + h_epistemic).clamp_max(math.log(classes) * inside)
    return h_total, h_aleatoric, torch.minimum(h_epistemic, (h_total - h_aleatoric).clamp_min(0))


def _check(logits: Tensor) -> None:
    if logits.ndim < 2 or not logits.shape[0] or not logits.shape[-1]:
        raise ShapeError(
            f"logits must be (members, ..., classes), got shape {tuple(logits.shape)}; "
            "for a single model add the axis with logits[None]"
        )
