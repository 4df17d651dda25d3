"""Linear encode and decode in NumPy: what the kernels compute, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any


def encode(values: Array, residual: Array, payload: Array, block: int, bits: int) -> int:
    """See ``Encoder.encode``."""
    return encode_by(values, residual, payload, block, bits, _quantized)


def _quantized(v: Array, most: int) -> tuple[np.float32, Array]:
    step = np.float32(np.abs(v).max() / np.float64(most))
    if step < np.float32(2.0**-126):
        return np.float32(0), np.zeros_like(v)
    return step, np.rint(v * v.dtype.type(1 / np.float64(step)))


@np.errstate(all="ignore")
def encode_by(
    values: Array,
    residual: Array,
    payload: Array,
    block: int,
    bits: int,
    quantized: Callable[[Array, int], tuple[np.float32, Array]],
) -> int:
    """``encode``, with a step and whole numbers that ``quantized`` makes of a block and the largest such number."""
    used, most = 0, 2 ** (bits - 1) - 1
    for first in range(0, values.size, block):
        v = values[first : first + block].astype(residual.dtype) + residual[first : first + block]
        step, q = quantized(v, most)
        q = np.clip(q, -most, most) + v.dtype.type(0)  # no -0
        residual[first : first + block] = v - q * step
        codes = (q.astype(np.int64)[:, None] >> np.arange(bits) & 1).astype(np.uint8)
        encoded = np.concatenate([step.reshape(1).view(np.uint8), np.packbits(codes, bitorder="little")])
        payload[used : used + encoded.size] = encoded
        used += encoded.size
    return used


@np.errstate(all="ignore")
def decode(payload: Array, out: Array, block: int, bits: int, accumulate: bool = False) -> None:
    """See ``Encoder.decode``."""
    at = 0
    for first in range(0, out.size, block):
        here = out[first : first + block]
        step = payload[at : at + 4].copy().view(np.float32)[0]
        end = at + 4 + -(-here.size * bits // 8)
        codes = np.unpackbits(payload[at + 4 : end], count=here.size * bits, bitorder="little").reshape(-1, bits)
        weights = 2.0 ** np.arange(bits) * np.where(np.arange(bits) == bits - 1, -1, 1)
        wide = np.dtype(np.float64 if here.dtype == np.float64 else np.float32)
        x = (codes @ weights).astype(wide) * step
        here[:] = ((here.astype(wide) + x) if accumulate else x).astype(out.dtype)
        at = end
