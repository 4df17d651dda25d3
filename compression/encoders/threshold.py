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
from typing import Any

import numpy as np

from bitring.compression.encoder import Array, Encoder, residual_dtype, write_out
from bitring.compression.exchange.gaps import decode_gaps, encode_gaps, expected_nbytes, most_nbytes, over_blocks
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

    @np.errstate(all="ignore")
    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """See Encoder."""
        used = 0
        for first in range(0, values.size, self.block):
            block = slice(first, first + self.block)
            v = values[block].astype(residual.dtype) + residual[block]
            level = _tau_for(v, self.density) if self.tau is None else np.float32(self.tau)
            sent = np.flatnonzero((np.abs(v) >= level) & (level > 0))
            encoded = encode_gaps(sent, [int(x < 0) for x in v[sent]], 1)
            if self.tau is None:
                encoded = np.concatenate([level.reshape(1).view(np.uint8), encoded])
            v[sent] -= np.where(v[sent] < 0, -level, level)
            residual[block] = v
            payload[used : used + encoded.size] = encoded
            used += encoded.size
        return used

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        at = 0
        for first in range(0, out.size, self.block):
            here = out[first : first + self.block]
            level = np.float32(self.tau or 0)
            if self.tau is None:
                level = payload[at : at + 4].copy().view(np.float32)[0]
                at += 4
            indexes, negative, nbytes = decode_gaps(payload[at:], here.size, 1)
            x = np.zeros(here.size, residual_dtype(out.dtype))
            x[indexes] = np.where(np.array(negative, bool), -level, level)
            write_out(x, here, accumulate)
            at += nbytes
        if at != payload.size:
            raise ValueError("bytes behind the last value")


def sampled(v: Array) -> Array:
    """Every fourth 8 values of a block, all of them below 4096."""
    return v if v.size < 4096 else v[np.arange(v.size) // 8 % 4 == 0]


def kth_largest(v: Array, k: int) -> Any:
    """The k-th largest magnitude; 0 where there are fewer."""
    return np.sort(np.abs(v))[-k] if k <= v.size else v.dtype.type(0)


def sampled_kth_largest(v: Array, k: int) -> Any:
    """About the k-th largest magnitude."""
    sample = sampled(v)
    return kth_largest(sample, k if v.size < 4096 else max(k // 4, 1))


def _tau_for(v: Array, density: float) -> np.float32:
    tau = sampled_kth_largest(v, max(int(density * v.size), 1))
    some = int(np.count_nonzero(v))
    exact = kth_largest(v, (some + 1) // 2) if tau == 0 and some else tau
    level = np.float32(exact)
    return np.nextafter(level, np.float32(0)) if level > exact else level  # which a value reaches
