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

from selfdoubt.errors import NonFiniteError, ShapeError


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
    wide = _wide(logits)
    lse = wide.logsumexp(-1, keepdim=True)
    mixed = (wide - lse).logsumexp(0) - math.log(logits.shape[0]) + lse.mean(0)
    return mixed.to(logits.dtype)


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
    return _wide(logits).log_softmax(-1).logsumexp(0) - math.log(logits.shape[0])


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
    logp = _wide(logits).log_softmax(-1)
    return _confidence(logp, logp.argmax(-1))


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
        check: False leaves NaN in ``total`` or ``aleatoric`` where a logit is NaN or infinite, instead of an error that
            the host has to wait for; see ``check_finite``.

    Raises:
        ShapeError: If the member axis is missing.
        NonFiniteError: If a logit is NaN or infinite.
    """
    return _scores(logits, chosen, has_base, check)[0]


def score_among(
    logits: Float[Tensor, "members *batch classes"],
    chosen: Int[Tensor, "*batch"],
    others: Int[Tensor, "*batch k"],
    mixed: Float[Tensor, "*batch classes"],
    *,
    has_base: bool = False,
    check: bool = True,
) -> tuple[TokenScores, Float[Tensor, "*batch k"]]:
    """Return token scores, and the log-probabilities of other classes in the chosen one's place, float64.

    Both come from one distribution: a class has the same number in both places, and the probabilities of all that are
    named add up to at most 1.

    Args:
        logits: Unnormalised scores, one slice per member.
        chosen: Index of the class that was taken.
        others: Indices of classes, all different; the chosen one may be among them.
        mixed: The ``mixture`` of the logits.
        has_base: Member 0 is the base model.
        check: As for ``token_scores``.

    Raises:
        ShapeError: If the member axis is missing.
        NonFiniteError: If a logit is NaN or infinite.
    """
    scores, logp, _ = _scores(logits, chosen, has_base, check)
    return _fit(scores, logp[0] if logits.shape[0] == 1 or has_base else mixed, chosen, others)


def _fit(scores: TokenScores, mean: Tensor, chosen: Tensor, others: Tensor) -> tuple[TokenScores, Tensor]:
    """Return scores and the others' log-probabilities, whose sum is at most 1 whatever the rounding."""
    chosen_logp = mean.gather(-1, chosen.unsqueeze(-1)).double().clamp_max(0)
    rest = mean.gather(-1, others).double().clamp_max(0)
    apart = (others != chosen.unsqueeze(-1)).all(-1, keepdim=True)
    # Rounding of the normaliser may bring the sum a little above 1: the probabilities are scaled to fit.
    whole = rest.exp().sum(-1, keepdim=True) + chosen_logp.exp() * apart
    excess = (whole.log() + 4e-15).clamp_min(0)  # the margin is for sums in another order
    return scores._replace(logprob=(chosen_logp - excess).squeeze(-1)), rest - excess


def score_answer_tokens(
    logits: Float[Tensor, "members *batch classes"],
    chosen: Int[Tensor, "*batch"],
    mixed: Float[Tensor, "*batch classes"],
    others: Int[Tensor, "*batch k"] | None = None,
    *,
    has_base: bool = False,
    check: bool = True,
) -> tuple[TokenScores, ConfidenceScores, Float[Tensor, "*batch k"] | None]:
    """Return ``token_scores`` (or ``score_among``) and ``confidence_scores`` of ``mixed``, in fewer passes.

    The arguments, and the errors raised, are those of ``score_among``.
    """
    scores, logp, top = _scores(logits, chosen, has_base, check)
    alone = logits.shape[0] == 1 or has_base
    mean = logp[0] if alone else mixed
    logprobs = None
    if others is not None:
        scores, logprobs = _fit(scores, mean, chosen, others)
    # The mixture of several members has log-probabilities already, but for rounding.
    confidence = _confidence(mean, top[0]) if alone else _confidence(mean.log_softmax(-1), mean.argmax(-1))
    return scores, confidence, logprobs


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
            Otherwise count values, and ties half.

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
        return (place + bisect_right(reference, value)) / (2 * len(reference))
    if place == 0 or place == len(reference):
        return float(place > 0)
    low, high = reference[place - 1], reference[place]
    return (place - 1 + (value - low) / (high - low)) / (len(reference) - 1)


