"""Uniform quantization to 2 to 8 bits a value, one scale a block (Alistarh et al., "QSGD: Communication-Efficient SGD
via Gradient Quantization and Encoding", NIPS 2017, with rounding to nearest and a residual in place of its lottery).

v = values + residual. With m = 2^(bits-1) - 1, a block's step is max|v| / m as float32; value k is the whole number
q = v / step, rounded to nearest, between -m and m. It decodes to q · step. Zero is a level, so that no |residual| is
larger than |v|, and the largest value of each block is sent all but exactly: residuals of one gradient vanish. A block
of zeros decodes to zeros; one whose step were below 2^-126 decodes to zeros and is left. The step of a block with an
infinity is infinite.

Payload, block after block, without gaps, little-endian::

    float32 step, then q of each value, in two's complement: bits k·bits to (k+1)·bits - 1; the last bits are zero

A block of b values takes 4 + ceil(b · bits / 8) bytes, the last one of an array being as short as its values.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.compression.encoder import Encoder, packed_nbytes
from bitring.settings import setting


@dataclass(frozen=True)
class Linear(Encoder):
    """``bits`` (2 to 8) a value, and a float32 step for every ``block`` values (a positive multiple of 64)."""

    bits: int = setting(4, least=2, most=8)
    block: int = setting(1024, multiple_of=64)

    def nbytes(self, n: int) -> int:
        """See Encoder."""
        return packed_nbytes(n, self.block, self.bits)

    def settings(self) -> tuple[float, ...]:
        """See Encoder."""
        return (self.block, self.bits)
