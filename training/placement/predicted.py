"""What a placement sends in a step, in closed form: bytes out of each rank, by what they are for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from bitring.compression.encoder import Encoder
from bitring.training.placement.assignment import Placed
from bitring.training.placement.layout import part
from bitring.training.placement.parts import Part
from bitring.training.placement.wiring import Edge, Wiring


class Traffic(NamedTuple):
    """Bytes out of each rank of a replica in a step. ``edges``: of values, forward and backward, by edge.

    ``sums``: of gradients, exact, over ranks of the replica that have the same part: 2(h−1)/h of it with h ranks.
    ``replicas``: of gradients between replicas, the same in mode "sync" without compression.
    """

    edges: list[tuple[Edge, list[int], list[int]]]
    sums: list[int]
    replicas: list[int]

    @property
    def total(self) -> list[int]:
        """Out of each rank."""
        values = [[there[i] + back[i] for _, there, back in self.edges] for i in range(len(self.sums))]
        return [sum(values[i]) + self.sums[i] + self.replicas[i] for i in range(len(self.sums))]


class Picture(NamedTuple):
    """A placement to be drawn: its nodes, the width of each one's values, a replica's samples, and what travels.

    ``words``: by the number of an edge, the name of its conversion.
    """

    placed: list[Placed]
    widths: list[int]
    samples: int
    traffic: Traffic
    words: dict[int, str]


def predicted(
    wiring: Wiring,
    parts: Mapping[str, Part],
    shapes: Mapping[str, tuple[int, ...]],
    ranks: int,
    replicas: int,
    samples: int,
    itemsize: int,
    encoder: Encoder | None,
) -> Traffic:
    """Of a replica with so many ranks that gets so many ``samples`` a step, whose values travel by ``encoder``."""

    def nbytes_of(values: int) -> int:
        return values * itemsize if encoder is None else encoder.nbytes(values)

    edges: list[tuple[Edge, list[int], list[int]]] = []
    for edge in wiring.edges.values():
        both = [wiring.nbytes_sent(edge, samples, rank, nbytes_of) for rank in range(ranks)]
        there, back = ([each[way] for each in both] for way in (0, 1))
        if any(there) or any(back):
            edges.append((edge, there, back))
    sums, between = [0.0] * ranks, [0.0] * ranks
    for name, each in parts.items():
        for rank in each.ranks:
            nbytes = itemsize * math.prod(shapes[name])
            if each.axis is None:
                sums[rank] += 2 * (len(each.ranks) - 1) / len(each.ranks) * nbytes
            else:
                length = shapes[name][each.axis]
                mine = part(length, len(each.ranks), each.ranks.index(rank))
                nbytes = nbytes // length * (mine.stop - mine.start) if length else 0
            between[rank] += 2 * (replicas - 1) / replicas * nbytes
    return Traffic(edges, list(map(round, sums)), list(map(round, between)))