def _confidence(logp: Tensor, top: Tensor) -> ConfidenceScores:
    """Return the scores of a distribution, given as log-probabilities, whose most probable class is ``top``."""
    index = top.unsqueeze(-1)
    first, second = logp.gather(-1, index).squeeze(-1).exp(), logp.scatter(-1, index, -torch.inf).amax(-1).exp()
    divergence = -math.log(logp.shape[-1]) - logp.mean(-1)
    return ConfidenceScores((1 - (first - second)).clamp(0, 1), -divergence.clamp_min(0))


def _scores(logits: Tensor, chosen: Tensor, has_base: bool, check: bool) -> tuple[TokenScores, Tensor, Tensor]:
    """Return token scores, the members' log-probabilities, which are large, and their most probable classes."""
    _check(logits)
    if has_base:
        return _scores_from_base(logits, chosen, check)
    wide = _wide(logits)
    logp = wide.log_softmax(-1)
    probs = logp.exp()
    h_total, h_aleatoric, h_epistemic = _entropies_of(logp, probs)
    if check:
        check_finite(h_total)
    top = wide.argmax(-1)
    index = chosen.unsqueeze(-1)
    member_probs = probs.gather(-1, index.expand(probs.shape[0], *index.shape)).squeeze(-1)
    member_logp = logp.gather(-1, index.expand(logp.shape[0], *index.shape)).squeeze(-1)
    scores = TokenScores(
        # Rounding may bring the mean of near certainties above 1.
        logprob=(member_logp.logsumexp(0) - math.log(logits.shape[0])).clamp_max(0),
        total=h_total,
        aleatoric=h_aleatoric,
        epistemic=h_epistemic,
        disagreement=(top != chosen).to(h_total.dtype).mean(0),
        spread=member_probs.std(0, correction=0).clamp_max(0.5),
    )
    return scores, logp, top


def _scores_from_base(logits: Tensor, chosen: Tensor, check: bool) -> tuple[TokenScores, Tensor, Tensor]:
    """Return token scores of the base (member 0) and of the others' disagreement; and all log-probabilities."""
    if len(logits) < 2:
        raise ShapeError("a base row needs at least one more member to disagree with it, got one row")
    base, base_logp, base_top = _scores(logits[:1], chosen, has_base=False, check=False)
    others, other_logp, other_top = _scores(logits[1:], chosen, has_base=False, check=False)
    if check:
        check_finite(base.total + others.total)
    divergence = (base_logp.exp() * (base_logp - other_logp)).sum(-1).mean(0).clamp_min(0)
    scores = others._replace(logprob=base.logprob, total=base.total, divergence=divergence)
    return scores, torch.cat([base_logp, other_logp]), torch.cat([base_top, other_top])


def _entropies(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check(logits)
    logp = _wide(logits).log_softmax(-1)
    entropies = _entropies_of(logp, logp.exp())
    check_finite(entropies[0])
    return entropies


def _entropies_of(logp: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return total, aleatoric and epistemic entropy, each within its bounds whatever the rounding.

    One NaN or infinite logit of any member makes its position's total NaN.
    """
    if len(logp) == 1:  # the mean is the member
        h = -(probs[0] * logp[0]).sum(-1)
        h = h.clamp(0, math.log(logp.shape[-1]) * (1 - torch.finfo(h.dtype).eps))
        return h, h, torch.zeros_like(h)
    mean = probs.mean(0)
    # x log x at x = 0 is 0; the clamp keeps the logarithm finite there.
    h_total = -(mean * mean.clamp_min(torch.finfo(mean.dtype).tiny).log()).sum(-1)
    h_aleatoric = -(probs * logp).sum(-1).mean(0)
    members, classes = logp.shape[0], logp.shape[-1]
    inside = 1 - torch.finfo(mean.dtype).eps  # so that a bound is kept in any wider type, too
    h_aleatoric = h_aleatoric.clamp(0, math.log(classes) * inside)
    h_epistemic = (h_total - h_aleatoric).clamp(0, math.log(members) * inside)
    h_total = (h_aleatoric + h_epistemic).clamp_max(math.log(classes) * inside)
    return h_total, h_aleatoric, torch.minimum(h_epistemic, (h_total - h_aleatoric).clamp_min(0))


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums over ``x`` run: float32, or float64 where ``x`` has it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(logits: Tensor) -> Tensor:
    return logits.to(wide_dtype(logits))


def _check(logits: Tensor) -> None:
    if logits.ndim < 2 or not logits.shape[0] or not logits.shape[-1]:
        raise ShapeError(
            f"logits must be (members, ..., classes), got shape {tuple(logits.shape)}; "
            "for a single model add the axis with logits[None]"
        )
