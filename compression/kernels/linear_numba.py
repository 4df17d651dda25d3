"""Kernels of ``linear.py`` for host memory. What they compute: its NumPy code, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.kernels.lanes_numba import lanes, load, nearest, select, store
from bitring.compression.kernels.packing_numba import STEP_NBYTES, largest_magnitude, nbytes_of, pack
from bitring.compression.kernels.packing_numba import decode as decode
from bitring.compression.kernels.vectors_numba import PART, address, put

SMALLEST_NORMAL = 2.0**-126


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block, bits."""
    block: Any = np.int64(settings[0])
    nbits: Any = np.int64(settings[1])
    most = (1 << (nbits - 1)) - 1
    high, low = lanes(most, values), lanes(-most, values)
    at = 0
    for first in range(0, n, block):
        stop = min(first + block, n)
        end = at + nbytes_of(stop - first, nbits)
        if end > capacity:
            return -1
        magnitude = largest_magnitude(values, residual, first, stop)
        step = np.float32(magnitude / most)
        inverse = 0.0
        if step >= SMALLEST_NORMAL:
            inverse = 1 / np.float64(step)
        else:  # whose inverse may be no number; all is left
            step = np.float32(0)
        put(address(payload) + at, step)
        steps, inverses = lanes(step, values), lanes(inverse, values)
        here = address(payload) + at + STEP_NBYTES
        for i in range(first, stop, PART):
            v = load(values, i, stop) + load(residual, i, stop)
            x = nearest(v * inverses)
            x = select(x < high, x, high)
            x = select(x > low, x, low)
            store(residual, i, stop, v - x * steps)
            pack(x, nbits, here, address(payload) + end)
            here += nbits
        at = end
    return at
