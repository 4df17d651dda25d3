"""Each value as float16, 10 bits of mantissa, and what rounding leaves as residual (mixed precision of gradients:
Micikevicius et al., "Mixed Precision Training", ICLR 2018; the residual: Seide et al., 2014).

v = values + residual, rounded to nearest, ties to even; float64 by way of float32. Beyond ±65504 the largest number is
sent and the rest is left, so that no payload holds an infinity unless values do; below 2^-24 all is left. Unlike a sum
made in float16, sums of decoded values are made in float32.

Payload: the n numbers, 2n bytes, little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.compression.encoder import Encoder
from bitring.settings import setting


@dataclass(frozen=True)
class Float16(Encoder):
    """16 bits a value. Values share nothing: ``block`` (a multiple of 64) is only where pieces are cut."""

    block: int = setting(1024, multiple_of=64)

    def nbytes(self, n: int) -> int:
        """See Encoder."""
        return 2 * n

    def settings(self) -> tuple[float, ...]:
        """See Encoder."""
        return ()
