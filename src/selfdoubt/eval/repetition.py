"""Detects answers that repeat themselves: judges that count shared words reward such loops. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from selfdoubt.eval.judges.signs import HANGUL, UNSPACED

#: A loop is a part that stands at least ``TIMES`` times in a row (two whole ones and half of a third), that has at
#: least ``SHORTEST`` units (words, or characters of scripts without spaces) in all, and that fills ``SHARE`` of all.
TIMES, SHORTEST, SHARE = 2.5, 6, 0.5
_UNIT = re.compile(rf"[{UNSPACED}{HANGUL}]|[^\W{UNSPACED}{HANGUL}]+")


def is_repeating(text: str) -> bool:
    """Return whether an answer is mostly a loop: one part two and a half times in a row or more.

    Parts are made of words in lower case without signs, of scripts without spaces of characters. A loop may begin after
    some words, and end within a part as answers that are cut do; it has at least six words and fills at least half of
    the answer. A list whose lines begin alike, a refrain, and a short answer do not count.

    Example:
        >>> is_repeating("I'm not a game. I'm a game. I'm a game. I'm a game.")
        True
        >>> is_repeating("No, no, no!"), is_repeating("Paris")
        (False, False)
    """
    units = _UNIT.findall(text.lower())
    longest = max((_run(units, period) for period in range(1, int(len(units) / TIMES) + 1)), default=0)
    return longest >= max(SHARE * len(units), SHORTEST)


def _run(units: Sequence[str], period: int) -> int:
    """Return the longest stretch that equals itself ``period`` units later, with its first part; 0 without a loop."""
    best = now = 0
    for i in range(period, len(units)):
        now = now + 1 if units[i] == units[i - period] else 0
        best = max(best, now)
    return best + period if best >= (TIMES - 1) * period else 0
