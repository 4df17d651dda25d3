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

from bitring.collectives.arrays import is_device
from bitring.compression.encoder import Array, Encoder, check_decode, check_encode, check_size


def _kernels(x: Array) -> Any:
    # Imported late: who only asks for settings needs neither Numba nor a GPU library.
    if is_device(x):
        from bitring.compression import onebit_cuda

        return onebit_cuda
    from bitring.compression import onebit_numba

    return onebit_numba


@dataclass(frozen=True)
class OneBit(Encoder):
    """One bit a value, and two float32 levels for every ``block`` values (a positive multiple of 64)."""

    block: int = 1024

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"OneBit: block must be an int; got {type(self.block).__name__}")
        if self.block < 64 or self.block % 64:
            raise ValueError(f"OneBit: block must be a positive multiple of 64; got {self.block}")

    def nbytes(self, n: int) -> int:
        """See Encoder; a payload takes exactly this."""
        blocks, rest = divmod(n, self.block)
        return blocks * (8 + self.block // 8) + (8 + (rest + 7) // 8 if rest else 0)

    def encode(self, values: Array, residual: Array, payload: Array) -> int:
        """See Encoder."""
        check_encode(self, values, residual, payload)
        _kernels(values).encode(values, residual, payload, self.block)
        return self.nbytes(values.size)

    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        check_decode(self, payload, out)
        check_size(self, payload, out, self.nbytes(out.size))
        _kernels(out).decode(payload, out, self.block, accumulate)
