"""What a computation asks of the ranks: a value that is hashable, so that compiled code is found again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any


class Work(ABC):
    """One collective operation of a computation."""

    linear: bool
    """Whether it is linear in its arguments, and its own transpose."""
    by_value: bool
    """Whether each value of a result depends on the arguments' values at its place alone."""

    @abstractmethod
    def shapes(self, arguments: Sequence[Any]) -> list[Any]:
        """The results' shapes and dtypes, of the arguments' (anything with ``shape`` and ``dtype``)."""

    @abstractmethod
    def run(self, arguments: Sequence[Any], results: Sequence[Any]) -> None:
        """Fill ``results``, NumPy arrays, from ``arguments``, which are only read. Collective."""

    @abstractmethod
    def describe(self) -> str:
        """Its name and settings, for messages."""
