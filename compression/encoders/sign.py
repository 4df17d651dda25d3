"""The sign of each value, and one scale a block: mean|v| (Karimireddy et al., "Error Feedback Fixes SignSGD and other
Gradient Compression Schemes", ICML 2019).

v = values + residual. A value's bit is v >= 0, as in ``onebit.py``; it decodes to scale or -scale, where scale is the
mean of the block's |v| as float32. What is left has ‖v‖²(1 - ρ²), ρ = mean|v| / RMS(v): always less than v. (A scale of
RMS(v) would leave more than v where ρ < 1/2.) A block of zeros decodes to zeros. One level less than ``onebit``, and
none of its own for values whose mean is not zero.

Payload, block after block, without gaps, little-endian::

    float32 scale, then bit k % 8 of byte k // 8 for value k of the block; the last bits are zero

A block of b values takes 4 + ceil(b / 8) bytes, the last one of an array being as short as its values.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.compression.encoder import Encoder
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
