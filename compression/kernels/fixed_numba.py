"""Kernels of ``fixed.py`` for host memory. What they compute: its NumPy code, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from bitring.compression.kernels.lanes_numba import lanes, load, nearest, select, store
from bitring.compression.kernels.packing_numba import STEP_NBYTES, largest_magnitude, nbytes_of, pack
from bitring.compression.kernels.packing_numba import decode as decode
from bitring.compression.kernels.vectors_numba import (
    FLOAT,
    I32,
    I64,
    LARGEST,
    PART,
    WORDS,
    address,
    get,
    intrinsic,
    put,
    splat,
)

LARGEST_EXPONENT = 254
GOLDEN = 0x9E3779B97F4A7C15


def _mixed(builder: Any, x: Any) -> Any:
    """MurmurHash3's final mix of 32 bits, lane by lane."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = builder.mul(builder.xor(x, builder.lshr(x, _words(shift))), _words(factor))
    return builder.xor(x, builder.lshr(x, _words(16)))


def _words(x: int) -> Any:
    return ir.Constant(WORDS, [x] * PART)


@intrinsic
def _drawn(typing: Any, v: Any, seed: Any, index: Any) -> Any:
    """Lane k: a multiple of 2^-24 in [0, 1) drawn by the seed, by index + k and by the bits of v."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lanes, seed, index = arguments
        if v.dtype == types.float64:
            longs = builder.bitcast(lanes, ir.VectorType(I64, PART))
            upper = builder.lshr(longs, ir.Constant(longs.type, [32] * PART))
            words = builder.xor(builder.trunc(longs, WORDS), builder.trunc(upper, WORDS))
        else:
            words = builder.bitcast(lanes, WORDS)
        keys = [builder.trunc(builder.lshr(seed, I64(shift)), I32) for shift in (0, 32)]
        place = builder.add(splat(builder, builder.trunc(index, I32)), ir.Constant(WORDS, list(range(PART))))
        words = _mixed(builder, builder.xor(words, splat(builder, keys[0])))
        words = _mixed(
            builder, builder.add(words, builder.mul(builder.xor(place, splat(builder, keys[1])), _words(GOLDEN >> 32)))
        )
        drawn = builder.uitofp(builder.lshr(words, _words(8)), ir.VectorType(FLOAT, PART))
        drawn = builder.fmul(drawn, ir.Constant(drawn.type, [2.0**-24] * PART))
        return builder.fpext(drawn, lanes.type) if v.dtype == types.float64 else drawn

    return v(v, types.uint64, types.int64), generate


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block, bits."""
    block: Any = np.int64(settings[0])
    nbits: Any = np.int64(settings[1])
    most = (1 << (nbits - 1)) - 1
    zero, one = lanes(0.0, values), lanes(1.0, values)
    key = np.uint64(seed + 1) * np.uint64(GOLDEN)
    key = (key ^ (key >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(29)
    at = 0
    for first in range(0, n, block):
        stop = min(first + block, n)
        end = at + nbytes_of(stop - first, nbits)
        if end > capacity:
            return -1
        magnitude = largest_magnitude(values, residual, first, stop)
        here = address(payload) + at
        put(here, np.float32(magnitude / most))
        word = get(here, np.uint32(0))
        exponent = np.int64(word >> np.uint32(23)) + ((word & np.uint32(0x7FFFFF)) != 0)
        if magnitude > 0 and exponent == 0:
            exponent = 1
        put(here, np.uint32(exponent << 23))
        if exponent and exponent < LARGEST_EXPONENT and magnitude > most * np.float64(get(here, np.float32(0))):
            exponent += 1
            put(here, np.uint32(exponent << 23))
        step = get(here, np.float32(0))
        inverse = 1 / np.float64(step) if 0 < exponent < 255 else 0.0
        steps, inverses = lanes(step, values), lanes(inverse, values)
        limit = min(np.float64(most), np.floor(LARGEST * inverse)) if inverse else np.float64(most)
        high, low = lanes(limit, values), lanes(-limit, values)
        here += STEP_NBYTES
        for i in range(first, stop, PART):
            v = load(values, i, stop) + load(residual, i, stop)
            x = v * inverses
            q = nearest(x)
            drawn = _drawn(v, key, i - first)
            q = q + select(drawn < x - q, one, zero) - select(drawn < q - x, one, zero)
            q = select(q < high, q, high)
            q = select(q > low, q, low)
            store(residual, i, stop, v - q * steps)
            pack(q, nbits, here, address(payload) + end)
            here += nbits
        at = end
    return at
