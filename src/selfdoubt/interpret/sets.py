"""Split conformal prediction of classes: sets that hold the true class as often as they say, for any classifier."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from selfdoubt.errors import ConfigError, ShapeError
from selfdoubt.fields import choice, number, whole
from selfdoubt.interpret.arguments import ArrayLike, check_level, read_labels, read_probabilities, to_float64
from selfdoubt.interpret.quantiles import find_quantile, parse_fitted

SetMethod = Literal["lac", "aps"]

_KINDS = {
    "method": choice("lac", "aps"),
    "quantile": number(0, 1),
    "classes": whole(2),
    "level": number(above=0, below=1),
    "n": whole(1),
}


@dataclass(frozen=True)
class ConformalSets:
    """The bound of a score below which a class is in the set, fitted on rows that the model has not seen.

    If calibration rows and later ones are exchangeable (drawn in the same way), a set holds the true class with a
    probability of at least ``level``, over the draw of both. The most probable class is always in it.

    "lac" scores a class by 1 - p: the smallest sets on average (Sadinle, Lei & Wasserman, 2019, "Least ambiguous
    set-valued classifiers with bounded error levels"). "aps" scores it by the sum of all probabilities from the largest
    down to its own: larger sets, more evenly right over easy and hard rows (Romano, Sesia & Candes, 2020,
    "Classification with valid and adaptive coverage"; without their random part).
    """

    method: SetMethod
    quantile: float  #: largest score of a class in the set, in [0, 1]
    classes: int  #: number of classes
    level: float  #: share of true classes that is covered, in (0, 1)
    n: int  #: number of calibration rows

    @classmethod
    def fit(
        cls, probs: ArrayLike, labels: ArrayLike, *, level: float = 0.9, method: SetMethod = "lac"
    ) -> ConformalSets:
        """Return the smallest bound that covers: the ceil((n + 1) level)-th smallest score of the true classes.

        Args:
            probs: Class probabilities of rows that were not used in training, ``(n, classes)``.
            labels: Indices of their true classes, ``(n,)``.
            level: Share of true classes to cover, in (0, 1).
            method: "lac" or "aps".

        Raises:
            ConfigError: If the level is outside (0, 1), or the method is another one.
            ShapeError: If the shapes do not fit, or there are no rows.
            NonFiniteError: If a number is NaN or infinite.
            DataError: If they are not probabilities, a label is not a class, or there are too few rows for the level.

        Example:
            >>> probs = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]])
            >>> sets = ConformalSets.fit(probs, torch.tensor([0, 1, 2]), level=0.75)
            >>> sets.predict(torch.tensor([[0.45, 0.45, 0.1]])).tolist()
            [[True, True, False]]
        """
        check_level(level)
        if method not in ("lac", "aps"):
            raise ConfigError(f'method must be "lac" or "aps", got {method!r}')
        p = read_probabilities(probs)
        if p.ndim != 2:
            raise ShapeError(
                f"probs must be (rows, classes) in calibration, got {tuple(p.shape)}; try probs.flatten(0, -2)"
            )
        truth = read_labels(labels, tuple(p.shape[:-1]), p.shape[-1])
        scores = _score(to_float64(p), method)
        scores = scores.gather(-1, truth.to(scores.device)[:, None])[:, 0]
        return cls(method, float(find_quantile(scores, level)), p.shape[-1], float(level), len(p))

    def predict(self, probs: ArrayLike) -> Bool[Tensor, "*batch classes"]:
        """Return which classes are in the set of each row.

        Args:
            probs: Class probabilities, ``(*batch, classes)``.

        Raises:
            ShapeError: If there are other classes.
            NonFiniteError: If a number is NaN or infinite.
            DataError: If they are not probabilities.
        """
        p = read_probabilities(probs)
        if p.shape[-1] != self.classes:
            raise ShapeError(f"the sets were fitted on {self.classes} classes, got {p.shape[-1]}; fit them again")
        inside = _score(to_float64(p), self.method) <= self.quantile
        return inside.to(p.device) | (p == p.amax(-1, keepdim=True))

    def to_json(self) -> dict[str, Any]:
        """Return plain data; ``parse`` reads it."""
        return asdict(self)

    @classmethod
    def parse(cls, entry: Any) -> ConformalSets:
        """Return the sets that ``to_json`` described.

        Raises:
            DataError: If it has another form.

        Example:
            >>> sets = ConformalSets("lac", 0.6, classes=3, level=0.9, n=99)
            >>> ConformalSets.parse(sets.to_json()) == sets
            True
        """
        return parse_fitted(cls, entry, _KINDS, "conformal sets")


def _score(p: Float[Tensor, "*batch classes"], method: SetMethod) -> Float[Tensor, "*batch classes"]:
    """Return the score of every class, in [0, 1]; equal probabilities have equal scores."""
    if method == "lac":
        return 1 - p
    descending, order = p.sort(-1, descending=True)
    sums = descending.cumsum(-1).clamp_max(1)
    last = torch.searchsorted(-descending, -descending, right=True) - 1  # of equal ones
    return torch.zeros_like(p).scatter(-1, order, sums.gather(-1, last))
