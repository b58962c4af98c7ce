"""``Estimate``: a number with its confidence interval, as metrics return it and reports store it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfdoubt.errors import DataError


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, or the reason why there is none.

    Example:
        >>> Estimate(0.5, 0.25, 0.75).to_json()
        {'value': 0.5, 'low': 0.25, 'high': 0.75}
        >>> Estimate.missing("no answer is judged").to_json()
        {'value': None, 'low': None, 'high': None, 'why': 'no answer is judged'}
    """

    value: float | None  #: on the answers as they are; None: undefined, and ``note`` says why
    low: float | None = None
    high: float | None = None
    note: str | None = None
    p: float | None = None  #: two-sided p-value; only of a difference
    failed: int = 0  #: resamples on which the metric was undefined: not part of the interval, and not stored

    @classmethod
    def missing(cls, note: str) -> Estimate:
        """Return an estimate without a number, which says why."""
        return cls(None, note=note)

    def to_json(self) -> dict[str, Any]:
        """Return plain data: ``value``, ``low``, ``high``, and ``why`` and ``p`` where they are known."""
        more = {"why": self.note, "p": self.p}
        entry = {"value": self.value, "low": self.low, "high": self.high}
        return entry | {key: value for key, value in more.items() if value is not None}

    @classmethod
    def parse(cls, entry: Any) -> Estimate:
        """Return the estimate that ``to_json`` described.

        Raises:
            DataError: If it is of another form.
        """
        if not isinstance(entry, Mapping) or not {"value", "low", "high"} <= set(entry):
            raise DataError(f"an estimate must have value, low and high, got {str(entry)[:80]}; measure again")
        value, low, high, p = numbers = [entry.get(key) for key in ("value", "low", "high", "p")]
        for key, number in zip(("value", "low", "high", "p"), numbers, strict=True):
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
            if number is not None and not is_number:
                raise DataError(f"{key} of an estimate must be a finite number or null, got {number!r}; measure again")
        note = entry.get("why")
        if not isinstance(note, str | None):
            raise DataError(f"why of an estimate must be a text, got {note!r}; measure again")
        return cls(value, low, high, note, p)
