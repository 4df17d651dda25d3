"""Conversions of a value from one layout to another, as data: what moves from which rank to which; and their adjoints.

A conversion is one hop or two. In a hop each rank that has a part afterwards has the sum of what moves to it. So a hop
is linear in what all ranks have, and with every move turned around it is its adjoint: ⟨Ax, y⟩ = ⟨x, A*y⟩. The gradient
of a value travels by the adjoint. What a rank keeps is a move to itself; each move to another rank is one message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bitring.training.placement.layout import Layout, Region, lay


class Move(NamedTuple):
    """A region of the value goes from rank ``source`` to rank ``to``."""

    source: int
    to: int
    region: Region


class Hop(NamedTuple):
    """Moves that make the layout ``after`` of ``before``, of a value (rows, ..., width); sums in the moves' order."""

    before: Layout
    after: Layout
    rows: int
    width: int
    moves: tuple[Move, ...]

    @property
    def adjoint(self) -> Hop:
        """Every move turned around. Layouts say where parts lie; what was summed is now copied, and the reverse."""
        turned = tuple(Move(to, source, region) for source, to, region in self.moves)
        return Hop(self.after, self.before, self.rows, self.width, turned)

    def before_it(self, rank: int) -> Region:
        """What ``rank`` has before the hop."""
        return self.before.region(rank, self.rows, self.width)

    def after_it(self, rank: int) -> Region:
        """What ``rank`` has after it."""
        return self.after.region(rank, self.rows, self.width)

    def sums(self, rank: int) -> bool:
        """Whether what moves to ``rank`` overlaps or leaves gaps, so that it has to be added to zeros."""
        regions = [move.region for move in self.moves if move.to == rank]
        overlap = any(a.meet(b).size for i, a in enumerate(regions) for b in regions[:i])
        return overlap or sum(region.size for region in regions) != self.after_it(rank).size

    def sent(self, rank: int) -> list[Move]:
        """What ``rank`` sends to others, each a message."""
        return [move for move in self.moves if move.source == rank != move.to]


def conversion(before: Layout, after: Layout, rows: int, width: int) -> tuple[Hop, ...]:
    """The hops from one layout to another, of a value (rows, ..., width); none where they are the same.

    A sum that several ranks want whole is made in parts, each by one rank, which then go to all: 2(p−1)/p of the value
    out of a rank instead of p−1 times all of it.
    """
    if before == after:
        return ()
    if before.kind == "partial" and after.kind == "whole" and len(after.ranks) > 1:
        between = lay("samples", after.ranks)
        if rows < len(after.ranks) <= width:
            between = lay("features", after.ranks)
        return conversion(before, between, rows, width) + conversion(between, after, rows, width)
    moves = tuple(move for move in _moves(before, after, rows, width) if move.region.size)
    return (Hop(before, after, rows, width, moves),)


def in_words(before: Layout, after: Layout) -> str:
    """The conversion's name among collectives."""
    one, to_one = len(before.ranks) == 1, len(after.ranks) == 1
    if one and to_one:
        return "send" if before != after else "nothing"
    if before.kind == "partial":
        if after.kind == "whole":
            return "reduce" if to_one else "reduce-scatter and allgather"
        return "reduce-scatter"
    if one:
        return "broadcast" if after.kind == "whole" else "scatter"
    if before.kind == "whole":
        return "slice"
    if after.kind == "whole":
        return "gather" if to_one else "allgather"
    return "all-to-all"


def _moves(before: Layout, after: Layout, rows: int, width: int) -> Iterator[Move]:
    if after.kind == "partial":
        # Each value goes to one rank: where it is, if that rank has a part afterwards.
        for number, source in enumerate(before.ranks if before.kind != "whole" else _first(before, after)):
            to = source if source in after.ranks else after.ranks[number % len(after.ranks)]
            yield Move(source, to, before.region(source, rows, width))
        return
    for number, to in enumerate(after.ranks):
        wanted = after.region(to, rows, width)
        if before.kind == "whole":
            source = to if to in before.ranks else before.ranks[number % len(before.ranks)]
            yield Move(source, to, wanted)
        else:
            for source in before.ranks:
                yield Move(source, to, wanted.meet(before.region(source, rows, width)))


def _first(before: Layout, after: Layout) -> tuple[int, ...]:
    """The rank that gives a value which all of ``before`` have."""
    return (next((rank for rank in before.ranks if rank in after.ranks), before.ranks[0]),)
