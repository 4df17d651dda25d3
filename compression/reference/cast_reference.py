"""Values as 16-bit floats in NumPy: what the kernels of ``float16.py`` and ``bfloat16.py`` compute, bit for bit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = Any


@np.errstate(all="ignore")
def encode(values: Array, residual: Array, payload: Array, half: Any) -> int:
    """See ``Encoder.encode``; ``half`` is float16 or bfloat16."""
    largest = float(ml_dtypes.finfo(half).max)
    v = values.astype(residual.dtype) + residual
    halves = np.clip(v, -largest, largest).astype(np.float32).astype(half)
    residual[:] = v - halves.astype(residual.dtype)
    payload[: halves.nbytes] = halves.view(np.uint8)
    return int(halves.nbytes)


@np.errstate(all="ignore")
def decode(payload: Array, out: Array, half: Any, accumulate: bool = False) -> None:
    """See ``Encoder.decode``."""
    x = payload.copy().view(half).astype(np.float64 if out.dtype == np.float64 else np.float32)
    out[:] = ((out.astype(x.dtype) + x) if accumulate else x).astype(out.dtype)
