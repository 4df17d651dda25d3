"""How a store's parameters are cut into shards: by rows, so that each owner has about as many bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np


class Parameter(NamedTuple):
    """One of the store's: ``rows`` along its first dimension, of ``width`` values each; owner o has ``cuts[o]:[o+1]``.

    ``shape`` is the user's; a parameter without dimensions has one row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    rows: int
    width: int
    cuts: tuple[int, ...]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a row."""
        return self.shape[1:]

    def part(self, owner: int) -> slice:
        """The owner's rows."""
        return slice(self.cuts[owner], self.cuts[owner + 1])


class Layout:
    """The shards of ``parameters`` (name -> array) of ``owners`` owners.

    ``whole``: no parameter is cut, for optimizers that look at whole ones.
    """

    def __init__(self, parameters: Mapping[str, Any], owners: int, whole: bool) -> None:
        self.owners = owners
        self.whole = whole
        total = sum(w.nbytes for w in parameters.values())
        self.parameters: list[Parameter] = []
        before = 0
        for name, w in parameters.items():
            rows = w.shape[0] if w.ndim else 1
            width = math.prod(w.shape[1:])
            cuts = self._whole_cuts(rows, before, total) if whole else self._row_cuts(rows, w.nbytes, before, total)
            self.parameters.append(Parameter(name, tuple(w.shape), w.dtype, rows, width, cuts))
            before += w.nbytes
        self.numbers = {parameter.name: number for number, parameter in enumerate(self.parameters)}

    def _row_cuts(self, rows: int, nbytes: int, before: int, total: int) -> tuple[int, ...]:
        """Where the shares of all bytes end, to the nearest row; ``before``: bytes of the parameters before."""
        row_nbytes = nbytes / rows if rows else 0
        if not row_nbytes:
            return (0, *[rows] * self.owners)
        ends = ((owner * total / self.owners - before) / row_nbytes for owner in range(1, self.owners))
        return (0, *(min(rows, max(0, round(end))) for end in ends), rows)

    def _whole_cuts(self, rows: int, before: int, total: int) -> tuple[int, ...]:
        owner = min(self.owners - 1, before * self.owners // total) if total else 0
        return tuple(0 if each <= owner else rows for each in range(self.owners + 1))

    def of(self, owner: int) -> Iterator[tuple[int, Parameter, slice]]:
        """Number, parameter and rows of what an owner has."""
        for number, parameter in enumerate(self.parameters):
            part = parameter.part(owner)
            if part.start < part.stop:
                yield number, parameter, part

    def split(self, number: int, rows: Any) -> Iterator[tuple[int, slice]]:
        """The owners of sorted ``rows`` of a parameter, and which of these each has."""
        ends = np.searchsorted(rows, self.parameters[number].cuts)
        for owner, (start, stop) in enumerate(itertools.pairwise(ends.tolist())):
            if start < stop:
                yield owner, slice(start, stop)

    def empty(self) -> dict[str, Any]:
        """New arrays like the parameters."""
        return {parameter.name: np.empty(parameter.shape, parameter.dtype) for parameter in self.parameters}


def by_rows(array: Any, parameter: Parameter) -> Any:
    """A C-contiguous array of the parameter's shape as (rows, width), in place."""
    return array.reshape(parameter.rows, parameter.width)
