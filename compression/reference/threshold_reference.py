"""Threshold encode and decode in NumPy: what the kernels compute, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.reference.gaps_reference import decode_block, encode_block

Array = Any


def sampled(v: Array) -> Array:
    """Every fourth 8 values of a block, all of them below 4096."""
    return v if v.size < 4096 else v[np.arange(v.size) // 8 % 4 == 0]


def kth_largest(v: Array, k: int) -> Any:
    """The k-th largest magnitude; 0 where there are fewer."""
    return np.sort(np.abs(v))[-k] if k <= v.size else v.dtype.type(0)


def sampled_kth_largest(v: Array, k: int) -> Any:
    """About the k-th largest magnitude."""
    sample = sampled(v)
    return kth_largest(sample, k if v.size < 4096 else max(k // 4, 1))


def _tau_for(v: Array, density: float) -> np.float32:
    tau = sampled_kth_largest(v, max(int(density * v.size), 1))
    some = int(np.count_nonzero(v))
    exact = kth_largest(v, (some + 1) // 2) if tau == 0 and some else tau
    level = np.float32(exact)
    return np.nextafter(level, np.float32(0)) if level > exact else level  # which a value reaches


@np.errstate(all="ignore")
def encode(values: Array, residual: Array, payload: Array, block: int, tau: float | None, density: float) -> int:
    """See ``Encoder.encode``."""
    used = 0
    for first in range(0, values.size, block):
        v = values[first : first + block].astype(residual.dtype) + residual[first : first + block]
        level = _tau_for(v, density) if tau is None else np.float32(tau)
        sent = np.flatnonzero((np.abs(v) >= level) & (level > 0))
        encoded = encode_block(sent, [int(x < 0) for x in v[sent]], 1)
        if tau is None:
            encoded = np.concatenate([level.reshape(1).view(np.uint8), encoded])
        v[sent] -= np.where(v[sent] < 0, -level, level)
        residual[first : first + block] = v
        payload[used : used + encoded.size] = encoded
        used += encoded.size
    return used


@np.errstate(all="ignore")
def decode(payload: Array, out: Array, block: int, tau: float | None, density: float, accumulate: bool = False) -> None:
    """See ``Encoder.decode``."""
    at = 0
    for first in range(0, out.size, block):
        here = out[first : first + block]
        level = np.float32(tau or 0)
        if tau is None:
            level = payload[at : at + 4].copy().view(np.float32)[0]
            at += 4
        indexes, negative, nbytes = decode_block(payload[at:], 1)
        x = np.zeros(here.size, np.float64 if here.dtype == np.float64 else np.float32)
        x[indexes] = np.where(np.array(negative, bool), -level, level)
        here[:] = (here.astype(x.dtype) + x if accumulate else x).astype(out.dtype)
        at += nbytes
