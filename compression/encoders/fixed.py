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

import numpy as np

from bitring.compression.encoder import Array, Encoder, packed_nbytes
from bitring.compression.encoders.linear import decode_steps, encode_steps
from bitring.settings import setting

U32, U64 = np.uint32, np.uint64


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

    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """See Encoder."""

        def quantized(v: Array, most: int) -> tuple[np.float32, Array]:
            largest = np.float64(np.abs(v).max())
            if largest == 0:
                return np.float32(0), np.zeros_like(v)
            exponent = max(int(np.frexp(largest / most)[1]) - 1, -126)  # of the power of two below, or equal
            exponent += int(largest > most * 2.0**exponent)
            x = v * v.dtype.type(2.0**-exponent)
            q = np.rint(x)
            u = drawn(v, seed)
            limit = np.floor(np.finfo(np.float32).max / 2.0**exponent)  # what is sent is finite
            q = np.clip(q + (u < x - q) - (u < q - x).astype(v.dtype), -limit, limit)
            return np.float32(2.0**exponent), q.astype(v.dtype)

        return encode_steps(values, residual, payload, self.block, self.bits, quantized)

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        decode_steps(payload, out, self.block, self.bits, accumulate)


def _mixed(x: Array) -> Array:
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ x >> U32(shift)) * U32(factor)
    return x ^ x >> U32(16)


def drawn(v: Array, seed: int) -> Array:
    """For each value of a block a multiple of 2^-24 in [0, 1)."""
    key = (seed + 1) * 0x9E3779B97F4A7C15 % 2**64
    key = (key ^ key >> 31) * 0xBF58476D1CE4E5B9 % 2**64
    key ^= key >> 29
    words = v.view(U32) if v.dtype == np.float32 else (v.view(U64) ^ v.view(U64) >> U64(32)).astype(U32)
    place = np.arange(v.size, dtype=U32)
    words = _mixed(words ^ U32(key % 2**32))
    words = _mixed(words + (place ^ U32(key >> 32)) * U32(0x9E3779B9))
    return (words >> U32(8)).astype(v.dtype) * v.dtype.type(2.0**-24)
