"""1-bit quantization: the sign of each value, and two levels a block (Seide et al., "1-Bit Stochastic Gradient
Descent and its Application to Data-Parallel Distributed Training of Speech DNNs", Interspeech 2014).

v = values + residual. A value's bit is v >= 0, so -0.0 has it and NaN has not. A block's levels are the mean of its
values whose bit is clear (low) and of those whose bit is set (high), as float32; 0 for a mean of none. Decoded is the
level of the bit, and residual = v - decoded. A block of zeros decodes to zeros. NaN or infinity in a block makes one of
its levels NaN or infinite. So does a float64 mean beyond float32's range.

Payload, block after block, without gaps, little-endian::

    float32 low, float32 high, then bit k % 8 of byte k // 8 for value k of the block; the last bits are zero

A block of b values takes 8 + ceil(b / 8) bytes, the last one of an array being as short as its values. Encoding k
blocks gives k times the bytes that encoding each of them gives, so payloads of pieces are pieces of the payload.

Sums are made in one fixed order (``onebit_reference.py``) that no vector width, thread or alignment changes: NumPy,
Numba and CUDA give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitring.compression.encoder import Encoder
from bitring.settings import setting


@dataclass(frozen=True)
class OneBit(Encoder):
    """One bit a value, and two float32 levels for every ``block`` values (a positive multiple of 64)."""

    block: int = setting(1024, multiple_of=64)

    def nbytes(self, n: int) -> int:
        """See Encoder."""
        blocks, rest = divmod(n, self.block)
        return blocks * (8 + self.block // 8) + (8 + (rest + 7) // 8 if rest else 0)

    def settings(self) -> tuple[float, ...]:
        """See Encoder."""
        return (self.block,)

    def device_kernels(self) -> Any:
        """See Encoder."""
        from bitring.compression.kernels import onebit_cuda

        return onebit_cuda
