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

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bitring.compression.encoder import (
    Array,
    Encoder,
    packed_nbytes,
    residual_dtype,
    write_out,
)
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

    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """See Encoder."""
        return encode_steps(values, residual, payload, self.block, self.bits, _quantized)

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        decode_steps(payload, out, self.block, self.bits, accumulate)


def _quantized(v: Array, most: int) -> tuple[np.float32, Array]:
    step = np.float32(np.abs(v).max() / np.float64(most))
    if step < np.float32(2.0**-126):
        return np.float32(0), np.zeros_like(v)
    return step, np.rint(v * v.dtype.type(1 / np.float64(step)))


@np.errstate(all="ignore")
def encode_steps(
    values: Array,
    residual: Array,
    payload: Array,
    block: int,
    bits: int,
    quantized: Callable[[Array, int], tuple[np.float32, Array]],
) -> int:
    """``encode``, with a step and whole numbers that ``quantized`` makes of a block and the largest such number."""
    used, most = 0, 2 ** (bits - 1) - 1
    for first in range(0, values.size, block):
        v = values[first : first + block].astype(residual.dtype) + residual[first : first + block]
        step, q = quantized(v, most)
        q = np.clip(q, -most, most) + v.dtype.type(0)  # no -0
        residual[first : first + block] = v - q * step
        codes = (q.astype(np.int64)[:, None] >> np.arange(bits) & 1).astype(np.uint8)
        encoded = np.concatenate([step.reshape(1).view(np.uint8), np.packbits(codes, bitorder="little")])
        payload[used : used + encoded.size] = encoded
        used += encoded.size
    return used


@np.errstate(all="ignore")
def decode_steps(payload: Array, out: Array, block: int, bits: int, accumulate: bool) -> None:
    """``decode`` of what ``encode_steps`` wrote."""
    at, wide = 0, residual_dtype(out.dtype)
    weights = 2.0 ** np.arange(bits) * np.where(np.arange(bits) == bits - 1, -1, 1)
    for first in range(0, out.size, block):
        here = out[first : first + block]
        step = payload[at : at + 4].copy().view(np.float32)[0]
        end = at + 4 + -(-here.size * bits // 8)
        codes = np.unpackbits(payload[at + 4 : end], count=here.size * bits, bitorder="little").reshape(-1, bits)
        write_out((codes @ weights).astype(wide) * step, here, accumulate)
        at = end
