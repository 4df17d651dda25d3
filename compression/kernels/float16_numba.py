"""Kernels of ``float16.py`` for host memory. What they compute: its NumPy code, bit for bit."""

from __future__ import annotations

from typing import Any

from bitring.compression.kernels.cast_numba import decode_halves, encode_halves, float16s

LARGEST = 65504.0


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; no settings."""
    return encode_halves(values, residual, n, float16s(payload), capacity, LARGEST)


def decode(payload: Any, nbytes: int, out: Any, n: int, accumulate: int, settings: Any) -> Any:
    """See ``functions.py``; no settings."""
    return decode_halves(float16s(payload), nbytes, out, n, accumulate)
