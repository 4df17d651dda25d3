"""Layouts: how the values of one layer lie on ranks.

A value is an array (rows, ..., width): rows are samples, the last axis has the features.

- ``samples``: each rank has a part of the rows; ``features``: each has all rows and a part of the last axis
- ``whole``: each rank has all of it
- ``partial``: each has an array of the whole's shape, and the value is their sum

Parts are as equal as can be, and empty where there are fewer rows or features than ranks.
"""

from __future__ import annotations

from typing import NamedTuple


class Region(NamedTuple):
    """Rows and features of a value: first and last, the last exclusive."""

    first_row: int
    last_row: int
    first: int
    last: int

    @property
    def size(self) -> int:
        """Rows times features."""
        return max(0, self.last_row - self.first_row) * max(0, self.last - self.first)

    def meet(self, other: Region) -> Region:
        """What both have; of size 0 where that is nothing."""
        return Region(
            max(self.first_row, other.first_row),
            min(self.last_row, other.last_row),
            max(self.first, other.first),
            min(self.last, other.last),
        )


def part(count: int, parts: int, number: int) -> slice:
    """Part ``number`` of ``count`` things in so many parts."""
    return slice(count * number // parts, count * (number + 1) // parts)


class Layout(NamedTuple):
    """A kind, and the ranks that have a part, in order. Made by ``lay``."""

    kind: str
    ranks: tuple[int, ...]

    def region(self, rank: int, rows: int, width: int) -> Region:
        """What ``rank``, one of those that have a part, has of a value."""
        number, parts = self.ranks.index(rank), len(self.ranks)
        if self.kind == "samples":
            mine = part(rows, parts, number)
            return Region(mine.start, mine.stop, 0, width)
        if self.kind == "features":
            mine = part(width, parts, number)
            return Region(0, rows, mine.start, mine.stop)
        return Region(0, rows, 0, width)

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        return f"on rank {ranks}" if len(self.ranks) == 1 else f"{self.kind} on ranks {ranks}"


def lay(kind: str, ranks: tuple[int, ...]) -> Layout:
    """The layout; on one rank all kinds are ``whole``."""
    return Layout("whole" if len(ranks) == 1 else kind, ranks)
