"""The vectors of L-BFGS, cut into shards: what one rank holds of them, and what it computes on command.

A parameter store could hold them as well: whoever decides sees dot products alone. All vectors are float64. They are
cut into parts whose number does not depend on the ranks', and products are summed part by part along a fixed tree
(``sum_tree``): any number of ranks gives the same bits.

What a step changes can be taken back, and another rank can make the same changes to a copy (``follow``).
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


def parts_of(rank: int, ranks: int, parts: int | None = None) -> tuple[int, int]:
    """The first of the ``parts`` that a rank holds, and the one after its last. None: as ``parts_for`` has it."""
    parts = parts or parts_for(ranks)
    return parts * rank // ranks, parts * (rank + 1) // ranks


def held_by(rank: int, ranks: int, size: int, parts: int | None = None) -> slice:
    """The values that a rank holds, of vectors of ``size``."""
    parts = parts or parts_for(ranks)
    first, last = parts_of(rank, ranks, parts)
    return slice(size * first // parts, size * last // parts)


def product(a: Any, b: Any) -> float:
    """The dot product of two float64 vectors, in blocks: the same bits whatever number of threads a library takes."""
    if len(a) < _BLOCK:  # most often; the general way takes three times as long for few values
        return float(np.einsum("i,i->", a, b))
    whole = len(a) // _BLOCK * _BLOCK
    blocks = np.einsum("ij,ij->i", a[:whole].reshape(-1, _BLOCK), b[:whole].reshape(-1, _BLOCK))
    return float(blocks.sum() + np.einsum("i,i->", a[whole:], b[whole:]))


class Shard:
    """One rank's values of the parameters ``w``, the gradient ``g``, the direction, and up to ``memory`` pairs s, y.

    None of these arrays, but the direction, is changed in place.
    """

    def __init__(self, w: Any, memory: int, rank: int, ranks: int, size: int, parts: int | None = None) -> None:
        """``w``: this rank's values, which are copied, of ``size`` in all, which are cut into ``parts``."""
        parts = parts or parts_for(ranks)
        first, last = parts_of(rank, ranks, parts)
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
        self._before = self._vectors  # those before the step under way
        self._opened = 0

    @property
    def _vectors(self) -> tuple[Any, Any, list[Any], list[Any]]:
        return self.w, self.g, [*self.s], [*self.y]

    def open(self, step: int) -> None:
        """What follows belongs to this step."""
        if step > self._opened:
            self._before, self._opened = self._vectors, step

    def after(self, step: int, pairs: int) -> Any:
        """The vectors after a step, the last that was opened or the one before: w, g, s, y, of ``pairs``, in rows."""
        w, g, s, y = self._vectors if self._opened <= step else self._before
        return np.array([w, g, *s[len(s) - pairs :], *y[len(y) - pairs :]])

    def load(self, rows: Any, step: int) -> None:
        """Take the vectors that another shard had ``after`` the step."""
        pairs = len(rows) // 2 - 1
        w, g, *both = (np.array(row, np.float64) for row in rows)
        self.w, self.g, self.s, self.y = w, g, both[:pairs], both[pairs:]
        self._before, self._opened = self._vectors, step

    def point(self, step: float) -> Any:
        """w + step·d, a new array: the parameters to evaluate."""
        self._step = step
        return self.w + step * self._direction if step else self.w.copy()

    def slope(self, gradient: Any) -> Any:
        """Take the gradient at the point. Returns its product with the direction, as ``_products`` does."""
        self._gradient = np.array(gradient, np.float64)
        return self._products([(self._gradient, self._direction)])

    def combine(self, coefficients: Any) -> None:
        """Make the direction the combination of s, y and g with these coefficients."""
        self._direction.fill(0)
        for coefficient, vector in zip(coefficients, [*self.s, *self.y, self.g], strict=True):
            self._direction += coefficient * vector

    def measure(self) -> Any:
        """Take the evaluated gradient for g. Returns its products with the basis, see ``lbfgs.Measure``."""
        self.g = self._gradient
        return self._products([(self.g, vector) for vector in (*self.s, *self.y, self.g)])

    def accept(self, keep: bool) -> Any:
        """Go to the point that was evaluated last. Returns the products that ``lbfgs.Accept`` is answered by."""
        self.follow(self._step * self._direction, self._gradient, len(self.s), keep)
        if not keep:
            return self.measure()
        s, y = self.s[-1], self.y[-1]
        pairs = [(s, each) for each in (*self.s, *self.y)]
        pairs += [(y, each) for each in (*self.s[:-1], *self.y)]
        pairs += [(self.g, each) for each in (*self.s, *self.y, self.g)]
        return self._products(pairs)

    def follow(self, s: Any, gradient: Any, pairs: int, keep: bool) -> None:
        """Go on by ``s``, None for nowhere, to where the gradient is this; having ``pairs``, the newest, before.

        ``keep``: store the pair, in the oldest one's place where all are taken.
        """
        self.s, self.y = self.s[len(self.s) - pairs :], self.y[len(self.y) - pairs :]
        if keep:
            oldest = int(pairs == self._memory)
            self.s = [*self.s[oldest:], s]
            self.y = [*self.y[oldest:], gradient - self.g]
        if s is not None:
            self.w = self.w + s
        self.g = gradient

    def changes(self, moved: bool) -> Any:
        """What ``follow`` needs to do as this shard has done: the gradient; before it, where it ``moved``, s."""
        return np.array([self._step * self._direction, self.g] if moved else [self.g])

    def forget(self) -> None:
        """Drop all pairs."""
        self.s, self.y = [], []

    def gram(self) -> Any:
        """The products of all pairs of vectors of the basis, in the order of ``np.triu_indices``, by ``nodes``."""
        basis = [*self.s, *self.y, self.g]
        return self._products([(a, b) for i, a in enumerate(basis) for b in basis[i:]])

    def _products(self, pairs: list[tuple[Any, Any]]) -> Any:
        """The products of pairs of vectors, summed over this rank's parts: a row for each of ``nodes``."""
        tree = SumTree(self._leaves)
        for part, values in self._parts:
            tree.add((0, part), np.array([product(a[values], b[values]) for a, b in pairs]))
        return np.array([tree.nodes[node] for node in self.nodes])
