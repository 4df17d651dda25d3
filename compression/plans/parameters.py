"""The parameters that a compressed plan's buffer is made of: their shapes, whichever way they were told."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

from bitring.arrays import Array

Shape = tuple[int, ...]


def checked_shapes(
    x: Any, flat: Array, shapes: Sequence[Sequence[int]] | None, places: Sequence[int] = ()
) -> list[Shape]:
    """The shapes of the parameters that make up ``flat``, the values of ``x``, one behind the other.

    ``shapes`` as ``plan_allreduce`` has them: without them x is one parameter of its own shape. One that has some of
    ``places``, the boundaries, inside is cut there into 1-D ones. Raises TypeError and ValueError.
    """
    given = _own_shape(x, flat) if shapes is None else _checked(shapes)
    values = sum(map(math.prod, given))
    if values != flat.size:
        raise ValueError(f"plan_allreduce: shapes must have x's {flat.size} values in all; got {values}")
    parts: list[Shape] = []
    start = 0
    for shape in given:
        stop = start + math.prod(shape)
        cuts = sorted({start, stop, *(place for place in places if start < place < stop)})
        parts += [shape] if len(cuts) <= 2 else [(b - a,) for a, b in itertools.pairwise(cuts)]
        start = stop
    return parts


def checked_boundaries(boundaries: Sequence[int], values: int) -> tuple[int, ...]:
    """Indices at which parameters begin in ``values`` values. Raises TypeError and ValueError."""
    try:
        places = tuple(map(operator.index, boundaries))
    except TypeError:
        raise TypeError(f"plan_allreduce: boundaries must be positions in x, ints; got {boundaries!r}") from None
    if any(not 0 <= place <= values for place in places):
        raise ValueError(f"plan_allreduce: boundaries must be positions in x, from 0 to {values}; got {boundaries!r}")
    return places


def _own_shape(x: Any, flat: Array) -> list[Shape]:
    """The shape of what was handed over, of which ``flat`` are the values."""
    shape = tuple(map(int, getattr(x, "shape", ())))
    return [shape if len(shape) > 1 and math.prod(shape) == flat.size else (flat.size,)]


def _checked(shapes: Sequence[Sequence[int]]) -> list[Shape]:
    try:
        checked = [tuple(map(operator.index, shape)) for shape in shapes]
    except TypeError:
        raise TypeError(f"plan_allreduce: shapes must be one shape for each parameter; got {shapes!r}") from None
    if any(side < 0 for shape in checked for side in shape):
        raise ValueError(f"plan_allreduce: no side of a shape can be negative; got {shapes!r}")
    return checked
