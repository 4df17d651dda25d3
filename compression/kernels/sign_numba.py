"""Kernels of ``sign.py`` for host memory. What they compute: its NumPy code, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.kernels.doubles_numba import MAGNITUDES, sum_in_doubles
from bitring.compression.kernels.lanes_numba import absolute, bits, lanes, load, mask_of, select, store, total
from bitring.compression.kernels.vectors_numba import LARGEST, PART, address, get, put, unused_are_zero

SCALE_NBYTES = 4


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block."""
    block: Any = np.int64(settings[0])
    zero = lanes(0.0, values)
    at = 0
    for first in range(0, n, block):
        stop = min(first + block, n)
        code = at + SCALE_NBYTES
        end = code + (stop - first + 7) // PART
        if end > capacity:
            return -1
        sums = zero
        for i in range(first, stop, PART):
            v = load(values, i, stop) + load(residual, i, stop)
            sums = sums + absolute(v)
            payload[code + (i - first) // PART] = bits(v >= zero)
        if (stop - first) % PART:
            payload[end - 1] &= np.uint8((1 << (stop - first) % PART) - 1)
        scale = np.float32(total(sums) / (stop - first))
        if not scale <= LARGEST:
            scale = np.float32(sum_in_doubles(values, residual, first, stop, PART, MAGNITUDES) / (stop - first))
        put(address(payload) + at, scale)
        high, low = lanes(scale, values), lanes(-scale, values)
        for i in range(first, stop, PART):
            v = load(values, i, stop) + load(residual, i, stop)
            store(residual, i, stop, v - select(v >= zero, high, low))
        at = end
    return at


def decode(payload: Any, nbytes: int, out: Any, n: int, accumulate: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block."""
    block: Any = np.int64(settings[0])
    if nbytes and not unused_are_zero(payload, nbytes, n % block):  # after the loop it would slow that by 8 %
        return -1
    at = 0
    for first in range(0, n, block):
        stop = min(first + block, n)
        code = at + SCALE_NBYTES
        end = code + (stop - first + 7) // PART
        if end > nbytes:
            return -1
        scale = get(address(payload) + at, np.float32(0))
        high, low = lanes(scale, out), lanes(-scale, out)
        for i in range(first, stop, PART):
            x = select(mask_of(payload[code + (i - first) // PART]), high, low)
            if accumulate:
                x = load(out, i, stop) + x
            store(out, i, stop, x)
        at = end
    return 0 if at == nbytes else -1
