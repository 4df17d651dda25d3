"""Gradients of dense weights over micro-batches: made for several of them in one matrix product, while a rank waits.

A micro-batch's own product dyᵀ·x would write, and add, as many values as that of the whole batch. And the stage before
need not wait for it (Qi et al., "Zero Bubble Pipeline Parallelism", 2024). Which micro-batches are put together does
not depend on when a product is made: results do not depend on timing.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np

ROWS = 512
"""Samples of a product, at least: with more, matrix products are hardly faster."""

_BLOCKS = 8
"""So many blocks of a weight are kept, at most; then the oldest product is made at once."""


class Product(NamedTuple):
    """The gradient dyᵀ·x of a dense weight, not made yet: dy (N, outputs), x (N, inputs). Both may be overwritten."""

    dy: Any
    x: Any


class _Block:
    """Room for the factors of several products, of which ``rows`` rows are filled."""

    def __init__(self, rows: int, like: Product) -> None:
        self.dy = np.empty((rows, like.dy.shape[1]), like.dy.dtype)
        self.x = np.empty((rows, like.x.shape[1]), like.x.dtype)
        self.rows = 0

    def takes(self, more: Product) -> bool:
        # However much room there is: which products are put together must not depend on which block is free.
        return self.rows + len(more.dy) <= (ROWS if self.rows else len(self.dy))

    def add(self, more: Product) -> None:
        rows = slice(self.rows, self.rows + len(more.dy))
        self.dy[rows], self.x[rows] = more
        self.rows = rows.stop

    def made(self) -> Any:
        return self.dy[: self.rows].T @ self.x[: self.rows]


class WeightGradients:
    """The products of a step's passes, by the weight's name; they end up in ``gradients``, which ``begin`` is given."""

    def __init__(self) -> None:
        self._free: dict[str, list[_Block]] = {}

    def begin(self, gradients: dict[str, Any]) -> None:
        """Begin a step."""
        self._gradients = gradients
        self._filling: dict[str, _Block] = {}
        self._full: deque[tuple[str, _Block]] = deque()

    def add(self, name: str, product: Product) -> None:
        """Keep a product's factors."""
        block = self._filling.get(name)
        if block is not None and not block.takes(product):
            self._full.append((name, self._filling.pop(name)))
            if sum(each == name for each, _ in self._full) > _BLOCKS:
                self.make_one()
            block = None
        if block is None:
            free = self._free.get(name, [])
            block = free.pop() if free else None
            if block is None or not block.takes(product):
                block = _Block(max(ROWS, len(product.dy)), product)
            self._filling[name] = block
        block.add(product)

    def make_one(self) -> bool:
        """Make the oldest product of a full block. Returns whether there was one."""
        if not self._full:
            return False
        name, block = self._full.popleft()
        made = block.made()
        if name in self._gradients:
            self._gradients[name] += made
        else:
            self._gradients[name] = made
        block.rows = 0
        self._free.setdefault(name, []).append(block)
        return True

    def finish(self) -> None:
        """Make all that is left."""
        self._full.extend(self._filling.items())
        self._filling = {}
        while self.make_one():
            pass
