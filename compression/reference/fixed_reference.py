"""Fixed-point encode in NumPy: what the kernels compute, bit for bit. Decoding is ``linear_reference.py``'s."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.reference.linear_reference import encode_by

Array = Any
U32, U64 = np.uint32, np.uint64


def _mixed(x: Array) -> Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> U32(shift)) * U32(factor)
    return x ^ x >> U32(16)


def drawn(v: Array, seed: int) -> Array:
    """For each value of a block a multiple of 2^-24 in [0, 1)."""
    key = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64
    key = (key ^ key >> 31) * 0xBF58476D1CE4E5B9 % 2**64
    key ^= key >> 29
    words = v.view(U32) if v.dtype == np.float32 else (v.view(U64) ^ v.view(U64) >> U64(32)).astype(U32)
    place = np.arange(v.size, dtype=U32)
    words = _mixed(words ^ U32(key % 2**32))
    words = _mixed(words + (place ^ U32(key >> 32)) * U32(0x9E3779B9))
    return (words >> U32(8)).astype(v.dtype) * v.dtype.type(2.0**-24)


def encode(values: Array, residual: Array, payload: Array, block: int, bits: int, seed: int = 0) -> int:
    """See ``Encoder.encode``."""

    def quantized(v: Array, most: int) -> tuple[np.float32, Array]:
        largest = np.float64(np.abs(v).max())
        if largest == 0:
            return np.float32(0), np.zeros_like(v)
        exponent = max(int(np.frexp(largest / most)[1]) - 1, -126)  # of the power of two below, or equal
        exponent += int(largest > most * 2.0**exponent)
        x = v * v.dtype.type(2.0**-exponent)
        q = np.rint(x)
        u = drawn(v, seed)
        limit = np.floor(np.finfo(np.float32).max / 2.0**exponent)  # what is sent is finite
        q = np.clip(q + (u < x - q) - (u < q - x).astype(v.dtype), -limit, limit)
        return np.float32(2.0**exponent), q.astype(v.dtype)

    return encode_by(values, residual, payload, block, bits, quantized)
