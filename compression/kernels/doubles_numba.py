"""Sums of a block whose sum in float32 is not finite, though its values may be: the same sum in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.kernels.jit import shared
from bitring.compression.kernels.lanes_numba import get_value
from bitring.compression.kernels.vectors_numba import get, put, stack

SUMS_NBYTES = 8 * 32
NEGATIVE, OTHERS, MAGNITUDES = 0, 1, 2


@shared
def sum_in_doubles(values: Any, residual: Any, first: int, stop: int, lanes: int, which: int) -> Any:
    """The sum of v = values + residual: of NEGATIVE ones, of the OTHERS, or of all MAGNITUDES.

    Lane k adds values k, k + lanes, ... in that order; then lanes are added pairwise, k and k + lanes / 2 first.
    """
    sums: Any = stack(SUMS_NBYTES)
    for k in range(lanes):
        put(sums + 8 * k, 0.0)
    for i in range(first, stop):
        at = sums + (i - first) % lanes * 8
        v = np.float64(get_value(values, i) + get_value(residual, i))
        if which == MAGNITUDES:
            put(at, get(at, 0.0) + abs(v))
        elif (v >= 0) == (which == OTHERS):
            put(at, get(at, 0.0) + v)
    half = lanes // 2
    while half:
        for k in range(half):
            put(sums + 8 * k, get(sums + 8 * k, 0.0) + get(sums + 8 * (k + half), 0.0))
        half //= 2
    return get(sums, 0.0)
