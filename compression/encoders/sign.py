"""The sign of each value, and one scale a block: mean|v| (Karimireddy et al., "Error Feedback Fixes SignSGD and other
Gradient Compression Schemes", ICML 2019).

v = values + residual. A value's bit is v >= 0, as in ``onebit.py``; it decodes to scale or -scale, where scale is the
mean of the block's |v| as float32. What is left has ‖v‖²(1 - ρ²), ρ = mean|v| / RMS(v): always less than v. (A scale of
RMS(v) would leave more than v where ρ < 1/2.) A block of zeros decodes to zeros. One level less than ``onebit``, and
none of its own for values whose mean is not zero.

Payload, block after block, without gaps, little-endian::

    float32 scale, then bit k % 8 of byte k // 8 for value k of the block; the last bits are zero

A block of b values takes 4 + ceil(b / 8) bytes, the last one of an array being as short as its values.

Lane k of 8 adds |v| of values k, k + 8, ... in that order, in the residual's dtype; then float64 adds the lanes
pairwise: k and k + 4, then k and k + 2, then 0 and 1. Where that is not finite, the lanes add in float64 instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitring.compression.encoder import Array, Encoder, write_out
from bitring.compression.encoders.onebit import mean_of_lanes
from bitring.settings import setting


@dataclass(frozen=True)
class Sign(Encoder):
    """One bit a value, and a float32 scale for every ``block`` values (a positive multiple of 64)."""

    block: int = setting(1024, multiple_of=64)

    def nbytes(self, n: int) -> int:
        """See Encoder."""
        blocks, rest = divmod(n, self.block)
        return blocks * (4 + self.block // 8) + (4 + (rest + 7) // 8 if rest else 0)

    def settings(self) -> tuple[float, ...]:
        """See Encoder."""
        return (self.block,)

    @np.errstate(all="ignore")
    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """See Encoder."""
        used = 0
        for first in range(0, values.size, self.block):
            block = slice(first, first + self.block)
            v = values[block].astype(residual.dtype) + residual[block]
            padded = np.zeros((-(-v.size // 8) + 1, 8), v.dtype)
            padded.reshape(-1)[8 : 8 + v.size] = np.abs(v)
            scale = mean_of_lanes(padded, v.size)
            residual[block] = v - np.where(v >= 0, scale, -scale)
            encoded = np.concatenate([scale.reshape(1).view(np.uint8), np.packbits(v >= 0, bitorder="little")])
            payload[used : used + encoded.size] = encoded
            used += encoded.size
        return used

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        at = 0
        for first in range(0, out.size, self.block):
            here = out[first : first + self.block]
            scale = payload[at : at + 4].copy().view(np.float32)[0]
            end = at + 4 + -(-here.size // 8)
            is_high = np.unpackbits(payload[at + 4 : end], count=here.size, bitorder="little").astype(bool)
            write_out(np.where(is_high, scale, -scale), here, accumulate)
            at = end
