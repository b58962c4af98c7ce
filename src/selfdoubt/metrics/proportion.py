"""Wilson's interval of a share, and shares of answers as estimates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from selfdoubt.metrics.estimate import Estimate


def wilson_interval(share: float, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval (1927) of a share of ``n``: neither empty nor outside [0, 1] where all or none hit.

    Example:
        >>> low, high = wilson_interval(1.0, 10)
        >>> round(low, 3), round(high, 3)
        (0.722, 1.0)
    """
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def estimate_share(hits: Sequence[bool], *, level: float = 0.95) -> Estimate:
    """Return the share of hits with Wilson's interval; of no values, an estimate that is missing.

    Example:
        >>> found = estimate_share([True, True, True, False])
        >>> found.value, round(found.low, 2), round(found.high, 2)
        (0.75, 0.3, 0.95)
    """
    if not hits:
        return Estimate.missing("there is nothing to count")
    share = sum(hits) / len(hits)
    return Estimate(share, *wilson_interval(share, len(hits), level=level))
