"""Each value as bfloat16, float32's range and 7 bits of mantissa, and what rounding leaves as residual (Kalamkar et
al., "A Study of BFLOAT16 for Deep Learning Training", 2019; the residual: Seide et al., 2014).

v = values + residual, rounded to nearest, ties to even; float64 by way of float32. Beyond the largest number, 3.39e38,
that is sent and the rest is left. Sums of decoded values are made in float32.

Payload: the n numbers, 2n bytes, little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes

from bitring.compression.encoder import Array, Encoder, write_out
from bitring.compression.encoders.float16 import encode_halves
from bitring.settings import setting


@dataclass(frozen=True)
class BFloat16(Encoder):
    """16 bits a value. Values share nothing: ``block`` (a multiple of 64) is only where pieces are cut."""

    block: int = setting(1024, multiple_of=64)

    def nbytes(self, n: int) -> int:
        """See Encoder."""
        return 2 * n

    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """See Encoder."""
        return encode_halves(values, residual, payload, ml_dtypes.bfloat16)

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        write_out(payload.copy().view(ml_dtypes.bfloat16), out, accumulate)
