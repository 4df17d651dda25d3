"""The vectors of L-BFGS, cut into shards: what one rank holds of them, and what it computes on command.

A parameter store could hold them as well: whoever decides sees dot products alone. All vectors are float64. They are
cut into parts whose number does not depend on the ranks', and products are summed part by part along a fixed tree
(``sum_tree``): any number of ranks gives the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.training.sum_tree import Node, SumTree, nodes_of

_PARTS = 8
_BLOCK = 8192


def parts_for(ranks: int) -> int:
    """Into so many parts vectors are cut: 8, or for more than 8 ranks the next power of two."""
    return max(_PARTS, 1 << (ranks - 1).bit_length())


def parts_of(rank: int, ranks: int) -> tuple[int, int]:
    """The first part that a rank holds, and the one after its last."""
    parts = parts_for(ranks)
    return parts * rank // ranks, parts * (rank + 1) // ranks


def held_by(rank: int, ranks: int, size: int) -> slice:
    """The values that a rank holds, of vectors of ``size``."""
    parts = parts_for(ranks)
    first, last = parts_of(rank, ranks)
    return slice(size * first // parts, size * last // parts)


def product(a: Any, b: Any) -> float:
    """The dot product of two float64 vectors, in blocks: the same bits whatever number of threads a library takes."""
    whole = len(a) // _BLOCK * _BLOCK
    blocks = np.einsum("ij,ij->i", a[:whole].reshape(-1, _BLOCK), b[:whole].reshape(-1, _BLOCK))
    return float(blocks.sum() + np.einsum("i,i->", a[whole:], b[whole:]))


class Shard:
    """One rank's values of the parameters ``w``, the gradient ``g``, the direction, and up to ``memory`` pairs s, y."""

    def __init__(self, w: Any, memory: int, rank: int, ranks: int, size: int) -> None:
        """``w``: this rank's values, which are copied, of ``size`` in all."""
        parts = parts_for(ranks)
        first, last = parts_of(rank, ranks)
        start = size * first // parts
        self._parts = [
            (part, slice(size * part // parts - start, size * (part + 1) // parts - start))
            for part in range(first, last)
        ]
        self._leaves = parts
        self.nodes: list[Node] = list(nodes_of(first, last, parts))
        self._memory = memory
        self.w = np.array(w, np.float64)
        self.g = np.zeros_like(self.w)
        self.s: list[Any] = []
        self.y: list[Any] = []
        self._direction = np.zeros_like(self.w)
        self._gradient = np.zeros_like(self.w)  # where it was evaluated last
        self._step = 0.0

    def point(self, step: float) -> Any:
        """w + step·d, a new array: the parameters to evaluate."""
        self._step = step
        return self.w + step * self._direction if step else self.w.copy()

    def slope(self, gradient: Any) -> Any:
        """Take the gradient at the point. Returns its product with the direction, as ``_products`` does."""
        self._gradient[:] = gradient
        return self._products([(self._gradient, self._direction)])

    def combine(self, coefficients: Any) -> None:
        """Make the direction the combination of s, y and g with these coefficients."""
        self._direction.fill(0)
        for coefficient, vector in zip(coefficients, [*self.s, *self.y, self.g], strict=True):
            self._direction += coefficient * vector

    def measure(self) -> Any:
        """Take the evaluated gradient for g. Returns its products with the basis, see ``lbfgs.Measure``."""
        self.g[:] = self._gradient
        return self._products([(self.g, vector) for vector in (*self.s, *self.y, self.g)])

    def accept(self, keep: bool) -> Any:
        """Go to the point that was evaluated last. Returns the products that ``lbfgs.Accept`` is answered by."""
        if not keep:
            self.w += self._step * self._direction
            return self.measure()
        if len(self.s) == self._memory:
            s, y = self.s.pop(0), self.y.pop(0)
        else:
            s, y = np.empty_like(self.w), np.empty_like(self.w)
        np.multiply(self._direction, self._step, out=s)
        np.subtract(self._gradient, self.g, out=y)
        self.w += s
        self.g[:] = self._gradient
        self.s.append(s)
        self.y.append(y)
        pairs = [(s, each) for each in (*self.s, *self.y)]
        pairs += [(y, each) for each in (*self.s[:-1], *self.y)]
        pairs += [(self.g, each) for each in (*self.s, *self.y, self.g)]
        return self._products(pairs)

    def forget(self) -> None:
        """Drop all pairs."""
        self.s.clear()
        self.y.clear()

    def _products(self, pairs: list[tuple[Any, Any]]) -> Any:
        """The products of pairs of vectors, summed over this rank's parts: a row for each of ``nodes``."""
        tree = SumTree(self._leaves)
        for part, values in self._parts:
            tree.add((0, part), np.array([product(a[values], b[values]) for a, b in pairs]))
        return np.array([tree.nodes[node] for node in self.nodes])
