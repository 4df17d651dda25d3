"""Rows of a store that a rank has read, to be read again without a message while bounded staleness allows it.

After Wei et al., "Managed Communication and Consistency for Fast Data-Parallel Iterative Analytics", SoCC 2015: a
cached row serves a read at clock c when it was read where all ranks' clocks were at least c − s. A rank sees all its
own updates: they are made in the cache, too, by an optimizer that keeps no state, and else the row is read anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.training.optimizer import Elementwise, Optimizer
from bitring.training.store.layout import Layout

_NEVER = -1.0


class RowCache:
    """Values of rows, (rows, width), by the number of their parameter, and the clock of each.

    Memory: as much as the parameters that are read by rows have, of which only pages with cached rows are touched.
    """

    def __init__(self, layout: Layout, optimizer: Optimizer) -> None:
        self._layout = layout
        self._optimizer = optimizer if isinstance(optimizer, Elementwise) and not optimizer.kept else None
        self._values: dict[int, Any] = {}
        self._clocks: dict[int, Any] = {}
        self.hits = 0
        """Rows that were served from here."""

    def take(self, number: int, rows: Any, least: float, into: Any) -> Any:
        """Put the rows that serve a read that must see all updates of clocks below ``least`` into ``into``.

        ``into``: (rows, width). Returns the places of the others there, 1-D int64.
        """
        if number not in self._clocks:
            return np.arange(len(rows))
        good = self._clocks[number][rows] >= max(least, 0.0)
        into[good] = self._values[number][rows[good]]
        missing = np.flatnonzero(~good)
        self.hits += len(rows) - len(missing)
        return missing

    def put(self, number: int, rows: Any, values: Any, clock: float) -> None:
        """Rows as they are where all ranks' clocks are at least ``clock``."""
        if number not in self._clocks:
            parameter = self._layout.parameters[number]
            self._values[number] = np.empty((parameter.rows, parameter.width), parameter.dtype)
            self._clocks[number] = np.full(parameter.rows, _NEVER)
        self._values[number][rows] = values
        self._clocks[number][rows] = clock

    def update(self, number: int, rows: Any, g: Any) -> None:
        """This rank hands in the gradient ``g`` of these rows, distinct ones; None: of all."""
        if number not in self._clocks:
            return
        clocks = self._clocks[number]
        rows = np.arange(len(clocks)) if rows is None else rows
        cached = clocks[rows] > _NEVER
        if self._optimizer is None:
            clocks[rows[cached]] = _NEVER
            return
        w = self._values[number][rows[cached]]
        with np.errstate(all="ignore"):  # as at the owner
            self._optimizer.update({"": w}, {"": g.reshape(len(rows), -1)[cached]}, {})
        self._values[number][rows[cached]] = w

    def clear(self) -> None:
        """All values are others."""
        for clocks in self._clocks.values():
            clocks[...] = _NEVER
