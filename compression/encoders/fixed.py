"""Fixed-point numbers of 3 to 16 bits, rounded by lot so that they are right on average (Gupta et al., "Deep Learning
with Limited Numerical Precision", ICML 2015), one position of the point a block.

v = values + residual. With m = 2^(bits-1) - 1, a block's step is the smallest power of two, 2^-126 or more, with
max|v| <= m · step. v lies between two multiples of step and is sent as one of them, the upper one with a probability
of how far v has come from the lower one: the expectation of what is decoded, over seeds, is v (probabilities being
multiples of 2^-24). What is drawn depends on the seed, on v's bits and on v's place in the block, on nothing else, so
that the same arguments give the same payload.

|residual| < step. Such rounding is no contraction: a small value may leave more than it was. With 3 bits or more,
residuals stay within twice the largest gradient; with 2 they would grow without end. A block of zeros decodes to
zeros. The step of a block with an infinity is infinite.

Payload: that of ``linear.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.compression.encoder import Encoder, packed_nbytes
from bitring.settings import setting


@dataclass(frozen=True)
class Fixed(Encoder):
    """``bits`` (3 to 16) a value, and a float32 step for every ``block`` values (a positive multiple of 64)."""

    draws = True

    bits: int = setting(8, least=3, most=16)
    block: int = setting(1024, multiple_of=64)

    def nbytes(self, n: int) -> int:
        """See Encoder."""
        return packed_nbytes(n, self.block, self.bits)

    def settings(self) -> tuple[float, ...]:
        """See Encoder."""
        return (self.block, self.bits)
