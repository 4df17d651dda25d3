"""Double binary tree: two trees, each carrying one half of the buffer; an inner rank of one is a leaf of the other.

In a single binary tree half of the ranks are leaves, which send but never forward. With two trees every rank works in
both directions, and pipelined by segments n bytes on p ranks take about 2nβ + O(lg p)·α for AllReduce, and about nβ +
O(lg p)·α for reduce and for broadcast: the ring's bandwidth, with a latency that grows with lg p only. See Sanders,
Speck and Träff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan" (2009).

Unpipelined, AllReduce takes at most 4⌊lg p⌋ rounds of n/2 bytes. The first tree is the in-order tree over the places 1
to m, where odd places are leaves; the second is the same tree mirrored (m even) or shifted by one (m odd), so that even
places are leaves. Every transfer has a step on a common clock: a place with t trailing zero bits sends up in step 2t
from the left and 2t+1 from the right, and a broadcast is a reduce run backwards. So leaves send in steps 0 and 1, inner
ranks later, and in each step a rank sends at most once and receives at most once. (The paper also colours the edges so
that a long pipeline alternates strictly; here a rank just sends whichever segment is there.)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from bitring.collectives.schedules.schedule import Algorithm, Receive, Round, Send


class DoubleBinaryTree(Algorithm):
    """Double-binary-tree AllReduce, reduce and broadcast."""

    def chunks(self, size: int) -> int:
        """Half of the buffer a tree."""
        return 2

    def allreduce(self, rank: int, size: int) -> Iterator[Round]:
        """Each tree reduces to its own root, which sends the sum down again: the same bits on all ranks."""
        edges = [(step, peer - 1, tree, up) for step, peer, tree, up in _edges(rank + 1, size) if peer]
        yield from _climb(edges)
        yield from _descend(edges)

    def reduce(self, rank: int, size: int) -> Iterator[Round]:
        """Two trees over the ranks 1 to p−1; both of their roots send to rank 0."""
        yield from _climb(_edges(rank, size - 1))

    def broadcast(self, rank: int, size: int) -> Iterator[Round]:
        """The reduce, run backwards."""
        yield from _descend(_edges(rank, size - 1))


Edge = tuple[
    int, int, int, bool
]  # the step of reduce in which it is used, the other end's label, tree, goes up from here


def _edges(label: int, m: int) -> list[Edge]:
    """The edges of ``label`` in both trees over the labels 1 to ``m``, by step; label 0 is above both roots."""
    edges: list[Edge] = []
    for tree in (0, 1):
        # Place 0 is above the root: what lies to the right of it, first within the bounds, is the root.
        place = 0 if label == 0 else _swap(label, m) if tree else label
        edges += [
            (_step(child, m, tree), _unswap(child, m) if tree else child, tree, False) for child in _children(place, m)
        ]
        if place:
            parent = _parent(place, m)
            edges.append((_step(place, m, tree), _unswap(parent, m) if tree and parent else parent, tree, True))
    return sorted(edges)


def _swap(label: int, m: int) -> int:
    """The place of ``label`` in the second tree: leaves and inner places change sides."""
    if m % 2 == 0:
        return m + 1 - label
    return label - 1 if label > 1 else m


def _unswap(place: int, m: int) -> int:
    """The label at ``place`` of the second tree."""
    if m % 2 == 0:
        return m + 1 - place
    return place + 1 if place < m else 1


def _parent(place: int, m: int) -> int:
    """The parent in the in-order tree over 1 to ``m``; 0 for the root."""
    bit = place & -place
    parent = (place ^ bit) | (2 * bit)
    return parent if parent <= m else place ^ bit


def _children(place: int, m: int) -> list[int]:
    bit = place & -place if place else 1 << m.bit_length()
    below = bit // 2
    while below and place + below > m:
        below //= 2
    return [child for child in (place - bit // 2, place + below) if 0 < child != place]


def _step(place: int, m: int, tree: int) -> int:
    """The step in which ``place`` sends to its parent. The two roots send to label 0 one after the other."""
    parent = _parent(place, m)
    late = place > parent if parent else tree
    return 2 * ((place & -place).bit_length() - 1) + late


def _climb(edges: list[Edge]) -> Iterator[Round]:
    for _, together in groupby(edges, key=lambda edge: edge[0]):
        yield tuple(
            Send(peer, tree, tree + 1) if up else Receive(peer, tree, tree + 1, reduce=True)
            for _, peer, tree, up in together
        )


def _descend(edges: list[Edge]) -> Iterator[Round]:
    for _, together in groupby(reversed(edges), key=lambda edge: edge[0]):
        yield tuple(
            Receive(peer, tree, tree + 1, reduce=False) if up else Send(peer, tree, tree + 1)
            for _, peer, tree, up in together
        )
