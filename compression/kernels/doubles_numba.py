"""Sums of a block whose sum in float32 is not finite, though its values may be: the same sum in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.kernels.jit import shared
from bitring.compression.kernels.lanes_numba import get_value
from bitring.compression.kernels.vectors_numba import clear, get, put, stack

SUMS_NBYTES = 8 * 32
NEGATIVE, OTHERS, MAGNITUDES = 0, 1, 2


@shared
def sum_in_doubles(values: Any, residual: Any, first: int, stop: int, lanes: int, which: int) -> Any:
    """The sum of v = values + residual: of NEGATIVE ones, of the OTHERS, or of all MAGNITUDES.

    Lane k adds values k, k + lanes, ... in that order; then lanes are added pairwise, k and k + lanes / 2 first.
    """
    sums: Any = stack(SUMS_NBYTES)
    clear(sums, SUMS_NBYTES)
    for i in range(first, stop):
        _add(sums + (i - first) % lanes * 8, get_value(values, i) + get_value(residual, i), which)
    return _folded(sums, lanes)


@shared
def sum_of_v_in_doubles(v: Any, first: int, stop: int, lanes: int, which: int) -> Any:
    """The same of v, which has been made."""
    sums: Any = stack(SUMS_NBYTES)
    clear(sums, SUMS_NBYTES)
    for i in range(first, stop):
        _add(sums + (i - first) % lanes * 8, get_value(v, i), which)
    return _folded(sums, lanes)


@shared
def _add(at: int, v: Any, which: int) -> None:
    x = np.float64(v)
    if which == MAGNITUDES:
        put(at, get(at, 0.0) + abs(x))
    elif (x >= 0) == (which == OTHERS):
        put(at, get(at, 0.0) + x)


@shared
def _folded(sums: int, lanes: int) -> Any:
    half = lanes // 2
    while half:
        for k in range(half):
            put(sums + 8 * k, get(sums + 8 * k, 0.0) + get(sums + 8 * (k + half), 0.0))
        half //= 2
    return get(sums, 0.0)
