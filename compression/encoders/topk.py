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

from bitring.compression.encoder import Encoder
from bitring.compression.exchange.gaps import expected_nbytes, most_nbytes, over_blocks
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
