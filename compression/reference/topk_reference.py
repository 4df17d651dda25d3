"""Top-k encode and decode in NumPy: what the kernels compute, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.reference.gaps_reference import decode_block, encode_block
from bitring.compression.reference.threshold_reference import sampled_kth_largest

Array = Any


@np.errstate(all="ignore")
def encode(values: Array, residual: Array, payload: Array, block: int, density: float, sampled: bool) -> int:
    """See ``Encoder.encode``."""
    used = 0
    for first in range(0, values.size, block):
        v = values[first : first + block].astype(residual.dtype) + residual[first : first + block]
        k = max(int(density * v.size), 1)
        if sampled:
            sent = np.flatnonzero((np.abs(v) >= sampled_kth_largest(v, k)) & (v != 0))[: 2 * k]
        else:
            sent = np.sort(np.argsort(-np.abs(v), kind="stable")[:k])
            sent = sent[v[sent] != 0]
        x = v[sent].astype(np.float32)
        encoded = encode_block(sent, x.view(np.uint32).tolist(), 32)
        v[sent] -= x
        residual[first : first + block] = v
        payload[used : used + encoded.size] = encoded
        used += encoded.size
    return used


@np.errstate(all="ignore")
def decode(payload: Array, out: Array, block: int, accumulate: bool = False) -> None:
    """See ``Encoder.decode``."""
    at = 0
    for first in range(0, out.size, block):
        here = out[first : first + block]
        indexes, items, nbytes = decode_block(payload[at:], 32)
        x = np.zeros(here.size, np.float64 if here.dtype == np.float64 else np.float32)
        x[indexes] = np.array(items, np.uint32).view(np.float32)
        here[:] = (here.astype(x.dtype) + x if accumulate else x).astype(out.dtype)
        at += nbytes
