"""Kernels of ``bfloat16.py`` for host memory. What they compute: its NumPy code, bit for bit."""

from __future__ import annotations

from typing import Any

from bitring.compression.kernels.cast_numba import bfloat16s, decode_halves, encode_halves

LARGEST = 3.3895313892515355e38


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; no settings."""
    return encode_halves(values, residual, n, bfloat16s(payload), capacity, LARGEST)


def decode(payload: Any, nbytes: int, out: Any, n: int, accumulate: int, settings: Any) -> Any:
    """See ``functions.py``; no settings."""
    return decode_halves(bfloat16s(payload), nbytes, out, n, accumulate)
