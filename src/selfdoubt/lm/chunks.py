"""Chooses the sizes of the chunks in which prompts and texts are read, so that each takes about a given time."""

from __future__ import annotations

import math

#: Fewest tokens of a piece: below, the fixed cost of a pass outweighs that of its tokens.
FEWEST = 8


class ChunkSizer:
    """A sizer of chunks of prompts and texts, which learns from the time that earlier chunks took.

    A piece costs a fixed time and a time per token, which grows with the context. The fixed time is the shortest that
    any piece took, and grows by and by where the smallest pieces take longer, as on a processor that others use, too.
    The time per token is learnt apart for each doubling of the context. Sizes are powers of two and one and a half
    times such, so that a model meets few shapes.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._fixed = math.inf
        self._rates: dict[int, float] = {}  # of the context's bit length: seconds per token
        self._handed: list[tuple[int, int]] = []  # context and tokens of each piece since ``begin``

    def begin(self, seconds: float) -> None:
        """Set the time that the next chunk should take.

        It may always take half as long again as a pass costs anyway, however little it reads.
        """
        self._seconds = seconds
        self._handed = []

    def tokens(self, context: int) -> float:
        """Return the number of tokens, of all rows together, that the next piece should read after this context."""
        if not self._rates:
            return FEWEST
        fixed = 0.0 if math.isinf(self._fixed) else self._fixed
        place = context.bit_length()
        below = [known for known in self._rates if known <= place]
        rate = self._rates[max(below) if below else min(self._rates)]
        return max(FEWEST, max(self._seconds - fixed, fixed / 2) / rate)

    def columns(self, rows: int, context: int, most: int) -> int:
        """Choose the size of the next piece.

        Args:
            rows: Sequences times members.
            context: Columns that were read before.
            most: Columns that are left, or that memory allows.

        Returns:
            A number of columns between 1 and ``most``.
        """
        size = min(most, _rounded(self.tokens(context) / rows))
        self._handed.append((context, rows * size))
        return size

    def learn(self, seconds: float) -> None:
        """Learn from the time that the pieces chosen since ``begin`` took."""
        handed, self._handed = self._handed, []
        if not handed:
            return
        known = 0.0 if math.isinf(self._fixed) else self._fixed
        each = seconds / len(handed)
        tokens = sum(size for _, size in handed)
        if each > self._fixed and tokens <= FEWEST * len(handed):  # passes have become slower, whatever they read
            self._fixed += (each - self._fixed) / 8
        else:
            self._fixed = min(self._fixed, each)
        rate = max(seconds - min(known, self._fixed) * len(handed), seconds / 4, 1e-9) / tokens
        for place in {context.bit_length() for context, _ in handed}:
            old = self._rates.get(place, rate)
            self._rates[place] = max(rate, (old + rate) / 2)  # slower counts at once, quicker by and by


def _rounded(value: float) -> int:
    """Return the largest of 1, 2, 3, 4, 6, 8, 12, 16, ... up to ``value``; 1 for smaller values."""
    whole = max(1, int(min(value, 2.0**40)))
    power = 1 << (whole.bit_length() - 1)
    return power + power // 2 if whole >= power + power // 2 else power
