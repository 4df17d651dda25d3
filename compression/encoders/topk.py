"""Only the largest values of each block, exactly (Aji and Heafield, "Sparse Communication for Distributed Gradient
Descent", EMNLP 2017; Lin et al., "Deep Gradient Compression", ICLR 2018, for the sampled threshold).

v = values + residual. Of a block of b values the k = max(⌊density · b⌋, 1) largest |v| are sent as float32, of equal
ones the first; residual is 0 there (for float64 what float32 rounds off) and v elsewhere. With ``sampled``, sent is
what reaches about the k-th largest |v|, taken of every fourth 8 values (of all in a block below 4096), up to 2k
values, the first ones: half as much work. Zeros are not sent; NaN neither. A float64 beyond float32's range is sent as
infinity.

Payload, block after block, each from a whole byte on: the indexes, coded by their gaps as ``gaps_numba.py`` says, each
with the 32 bits of its float32; the last bits are zero. At a density of one in a hundred a sent value takes 40 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bitring.compression.encoder import Array, Encoder, residual_dtype, write_out
from bitring.compression.encoders.threshold import sampled_kth_largest
from bitring.compression.exchange.gaps import decode_gaps, encode_gaps, expected_nbytes, most_nbytes, over_blocks
from bitring.settings import setting


@dataclass(frozen=True)
class TopK(Encoder):
    """A part ``density`` (above 0, up to 1) of every ``block`` values (a positive multiple of 64), the largest."""

    density: float = setting(0.01, above=0, most=1)
    sampled: bool = False
    block: int = setting(1 << 16, multiple_of=64)

    fixed_size = False

    def _sent(self, count: int) -> int:
        return max(int(self.density * count), 1)

    def nbytes(self, n: int) -> int:
        """See Encoder."""

        def most(count: int) -> int:
            k = self._sent(count)
            return most_nbytes(count, min(2 * k, count) if self.sampled else k, 32)

        return over_blocks(n, self.block, most)

    def expected_nbytes(self, n: int) -> float:
        """See Encoder; of values that are alike."""
        return over_blocks(n, self.block, lambda count: expected_nbytes(count, self._sent(count), 32))

    def settings(self) -> tuple[float, ...]:
        """See Encoder."""
        return (self.block, self.density, self.sampled)

    @np.errstate(all="ignore")
    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """See Encoder."""
        used = 0
        for first in range(0, values.size, self.block):
            block = slice(first, first + self.block)
            v = values[block].astype(residual.dtype) + residual[block]
            k = self._sent(v.size)
            if self.sampled:
                sent = np.flatnonzero((np.abs(v) >= sampled_kth_largest(v, k)) & (v != 0))[: 2 * k]
            else:
                sent = np.sort(np.argsort(-np.abs(v), kind="stable")[:k])
                sent = sent[v[sent] != 0]
            x = v[sent].astype(np.float32)
            encoded = encode_gaps(sent, x.view(np.uint32).tolist(), 32)
            v[sent] -= x
            residual[block] = v
            payload[used : used + encoded.size] = encoded
            used += encoded.size
        return used

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        at = 0
        for first in range(0, out.size, self.block):
            here = out[first : first + self.block]
            indexes, items, nbytes = decode_gaps(payload[at:], here.size, 32)
            x = np.zeros(here.size, residual_dtype(out.dtype))
            x[indexes] = np.array(items, np.uint32).view(np.float32)
            write_out(x, here, accumulate)
            at += nbytes
        if at != payload.size:
            raise ValueError("bytes behind the last value")
