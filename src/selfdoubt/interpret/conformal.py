"""Split conformal prediction of numbers: intervals that cover the target as often as they say, for any model."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from selfdoubt.errors import ConfigError, ShapeError
from selfdoubt.fields import flag, listing, number, whole
from selfdoubt.interpret.arguments import ArrayLike, check_level, read_numbers, read_pair, read_scale, to_float64
from selfdoubt.interpret.intervals import Interval
from selfdoubt.interpret.quantiles import find_quantile, parse_fitted

_KINDS = {
    "quantiles": listing(number(0), 1),
    "shape": listing(whole(1)),
    "level": number(above=0, below=1),
    "n": whole(1),
    "scaled": flag,
}


@dataclass(frozen=True)
class ConformalIntervals:
    """Half-widths of intervals, fitted on rows that the model has not seen.

    If calibration rows and later ones are exchangeable (drawn in the same way), an interval covers its target with a
    probability of at least ``level``, over the draw of both (Papadopoulos et al., 2002; Lei et al., 2018). That is a
    mean over rows: rare kinds of rows may be covered less often. Several outputs of a row are covered one by one, not
    all together.
    """

    quantiles: tuple[float, ...]  #: half-width of each output: in its unit or, where ``scaled``, in units of its risk
    shape: tuple[int, ...]  #: shape of one row: () for one number, (k,) for k outputs
    level: float  #: share of targets that is covered, in (0, 1)
    n: int  #: number of calibration rows
    scaled: bool  #: True if the width follows the risk

    def __post_init__(self) -> None:
        if len(self.quantiles) != math.prod(self.shape):
            raise ConfigError(
                f"a row of shape {self.shape} needs {math.prod(self.shape)} quantiles, got {len(self.quantiles)}"
            )

    @classmethod
    def fit(
        cls, y: ArrayLike, target: ArrayLike, risk: ArrayLike | None = None, *, level: float = 0.9
    ) -> ConformalIntervals:
        """Return the smallest half-widths that cover: the ceil((n + 1) level)-th smallest score of n rows.

        Scores are |target - y| or, with a risk, |target - y| / risk: then uncertain rows get wider intervals.

        Args:
            y: Predictions for rows that were not used in training, ``(n,)`` or ``(n, ...)``.
            target: Their targets, of the same shape: (n, 1) and (n,) are not.
            risk: Their risks, of the same shape, above 0; any that grows with the error.
            level: Share of targets to cover, in (0, 1).

        Raises:
            ConfigError: If the level is outside (0, 1).
            ShapeError: If the shapes differ, or there are no rows.
            NonFiniteError: If a number is NaN or infinite.
            DataError: If there are too few rows for the level, or a risk is not above 0.

        Example:
            >>> intervals = ConformalIntervals.fit([0.0] * 9, [1.0, -2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, -9.0])
            >>> intervals
            ConformalIntervals(quantiles=(9.0,), shape=(), level=0.9, n=9, scaled=False)
            >>> intervals.predict([10.0])
            Interval(low=tensor([1.]), high=tensor([19.]))
        """
        check_level(level)
        mean, truth = read_pair(_read_rows(y), target, ("y", "target"))
        scores = (to_float64(truth) - to_float64(mean)).abs()
        if risk is not None:
            scores = scores / to_float64(read_scale(mean, risk)[1])
        quantiles = find_quantile(scores, level).flatten().tolist()
        return cls(tuple(quantiles), tuple(mean.shape[1:]), float(level), len(mean), risk is not None)

    def predict(self, y: ArrayLike, risk: ArrayLike | None = None) -> Interval:
        """Return the interval of each prediction: y -+ quantile, times the risk where it was fitted with one.

        Args:
            y: Predictions, ``(batch, ...)`` with the rows' shape.
            risk: Their risks, of the same shape, above 0, exactly if it was fitted with risks.

        Raises:
            ConfigError: If a risk is missing, or is not used.
            ShapeError: If the shapes differ, or there are no rows.
            NonFiniteError: If a number is NaN or infinite.
            DataError: If a risk is not above 0.
        """
        if (risk is not None) != self.scaled:
            repair = "give predict(y, risk)" if self.scaled else "give predict(y), or fit(y, target, risk)"
            raise ConfigError(
                f"intervals fitted {'with' if self.scaled else 'without'} a risk are predicted "
                f"{'with' if self.scaled else 'without'} one; {repair}"
            )
        mean = _read_rows(y)
        if tuple(mean.shape[1:]) != self.shape:
            raise ShapeError(
                f"y must be {('batch', *self.shape)} as in calibration, got {tuple(mean.shape)}; "
                "try y.reshape(-1, *intervals.shape)"
            )
        centre = to_float64(mean)  # in float32 a target at the very end could fall out
        half = torch.tensor(self.quantiles, dtype=centre.dtype, device=centre.device).reshape(self.shape)
        if risk is not None:
            half = half * to_float64(read_scale(mean, risk)[1])
        return Interval((centre - half).to(mean), (centre + half).to(mean))

    def to_json(self) -> dict[str, Any]:
        """Return plain data; ``parse`` reads it."""
        return asdict(self) | {"quantiles": list(self.quantiles), "shape": list(self.shape)}

    @classmethod
    def parse(cls, entry: Any) -> ConformalIntervals:
        """Return the intervals that ``to_json`` described.

        Raises:
            DataError: If it has another form.

        Example:
            >>> intervals = ConformalIntervals((2.0,), (), level=0.9, n=99, scaled=False)
            >>> ConformalIntervals.parse(intervals.to_json()) == intervals
            True
        """
        return parse_fitted(cls, entry, _KINDS, "conformal intervals")


def _read_rows(y: ArrayLike) -> Float[Tensor, "rows *rest"]:
    numbers = read_numbers(y, "y")
    if not numbers.ndim:
        raise ShapeError("y must have an axis of rows, got one number; try y[None]")
    return numbers
