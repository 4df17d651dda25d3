"""1-bit encode and decode in NumPy: what the kernels compute, bit for bit (a NaN's own bits aside), and no faster.

The order of every sum is part of it. Within a block, lane k of 32 adds values k, k + 32, ... in that order, in the
residual's dtype (negative and other values each have their lanes; a value of the other class counts as zero); then
float64 adds the lanes pairwise: k and k + 16, then k and k + 8, down to k and k + 1. A level is that sum divided by
the class's count, rounded to float32. Where that is not finite, the lanes add in float64 instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


def _mean(x: Array, members: Array) -> np.float32:
    """Mean of those ``x`` where ``members`` is true; 0 if there are none."""
    if not members.any():
        return np.float32(0)
    padded = np.zeros((-(-x.size // 32) + 1, 32), x.dtype)  # the first row stays zero, so that no sum is -0.0
    padded.reshape(-1)[32 : 32 + x.size] = np.where(members, x, 0)
    return mean_of_lanes(padded, int(np.count_nonzero(members)))


def mean_of_lanes(padded: Array, count: int) -> np.float32:
    """The sum of the columns of ``padded``, which are lanes, over ``count``."""
    for dtype in (padded.dtype, np.float64):
        lanes = np.add.accumulate(padded.astype(dtype))[-1].astype(np.float64)
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        mean = np.float32(lanes[0] / count)
        if np.isfinite(mean):
            break
    return mean


@np.errstate(all="ignore")
def encode(values: Array, residual: Array, payload: Array, block: int) -> int:
    """See ``OneBit.encode``."""
    used = 0
    for first in range(0, values.size, block):
        v = values[first : first + block].astype(residual.dtype) + residual[first : first + block]
        is_high = v >= 0
        levels = np.array([_mean(v, ~is_high), _mean(v, is_high)])
        residual[first : first + block] = v - np.where(is_high, levels[1], levels[0])
        encoded = np.concatenate([levels.view(np.uint8), np.packbits(is_high, bitorder="little")])
        payload[used : used + encoded.size] = encoded
        used += encoded.size
    return used


@np.errstate(all="ignore")
def decode(payload: Array, out: Array, block: int, accumulate: bool = False) -> None:
    """See ``OneBit.decode``."""
    at = 0
    for first in range(0, out.size, block):
        here = out[first : first + block]
        low, high = payload[at : at + 8].copy().view(np.float32)
        end = at + 8 + -(-here.size // 8)
        is_high = np.unpackbits(payload[at + 8 : end], count=here.size, bitorder="little").astype(bool)
        decoded = np.where(is_high, high, low)
        if accumulate:
            decoded = here.astype(np.result_type(np.float64 if here.dtype == np.float64 else np.float32)) + decoded
        here[:] = decoded.astype(out.dtype)
        at = end
