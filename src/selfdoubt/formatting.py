"""Formats numbers for people."""

from __future__ import annotations


def format_percent(share: float | None, *, digits: int = 1, more: str = ">", less: str = "<") -> str:
    """Return a share as a percentage; a share a little below 1 or above 0 is never rounded to 100 % or 0 %.

    Args:
        share: Share in [0, 1]; None gives "unknown".
        digits: Most digits after the point; zeros at the end are left out.
        more: Precedes the largest percentage below 100 where rounding would give 100.
        less: Precedes the smallest percentage above 0 where rounding would give 0.

    Example:
        >>> format_percent(0.5), format_percent(0.9996), format_percent(1.0)
        ('50 %', '>99.9 %', '100 %')
        >>> format_percent(0.001, digits=0, less="under ")
        'under 1 %'
    """
    if share is None:
        return "unknown"
    text = f"{100 * share:.{digits}f}"
    smallest = 10.0**-digits
    if float(text) == 100 and share < 1:
        return f"{more}{100 - smallest:.{digits}f} %"
    if float(text) == 0 and share > 0:
        return f"{less}{smallest:.{digits}f} %"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"
