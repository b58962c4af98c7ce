"""Distributions over many classes, given as logits: measured in few passes, whose results are small.

A vocabulary has 50,000 classes and more, so that a pass over memory costs more than its arithmetic.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Numbers in a block of ``find_top`` and ``find_first``.
_BLOCK = 64


class Distributions(NamedTuple):
    """Softmax distributions, and what their entropies need. A class's log-probability is ``centred - lognorm``."""

    centred: Float[Tensor, "*batch classes"]  #: logits less the largest, float32 or float64
    probs: Float[Tensor, "*batch classes"]
    lognorm: Float[Tensor, "*batch"]  #: log of the sum of the exponentials of ``centred``, in [0, log classes]
    top: Int[Tensor, "*batch"]  #: the most probable class, the first of equal ones

    @classmethod
    def measure(cls, logits: Float[Tensor, "*batch classes"]) -> Distributions:
        """Measure logits, in float32 or wider. One that is NaN or infinite makes its distribution's entropy NaN."""
        wide = logits.to(wide_dtype(logits))
        top = find_first(wide)
        place = top.unsqueeze(-1)
        largest = wide.gather(-1, place)
        centred = wide - largest if wide is logits else wide.sub_(largest)  # a copy needs no memory of its own again
        probs = centred.softmax(-1)
        return cls(centred, probs, -probs.gather(-1, place).squeeze(-1).log(), top)

    def entropy(self) -> Float[Tensor, "*batch"]:
        """Return the entropies, nats: -sum_i p_i log p_i = lognorm - sum_i p_i centred_i."""
        return self.lognorm - _dot(self.probs, self.centred)

    def logprobs(self, classes: Int[Tensor, "*batch k"]) -> Float[Tensor, "*batch k"]:
        """Return the log-probabilities of some classes."""
        return self.centred.gather(-1, classes) - self.lognorm.unsqueeze(-1)

    def mean(self) -> Distributions:
        """Return the mean of the distributions along the first axis; a single one comes back unchanged."""
        if len(self.probs) == 1:
            return self.select(0)
        logp = log_mean_exp(self.centred - self.lognorm.unsqueeze(-1))
        top = find_first(logp)
        largest = logp.gather(-1, top.unsqueeze(-1))
        return Distributions(logp - largest, self.probs.mean(0), -largest.squeeze(-1), top)

    def select(self, members: int | slice) -> Distributions:
        """Return some of the distributions along the first axis."""
        return Distributions(*(x[members] for x in self))


def wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which sums over ``x`` run: float32, or float64 where ``x`` has it."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def log_mean_exp(logp: Float[Tensor, "members *rest"]) -> Float[Tensor, "*rest"]:
    """Return the log of the mean of ``exp(logp)`` along the first axis, in pairs: twice as fast as ``logsumexp``."""
    return reduce(torch.logaddexp, logp.unbind(0)) - math.log(len(logp))


def compute_entropy_of_mean(probs: Float[Tensor, "members *batch classes"]) -> Float[Tensor, "*batch"]:
    """Return the entropy of the mean of distributions, nats."""
    mean = probs.mean(0)
    # x log x at x = 0 is 0; the clamp keeps the logarithm finite there.
    return -_dot(mean, mean.clamp_min(torch.finfo(mean.dtype).tiny).log())


def compute_divergence(base: Distributions, others: Distributions) -> Float[Tensor, "members *batch"]:
    """Return KL(base || other) for each member of ``others``, nats, up to rounding at least 0."""
    # Small differences of log-probabilities are not lost in their sums.
    return _dot(base.probs.unsqueeze(0), base.centred.unsqueeze(0) - others.centred) + others.lognorm - base.lognorm


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the scalar products along the last axis."""
    product: Tensor = torch.linalg.vecdot(x, y)
    return product


def find_first(x: Float[Tensor, "*batch classes"]) -> Int[Tensor, "*batch"]:
    """Return the place of the largest value, the first of equal ones, as ``argmax`` does but faster on a CPU."""
    count = x.shape[-1] // _BLOCK
    if x.device.type != "cpu" or count < 2:
        return x.argmax(-1)
    blocks = x[..., : count * _BLOCK].unflatten(-1, (count, _BLOCK))  # type: ignore[no-untyped-call]
    largest = blocks.amax(-1)
    block = largest.argmax(-1, keepdim=True)
    inside = blocks.gather(-2, block[..., None].expand(*block.shape, _BLOCK)).squeeze(-2)
    place: Tensor = block * _BLOCK + inside.argmax(-1, keepdim=True)
    if count * _BLOCK < x.shape[-1]:
        rest = x[..., count * _BLOCK :]
        at = rest.argmax(-1, keepdim=True)
        place = torch.where(rest.gather(-1, at) > largest.gather(-1, block), count * _BLOCK + at, place)
    return place.squeeze(-1)


def find_top(x: Float[Tensor, "*batch classes"], k: int) -> Int[Tensor, "*batch k"]:
    """Return the places of the ``k`` largest values, in any order of equal ones, as ``topk`` does but faster on a CPU.

    The ``k`` largest lie in the ``k`` blocks with the largest maxima.
    """
    count = x.shape[-1] // _BLOCK
    if x.device.type != "cpu" or count < 2 * k:
        return x.topk(k).indices
    blocks = x[..., : count * _BLOCK].unflatten(-1, (count, _BLOCK))  # type: ignore[no-untyped-call]
    chosen = blocks.amax(-1).topk(k).indices
    places = (chosen[..., None] * _BLOCK + torch.arange(_BLOCK)).flatten(-2)
    rest = torch.arange(count * _BLOCK, x.shape[-1]).expand(*places.shape[:-1], -1)
    places = torch.cat([places, rest], -1)
    return places.gather(-1, x.gather(-1, places).topk(k).indices)


def compute_uniform_divergence(distribution: Distributions) -> Float[Tensor, "*batch"]:
    """Return KL(uniform || p), nats: -log n - mean_i log p_i over n classes, up to rounding at least 0."""
    centred = distribution.centred
    return distribution.lognorm - centred.mean(-1) - math.log(centred.shape[-1])
