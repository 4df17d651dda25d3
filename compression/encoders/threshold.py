"""Only values that reach a threshold τ, each as its sign (Strom, "Scalable Distributed DNN Training Using Commodity GPU
Cloud Computing", Interspeech 2015).

v = values + residual. Where v >= τ, τ is sent and residual = v - τ; where v <= -τ, -τ is sent and residual = v + τ; all
else is left. So no |residual| is larger than |v|, and what is below τ waits until it has grown. τ is fixed, or found
anew for each block, for about a part ``density`` of its values: the quantile of |v| of every fourth 8 values (of all in
a block below 4096); where fewer values are not zero, the median of those. A block of zeros decodes to zeros. NaN is
never sent.

Payload, block after block, each from a whole byte on, little-endian: with ``density`` the float32 τ of the block, then
the indexes, coded by their gaps as ``gaps_numba.py`` says, each with one bit, set for -τ; the last bits are zero. That
is about log2(1/p) + 2.5 bits a sent value, p being the part that is sent: 9 bits of one in a hundred.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitring.compression.encoder import Encoder
from bitring.compression.exchange.gaps import expected_nbytes, most_nbytes, over_blocks
from bitring.settings import setting


@dataclass(frozen=True)
class Threshold(Encoder):
    """A fixed ``tau`` (above 0), or about a part ``density`` (above 0, up to 1) of every ``block`` values.

    Not both: ``expected_nbytes`` takes a fixed ``tau`` to be reached by one value in a hundred. ``block`` is a positive
    multiple of 64.
    """

    tau: float | None = setting(None, above=0, most=3e38)
    density: float = setting(0.01, above=0, most=1)
    block: int = setting(1 << 16, multiple_of=64)

    fixed_size = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and self.density != Threshold.density:
            raise ValueError(f"Threshold: expected tau or density; got both, {self.tau} and {self.density}")

    @property
    def _tau_nbytes(self) -> int:
        return 4 if self.tau is None else 0

    def nbytes(self, n: int) -> int:
        """See Encoder; all values may reach τ."""
        return over_blocks(n, self.block, lambda count: self._tau_nbytes + most_nbytes(count, count, 1))

    def expected_nbytes(self, n: int) -> float:
        """See Encoder; of values that are alike, of which a part ``density`` reaches τ."""

        def expected(count: int) -> float:
            return self._tau_nbytes + expected_nbytes(count, max(int(self.density * count), 1), 1)

        return over_blocks(n, self.block, expected)

    def settings(self) -> tuple[float, ...]:
        """See Encoder."""
        return (self.block, 0, self.density) if self.tau is None else (self.block, self.tau, 0)
