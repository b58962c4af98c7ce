"""A Gaussian from one pass: moments that add up over batches and processes, and distances to the Gaussian they give.

Distance of features x to a Gaussian with mean m and covariance S (Mahalanobis, 1936):

    d(x) = sqrt((x - m)' S^-1 (x - m)) = |W (x - m)|,   W' W = S^-1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfdoubt.errors import DataError, NonFiniteError

#: A covariance whose largest variance is this many times the smallest has no inverse that float32 could hold.
_SINGULAR = 1e12


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over features from which mean, covariance and shrinkage follow, in float64; ``merge`` adds two.

    The sums are over z = x - origin, with an origin near the mean, as digits would be lost far from it.

    Example:
        >>> halves = Moments.sum(torch.eye(2)), Moments.sum(2 * torch.eye(2))
        >>> merge(*halves).mean.tolist()
        [0.75, 0.75]
    """

    count: Float[Tensor, ""]  #: number of features
    origin: Float[Tensor, " width"]
    total: Float[Tensor, " width"]  #: sum of z
    products: Float[Tensor, "width width"]  #: sum of z z'
    cubes: Float[Tensor, " width"]  #: sum of |z|^2 z
    quartics: Float[Tensor, ""]  #: sum of |z|^4

    @classmethod
    def sum(cls, features: Float[Tensor, "n width"]) -> Moments:
        """Sum over features.

        Raises:
            NonFiniteError: If a number is NaN or infinite.
        """
        if not features.isfinite().all():
            raise NonFiniteError("features have NaN or infinite numbers, and no statistics; check the model's inputs")
        device = "cpu" if features.device.type == "mps" else features.device  # Apple's GPUs have no float64
        x = features.detach().to(device, torch.float64)
        origin = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        z = x - origin
        norms = z.square().sum(-1)
        count = torch.tensor(len(x), dtype=torch.float64, device=x.device)
        return cls(count, origin, z.sum(0), z.T @ z, norms @ z, norms.square().sum())

    @property
    def mean(self) -> Float[Tensor, " width"]:
        """The mean."""
        return self.origin + self.total / self.count

    def move(self, origin: Float[Tensor, " width"]) -> Moments:
        """Return the sums about another origin."""
        shift = self.origin - origin
        norm, product = shift @ shift, self.products @ shift
        along, trace = shift @ self.total, self.products.trace()
        outer = torch.outer(self.total, shift)
        return Moments(
            self.count,
            origin,
            self.total + self.count * shift,
            self.products + outer + outer.T + self.count * torch.outer(shift, shift),
            self.cubes + 2 * product + norm * self.total + (trace + 2 * along + self.count * norm) * shift,
            self.quartics + 4 * shift @ (product + self.cubes) + 2 * norm * (trace + 2 * along)
            + self.count * norm.square(),
        )  # fmt: skip

    def compute_covariance(self, shrinkage: float | None = 0.0) -> Float[Tensor, "width width"]:
        """Return the unbiased covariance S, shrunk towards a multiple of the identity: (1 - s) S + s tr(S)/width I.

        Args:
            shrinkage: The share s, in [0, 1]; None takes that of ``compute_shrinkage``.

        Raises:
            DataError: If there are fewer than two features.
        """
        covariance = self._center().products / (self.count - 1)
        share = self.compute_shrinkage() if shrinkage is None else shrinkage
        identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
        return (1 - share) * covariance + share * covariance.trace() / len(covariance) * identity

    def compute_shrinkage(self) -> float:
        """Return the share of the identity that is expected to give the best covariance, in [0, 1].

        It is the expected error of the covariance, relative to its distance from the identity (Ledoit & Wolf, 2004,
        "A well-conditioned estimator for large-dimensional covariance matrices").

        Raises:
            DataError: If there are fewer than two features.
        """
        centered = self._center()
        covariance = centered.products / self.count
        square = covariance.square().sum()
        distance = square - covariance.trace().square() / len(covariance)
        error = (centered.quartics / self.count - square) / self.count
        if not distance > 0 or not error > 0:
            return 0.0
        return float((error / distance).clamp_max(1.0))

    def reduce(self) -> Moments:
        """Return the sum over the processes of ``torch.distributed``; these moments where there is one process."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return self
        origin = self.origin.clone()
        distributed.broadcast(origin, 0)
        sums = {name: value.clone() for name, value in vars(self.move(origin)).items() if name != "origin"}
        for tensor in sums.values():
            distributed.all_reduce(tensor)
        return Moments(origin=origin, **sums)

    def _center(self) -> Moments:
        """Return the sums about the mean."""
        if self.count < 2:
            raise DataError(f"a covariance needs at least two features, got {int(self.count)}; give more data")
        return self.move(self.mean)


def merge(first: Moments, second: Moments) -> Moments:
    """Return the moments of both sets of features together."""
    moved = second.move(first.origin)
    return Moments(
        first.count + second.count,
        first.origin,
        first.total + moved.total,
        first.products + moved.products,
        first.cubes + moved.cubes,
        first.quartics + moved.quartics,
    )


class Gaussian(nn.Module):
    """A mean and a whitening factor, stored in float32 whatever type the model is moved to.

    Args:
        width: Width of the features.
        rank: Number of directions of largest variance that are kept; in all others the variance is their mean
            (Tipping & Bishop, 1999, "Probabilistic principal component analysis"). None keeps all.
    """

    mean: Float[Tensor, " width"]
    whitening: Float[Tensor, "rank width"]  #: rows u / sqrt(variance) of eigenvectors u
    variances: Float[Tensor, " rank"]
    rest: Float[Tensor, ""]  #: precision in all other directions; 0 where there are none

    def __init__(self, width: int, rank: int | None = None) -> None:
        super().__init__()
        kept = width if rank is None else min(rank, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("whitening", torch.zeros(kept, width))
        self.register_buffer("variances", torch.zeros(kept))
        self.register_buffer("rest", torch.zeros(()))

    def fit(self, moments: Moments, shrinkage: float | None = None) -> None:
        """Take mean and covariance of moments; see ``Moments.compute_covariance`` for the shrinkage.

        Raises:
            DataError: If there are fewer than two features, or their covariance is singular.
        """
        variances, vectors = torch.linalg.eigh(moments.compute_covariance(shrinkage))
        kept, width = self.whitening.shape
        others = variances[: width - kept]
        variances, vectors = variances[width - kept :], vectors[:, width - kept :]
        lowest = torch.cat([variances, others.mean()[None]]).min() if len(others) else variances.min()
        if not lowest * _SINGULAR > variances.max():
            raise DataError(
                f"the covariance of {int(moments.count)} features of width {width} has no inverse; give more data, or "
                "a larger shrinkage, e.g. shrinkage=0.1"
            )
        self.mean.copy_(moments.mean)
        self.whitening.copy_((vectors / variances.sqrt()).T)
        self.variances.copy_(variances)
        self.rest.copy_(1 / others.mean() if len(others) else torch.zeros(()))

    def forward(self, features: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
        """Return the distance of each feature to the Gaussian, at least 0; in float32 or wider."""
        wide = torch.float64 if features.dtype == torch.float64 else torch.float32
        whitening = self.whitening.to(wide)
        apart = features.to(wide) - self.mean.to(wide)
        coordinates = apart @ whitening.T
        squares = coordinates.square().sum(-1)
        if len(whitening) < whitening.shape[1]:
            outside = apart - (coordinates * self.variances.to(wide)) @ whitening
            squares = squares + self.rest.to(wide) * outside.square().sum(-1)
        return squares.sqrt()

    def _apply(self, fn: Any, recurse: bool = True) -> Gaussian:
        """Move to a device and keep the type: a whitening factor in bfloat16 would be worth nothing."""
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in kept.items():
            moved = getattr(self, name)
            setattr(self, name, moved.float() if buffer.is_meta else buffer.to(moved.device))
        return self
