"""Five levels of a token's risk and their colours, for terminals and pages alike."""

from __future__ import annotations

#: Upper bounds in nats of the levels but the last.
BOUNDS = (0.05, 0.25, 0.75, 1.5)
#: A colour for each level: from blue to vermilion in steps that colour-blind eyes tell apart too (after Okabe & Ito,
#: 2008). A page or terminal underlines the last as well.
COLOURS = ("#56b4e9", "#9fc6a0", "#f0e442", "#e69f00", "#ff6a3d")


def find_risk_level(risk: float) -> int:
    """Return the level of a risk: 0 for the surest of the five, 4 for the most doubtful.

    Args:
        risk: Risk of one token, in nats.

    Example:
        >>> find_risk_level(0.0), find_risk_level(0.3), find_risk_level(9.0)
        (0, 2, 4)
    """
    return sum(risk > bound for bound in BOUNDS)
