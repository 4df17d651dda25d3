"""Some rows of a matrix, dense or sparse, of which columns are wanted: products with them, and sums of them.

Every result has the same bits whatever number of threads a library takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np


class Columns(ABC):
    """The columns of (rows, features) float64 values."""

    @abstractmethod
    def dots(self, coordinates: Any, vector: Any) -> Any:
        """The product of each chosen column with a vector."""

    @abstractmethod
    def combine(self, coordinates: Any, factors: Any) -> Any:
        """The sum of the chosen columns, each times its factor."""

    @abstractmethod
    def gram(self, coordinates: Any) -> Any:
        """The products of the chosen columns with each other."""

    @abstractmethod
    def squares(self) -> Any:
        """The product of each column with itself."""


class Dense(Columns):
    """Of a NumPy array."""

    def __init__(self, x: Any) -> None:
        self._rows = np.ascontiguousarray(np.asarray(x, np.float64).T)  # a column's values lie together

    def dots(self, coordinates: Any, vector: Any) -> Any:
        """See Columns."""
        return np.einsum("ij,j->i", self._rows[coordinates], vector)

    def combine(self, coordinates: Any, factors: Any) -> Any:
        """See Columns."""
        return np.einsum("i,ij->j", factors, self._rows[coordinates])

    def gram(self, coordinates: Any) -> Any:
        """See Columns."""
        chosen = self._rows[coordinates]
        return np.einsum("ik,jk->ij", chosen, chosen)

    def squares(self) -> Any:
        """See Columns."""
        return np.einsum("ij,ij->i", self._rows, self._rows)


class Sparse(Columns):
    """Of a matrix or array of scipy.sparse."""

    def __init__(self, x: Any) -> None:
        self._columns = x.tocsc().astype(np.float64)

    def dots(self, coordinates: Any, vector: Any) -> Any:
        """See Columns."""
        return self._columns[:, coordinates].T @ vector

    def combine(self, coordinates: Any, factors: Any) -> Any:
        """See Columns."""
        return self._columns[:, coordinates] @ factors

    def gram(self, coordinates: Any) -> Any:
        """See Columns."""
        chosen = self._columns[:, coordinates]
        return (chosen.T @ chosen).toarray()

    def squares(self) -> Any:
        """See Columns."""
        return np.asarray(self._columns.multiply(self._columns).sum(axis=0)).reshape(-1)


def is_sparse(x: Any) -> bool:
    """Whether ``x`` is of scipy.sparse, which need not be there."""
    return type(x).__module__.split(".")[:2] == ["scipy", "sparse"]


def columns_of(x: Any) -> Columns:
    """The columns of a matrix."""
    return Sparse(x) if is_sparse(x) else Dense(x)
