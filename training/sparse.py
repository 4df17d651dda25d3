"""A gradient that is zero but for a few values or rows, as of an embedding or of sparse samples."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Sparse:
    """The gradient, of ``shape``, that has ``values`` at ``indexes`` and is zero elsewhere; NumPy arrays.

    ``indexes``: (k,) integers. ``values``: (k,), at these places of the flat array in C order; or (k, *shape[1:]), the
    rows with these numbers. They are kept in the order of their indexes; values of equal indexes are added. Modes that
    take sparse gradients touch nothing else, the optimizer's slots included; others see ``dense()``. Raises TypeError
    and ValueError.
    """

    indexes: Any
    values: Any
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        indexes, values = np.asarray(self.indexes), np.asarray(self.values)
        try:
            shape = tuple(operator.index(side) for side in self.shape)
        except TypeError:
            raise TypeError(f"Sparse: shape must be a tuple of ints, the parameter's; got {self.shape!r}") from None
        if indexes.ndim != 1 or (indexes.dtype.kind not in "iu" and indexes.size):
            raise TypeError(
                f"Sparse: indexes must be integers in one dimension; got {indexes.dtype} of shape {indexes.shape}"
            )
        rows = values.ndim > 1
        wanted = (indexes.size, *shape[1:]) if rows else (indexes.size,)
        if values.shape != wanted:
            raise ValueError(
                f"Sparse: values must have shape {(indexes.size,)}, or {(indexes.size, *shape[1:])} for rows; "
                f"got {values.shape}"
            )
        most = (shape[0] if rows else math.prod(shape)) if shape else 1
        if indexes.size and (int(indexes.min()) < 0 or int(indexes.max()) >= most):
            what = "rows" if rows else "values"
            raise ValueError(
                f"Sparse: indexes must be from 0 to {most - 1}, of the {most} {what} of shape {shape}; "
                f"got {int(indexes.min())} to {int(indexes.max())}"
            )
        indexes = indexes.astype(np.int64)
        if indexes.size > 1 and not (np.diff(indexes) > 0).all():
            indexes, place = np.unique(indexes, return_inverse=True)
            added = np.zeros((indexes.size, *values.shape[1:]), values.dtype)
            np.add.at(added, place, values)
            values = added
        for name, x in (("indexes", indexes), ("values", np.ascontiguousarray(values)), ("shape", shape)):
            object.__setattr__(self, name, x)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The gradient's."""
        dtype: np.dtype[Any] = self.values.dtype
        return dtype

    @property
    def starts(self) -> Any:
        """Places in the flat array where its runs of values begin, int64."""
        return self.indexes * math.prod(self.shape[1:]) if self.values.ndim > 1 else self.indexes

    def dense(self) -> Any:
        """The gradient, a new array."""
        out = np.zeros(self.shape, self.dtype)
        if self.values.ndim > 1:
            out[self.indexes] = self.values
        else:
            out.reshape(-1)[self.indexes] = self.values
        return out
