"""Each value as float16, 10 bits of mantissa, and what rounding leaves as residual (mixed precision of gradients:
Micikevicius et al., "Mixed Precision Training", ICLR 2018; the residual: Seide et al., 2014).

v = values + residual, rounded to nearest, ties to even; float64 by way of float32. Beyond ±65504 the largest number is
sent and the rest is left, so that no payload holds an infinity unless values do; below 2^-24 all is left. Unlike a sum
made in float16, sums of decoded values are made in float32.

Payload: the n numbers, 2n bytes, little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from bitring.compression.encoder import Array, Encoder, write_out
from bitring.settings import setting


@dataclass(frozen=True)
class Float16(Encoder):
    """16 bits a value. Values share nothing: ``block`` (a multiple of 64) is only where pieces are cut."""

    block: int = setting(1024, multiple_of=64)

    def nbytes(self, n: int) -> int:
        """See Encoder."""
        return 2 * n

    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """See Encoder."""
        return encode_halves(values, residual, payload, np.float16)

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        write_out(payload.copy().view(np.float16), out, accumulate)


@np.errstate(all="ignore")
def encode_halves(values: Array, residual: Array, payload: Array, half: Any) -> int:
    """``encode``; ``half`` is float16 or bfloat16."""
    largest = float(ml_dtypes.finfo(half).max)
    v = values.astype(residual.dtype) + residual
    halves = np.clip(v, -largest, largest).astype(np.float32).astype(half)
    residual[:] = v - halves.astype(residual.dtype)
    payload[: halves.nbytes] = halves.view(np.uint8)
    return int(halves.nbytes)
