"""Finds stop texts in an answer while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy


class StopFinder:
    """A finder of the first of several stop texts in a text that comes in pieces.

    A character costs a constant time for each stop on average, however long the stop and the text are (Knuth, Morris
    and Pratt, 1977). The table of a stop grows only as far as the text has ever followed it, so a stop that never
    comes costs nothing for its length.

    Args:
        stops: Texts; none of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.length = 0  #: characters of the text so far
        self.stop: str | None = None  #: the stop that ``feed`` found last
        self._stops = [_Stop(stop) for stop in stops]

    @property
    def partial(self) -> int:
        """The length of the text's longest end with which a stop begins."""
        return max((stop.matched for stop in self._stops), default=0)

    def feed(self, piece: str) -> int | None:
        """Add the next piece of text.

        Returns:
            The position where a stop begins that ends within this piece; of several, the lowest; None without a stop.
        """
        ends = [(self.length + end - len(s.text), s.text) for s in self._stops if (end := s.feed(piece)) is not None]
        self.length += len(piece)
        start, self.stop = min(ends, default=(None, self.stop))
        return start

    def fork(self) -> StopFinder:
        """Return a copy of the finder in its present state."""
        other = copy(self)
        other._stops = [copy(stop) for stop in self._stops]  # they share their tables
        return other


class _Stop:
    """One stop and how much of it the text ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._back = [0]  # of each beginning, from one character on: its longest proper beginning that is also its end

    def feed(self, piece: str) -> int | None:
        """Return the place in the piece behind the first complete stop."""
        text, at = self.text, 0
        while at < len(piece):
            if not self.matched:  # most text begins no stop
                at = piece.find(text[0], at)
                if at < 0:
                    return None
            elif piece[at] != text[self.matched]:
                self.matched = self._shorter(self.matched)
                continue
            self.matched += 1
            at += 1
            if self.matched == len(text):
                self.matched = self._shorter(len(text))
                return at
        return None

    def _shorter(self, length: int) -> int:
        """Return the length of the longest shorter beginning that the text also ends with."""
        while len(self._back) < length:
            character, matched = self.text[len(self._back)], self._back[-1]
            while matched and self.text[matched] != character:
                matched = self._back[matched - 1]
            self._back.append(matched + (self.text[matched] == character))
        return self._back[length - 1]
