"""Metrics of risks against losses of any size: errors of a regression, or right and wrong as 0 and 1.

The conventions are those of ``selective``: ties share their mean loss, the order of the file changes nothing, undefined
is a ``MetricError``. With losses of 0 and 1 the numbers are those of ``aurc`` and ``prr``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from selfdoubt.errors import MetricError
from selfdoubt.metrics.ranking import ScoresLike

#: One loss per prediction, as an array of numbers or booleans or any other sequence.
LossesLike = Shaped[np.ndarray, "answers"] | Sequence[float]


class LossCurve(NamedTuple):
    """Mean loss against coverage, one point for each number of predictions k = 1 .. n."""

    coverage: Float[np.ndarray, "answers"]  #: k / n, in (0, 1]
    loss: Float[np.ndarray, "answers"]  #: mean loss of the k surest


def loss_coverage(risk: ScoresLike, loss: LossesLike) -> LossCurve:
    """Return the mean loss of the k surest predictions for every k (El-Yaniv and Wiener, 2010).

    Args:
        risk: One finite number per prediction, which grows with doubt.
        loss: One finite number per prediction, such as a squared error, or 1 for wrong and 0 for right.

    Raises:
        MetricError: Fewer than two predictions, a number that is not finite, lists that do not fit.

    Example:
        >>> loss_coverage(np.array([0.1, 0.9, 0.5]), np.array([1.0, 6.0, 2.0])).loss.tolist()
        [1.0, 1.5, 3.0]
    """
    score, losses = _check_losses(risk, loss)
    k = np.arange(1, len(losses) + 1)
    return LossCurve(k / len(k), _accumulate(score, losses) / k)


def loss_aurc(risk: ScoresLike, loss: LossesLike) -> float:
    """Return the area under the loss-coverage curve, the mean of its n points, in the unit of the loss.

    Lower is better; ``aurc`` for losses of 0 and 1 (Geifman and El-Yaniv, 2017).

    Raises:
        MetricError: Fewer than two predictions, a number that is not finite, lists that do not fit.

    Example:
        >>> loss_aurc(np.array([0.1, 0.9]), np.array([0.0, 1.0]))
        0.25
    """
    return float(loss_coverage(risk, loss).loss.mean())


def loss_prr(risk: ScoresLike, loss: LossesLike) -> float:
    """Return the prediction rejection ratio: 1 for the best order, 0 for a random one, negative for a worse one.

    (A_random - A) / (A_random - A_best) with A = ``loss_aurc``; A_random is the mean loss, and A_best the area where
    the risk is the loss itself (Malinin and Gales, 2021).

    Raises:
        MetricError: All losses are equal, fewer than two predictions, a number that is not finite, lists that do not
            fit.

    Example:
        >>> loss_prr(np.array([0.1, 0.2, 0.9]), np.array([0.5, 1.0, 4.0]))
        1.0
    """
    losses = _check_losses(risk, loss)[1]
    if losses.min() == losses.max():
        raise MetricError(
            f"PRR compares an order of losses with the best one, and all {len(losses)} losses are {losses[0]:g}; "
            "give predictions of which some are worse than others"
        )
    random = float(np.sort(losses).mean())
    return (random - loss_aurc(risk, loss)) / (random - loss_aurc(losses, losses))


def _accumulate(
    score: Float[np.ndarray, "answers"], losses: Float[np.ndarray, "answers"]
) -> Float[np.ndarray, "answers"]:
    """Return the summed loss of the k surest; within a group of equal scores each has the group's mean."""
    order = np.lexsort((losses, score))
    score, losses = score[order], losses[order]
    starts = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1]]))
    sizes = np.diff(np.append(starts, len(score)))
    return np.cumsum(np.repeat(np.add.reduceat(losses, starts) / sizes, sizes))


def _check_losses(
    risk: ScoresLike | Shaped[np.ndarray, "answers"], loss: LossesLike
) -> tuple[Float[np.ndarray, "answers"], Float[np.ndarray, "answers"]]:
    score, losses = np.asarray(risk), np.asarray(loss)
    if score.ndim != 1 or score.shape != losses.shape:
        raise MetricError(
            f"risk and loss must be two lists of one length, got shapes {score.shape} and {losses.shape}; "
            "give one loss for each prediction"
        )
    for name, values in (("risk", score), ("loss", losses)):
        if values.dtype.kind not in "fiub":
            raise MetricError(f"{name} must hold numbers, got {values.dtype}; give one float for each prediction")
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise MetricError(
                f"{name}[{bad[0]}] is {values[bad[0]]}, and {len(bad)} of {len(values)} are not finite; "
                "leave these predictions out, or find out why they have none"
            )
    if len(score) < 2:
        raise MetricError(f"a metric needs at least 2 predictions, got {len(score)}; give more")
    return score.astype(np.float64), losses.astype(np.float64)
