"""Sums along a fixed binary tree over numbered parts: the result does not depend on who adds what, or when.

Leaf i stands at level 0; node i of a level covers the nodes 2i and 2i + 1 of the level below, in this order. A node
that has no right child, since there are no such leaves, is its left child.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Node = tuple[int, int]
"""A level, and a number in it."""


class SumTree:
    """The sums of complete subtrees among ``leaves`` parts, as large as they can be with what has come so far."""

    def __init__(self, leaves: int) -> None:
        self.leaves = leaves
        self._root: Node = ((leaves - 1).bit_length(), 0)
        self.nodes: dict[Node, Any] = {}

    def add(self, node: Node, value: Any) -> None:
        """Take a node's sum, a number or an array, which may be overwritten. No leaf may be in two nodes."""
        assert node not in self.nodes, node
        level, number = node
        while (level, number) != self._root:
            sibling = number ^ 1
            if sibling << level < self.leaves:
                if (level, sibling) not in self.nodes:
                    break
                other = self.nodes.pop((level, sibling))
                left, right = (value, other) if number < sibling else (other, value)
                left += right
                value = left
            level, number = level + 1, number // 2
        self.nodes[level, number] = value

    @property
    def complete(self) -> bool:
        """Whether all leaves have come."""
        return self._root in self.nodes

    @property
    def total(self) -> Any:
        """The sum, when it is complete."""
        return self.nodes[self._root]


def nodes_of(first: int, last: int, leaves: int) -> Iterator[Node]:
    """The nodes that a tree of ``leaves`` has when the leaves from ``first`` to before ``last`` have come, in order."""
    tree = SumTree(leaves)
    for leaf in range(first, last):
        tree.add((0, leaf), 0)
    yield from sorted(tree.nodes, key=lambda node: node[1] << node[0])
