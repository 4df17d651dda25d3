"""The upper half of each value as float32: sign, exponent and 7 bits of mantissa, cut off; the rest is the residual.

Payload: the n halves, 2n bytes, little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitring.compression.encoder import Array, Encoder, write_out


@dataclass(frozen=True)
class Mantissa(Encoder):
    """16 bits a value, rounded towards zero."""

    def nbytes(self, n: int) -> int:
        """See Encoder."""
        return 2 * n

    @np.errstate(all="ignore")
    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """See Encoder."""
        v = values.astype(residual.dtype) + residual
        largest = np.finfo(np.float32).max
        words = np.clip(v, -largest, largest).astype(np.float32).view(np.uint32) >> 16
        payload[:] = words.astype(np.uint16).view(np.uint8)
        residual[:] = v - (words << 16).astype(np.uint32).view(np.float32)
        return payload.size

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        words = payload.copy().view(np.uint16).astype(np.uint32) << 16
        write_out(words.astype(np.uint32).view(np.float32), out, accumulate)
