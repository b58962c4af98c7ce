"""The quantile of calibration scores that covers one more score as often as it says, whatever their distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor

from selfdoubt.errors import ConfigError, DataError
from selfdoubt.fields import FieldCheck, FieldError, record
from selfdoubt.interpret.arguments import check_level

T = TypeVar("T")

#: Room for rounding of (n + 1) * level, of one score.
_ROUNDING = 1e-9


def find_quantile(scores: Float[Tensor, "rows *rest"], level: float) -> Float[Tensor, "*rest"]:
    """Return the k-th smallest score of each column, k = ceil((n + 1) level).

    If the n scores and the next one are exchangeable, the next one is at most this with a probability of at least
    ``level``, and less than level + 1 / (n + 1) where no scores are equal (Vovk, Gammerman & Shafer, 2005; Lei et al.,
    2018, "Distribution-free predictive inference for regression", theorem 2.2).

    Raises:
        ConfigError: If the level is outside (0, 1).
        DataError: If there are too few scores for the level.

    Example:
        >>> find_quantile(torch.arange(1.0, 10.0), 0.9).item()
        9.0
    """
    check_level(level)
    n = len(scores)
    k = max(1, math.ceil((n + 1) * level - _ROUNDING))
    if k > n:
        least = math.ceil(level / (1 - level) - _ROUNDING)
        raise DataError(
            f"a level of {level:g} needs at least {least} calibration rows, got {n}; give more, or a lower level"
        )
    return scores.sort(0).values[k - 1]


def parse_fitted(cls: Callable[..., T], entry: Any, kinds: Mapping[str, FieldCheck], title: str) -> T:
    """Build a fitted object from its stored fields.

    Raises:
        DataError: If it has another form.
    """
    try:
        return cls(**record(kinds)(entry, title))
    except (FieldError, ConfigError) as error:
        raise DataError(f"{error}; fit it again") from None
