"""Kernels of ``topk.py`` for host memory. What they compute: its NumPy code, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.kernels.gaps_numba import (
    GROUP,
    GROUP_NBYTES,
    align,
    as_integers,
    decode_block,
    put_group,
    zeros_below,
)
from bitring.compression.kernels.lanes_numba import absolute, bits, lanes, load, store
from bitring.compression.kernels.quantile_numba import kth_largest, sampled_kth_largest
from bitring.compression.kernels.vectors_numba import PART, get, put, stack

VALUE_NBITS = 32


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block, density, sampled (0 or 1)."""
    block: Any = np.int64(settings[0])
    density, sampled = settings[1], settings[2] != 0
    gaps, items, number = as_integers(stack(GROUP_NBYTES)), as_integers(stack(GROUP_NBYTES)), stack(8)
    zero = lanes(0.0, values)
    bit: Any = 0
    ties: Any
    for first in range(0, n, block):
        stop = min(first + block, n)
        k: Any = max(np.int64(density * (stop - first)), 1)
        if sampled:
            least, left, ties = sampled_kth_largest(values, residual, first, stop, k), 2 * k, 2 * k
        else:
            least, ties = kth_largest(values, residual, first, stop, PART, k)
            left = k
        least_lanes = lanes(least, values)
        before, count = first - 1, 0
        for i in range(first, stop, PART):
            v = load(values, i, stop) + load(residual, i, stop)
            store(residual, i, stop, v)
            magnitudes = absolute(v)
            sent = np.uint64(bits(magnitudes >= least_lanes)) & np.uint64(bits(magnitudes > zero))
            while sent and left:
                j = i + zeros_below(sent)
                sent &= sent - np.uint64(1)
                if abs(residual[j]) == least:
                    if not ties:
                        continue
                    ties -= 1
                left -= 1
                x = np.float32(residual[j])
                residual[j] -= x
                gaps[count] = j - before - 1
                put(number, x)
                items[count] = np.int64(get(number, np.uint32(0)))
                before = j
                count += 1
                if count == GROUP:
                    bit = put_group(payload, capacity, bit, gaps, items, count, VALUE_NBITS)
                    if bit < 0:
                        return -1
                    count = 0
        bit = put_group(payload, capacity, bit, gaps, items, count, VALUE_NBITS)
        if bit < 0:
            return -1
        bit = align(bit)
    return bit // 8


def decode(payload: Any, nbytes: int, out: Any, n: int, accumulate: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block, density, sampled (0 or 1)."""
    block: Any = np.int64(settings[0])
    bit: Any = 0
    for first in range(0, n, block):
        bit = decode_block(payload, nbytes, bit, out, first, min(first + block, n), accumulate, VALUE_NBITS, 0.0)
        if bit < 0:
            return -1
    return 0 if bit == 8 * nbytes else -1
