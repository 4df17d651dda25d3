"""Sign encode and decode in NumPy: what the kernels compute, bit for bit.

Lane k of 8 adds |v| of values k, k + 8, ... in that order, in the residual's dtype; then float64 adds the lanes
pairwise: k and k + 4, then k and k + 2, then 0 and 1. Where that is not finite, the lanes add in float64 instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.reference.onebit_reference import mean_of_lanes

Array = Any


@np.errstate(all="ignore")
def encode(values: Array, residual: Array, payload: Array, block: int) -> int:
    """See ``Encoder.encode``."""
    used = 0
    for first in range(0, values.size, block):
        v = values[first : first + block].astype(residual.dtype) + residual[first : first + block]
        padded = np.zeros((-(-v.size // 8) + 1, 8), v.dtype)
        padded.reshape(-1)[8 : 8 + v.size] = np.abs(v)
        scale = mean_of_lanes(padded, v.size)
        residual[first : first + block] = v - np.where(v >= 0, scale, -scale)
        encoded = np.concatenate([scale.reshape(1).view(np.uint8), np.packbits(v >= 0, bitorder="little")])
        payload[used : used + encoded.size] = encoded
        used += encoded.size
    return used


@np.errstate(all="ignore")
def decode(payload: Array, out: Array, block: int, accumulate: bool = False) -> None:
    """See ``Encoder.decode``."""
    at = 0
    for first in range(0, out.size, block):
        here = out[first : first + block]
        scale = payload[at : at + 4].copy().view(np.float32)[0]
        end = at + 4 + -(-here.size // 8)
        is_high = np.unpackbits(payload[at + 4 : end], count=here.size, bitorder="little").astype(bool)
        x = np.where(is_high, scale, -scale).astype(np.float64 if here.dtype == np.float64 else np.float32)
        here[:] = ((here.astype(x.dtype) + x) if accumulate else x).astype(out.dtype)
        at = end
