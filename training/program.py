"""The base of programs for ``bitring.Strads``: which coordinates next, what workers sum, and what follows from it.

A model's values are coordinates; workers hold rows of the data. In a round ``schedule`` chooses candidates, every
worker ``push``es its part of a sum for each, ``pull`` makes new values of the sums, and workers ``apply`` the changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from bitring.settings import Settings
from bitring.training.columns import Columns


class Program(Settings, ABC):
    """Base of programs; instances are settings. A worker is what ``worker`` returns, of one part of the rows."""

    def schedule(self, random: np.random.Generator, priorities: Any, width: int) -> Any:
        """``width`` different coordinates, drawn in proportion to ``priorities`` > 0; in no special order."""
        keys = np.log(priorities) + random.gumbel(size=len(priorities))
        return np.argpartition(keys, -width)[-width:]

    def targets(self, y: Any) -> Any:
        """The targets as workers take them, from those given: (rows,), float64. Raises ValueError; it changes none."""
        return y

    @abstractmethod
    def worker(self, columns: Columns, y: Any) -> Any:
        """A worker with these rows, while all coordinates are zero."""

    @abstractmethod
    def push(self, worker: Any, coordinates: Any) -> Any:
        """The worker's part of a sum for each coordinate."""

    @abstractmethod
    def measure(self, worker: Any) -> Any:
        """The worker's part of what ``objective`` and ``gap`` need beside: two numbers."""

    @abstractmethod
    def pull(self, sums: Any, values: Any, squares: Any) -> Any:
        """The new values of some coordinates, from their sums, present values and columns' squares."""

    @abstractmethod
    def apply(self, worker: Any, coordinates: Any, changes: Any) -> None:
        """Take the changes of coordinates to the worker."""

    @abstractmethod
    def objective(self, measured: Any, values: Any) -> float:
        """The objective at the coordinates ``values``, of all workers' measures."""

    @abstractmethod
    def gap(self, measured: Any, sums: Any, values: Any) -> float:
        """An upper bound of how far the objective is above its minimum; ``sums`` are those of all coordinates."""
