"""1-bit quantization: the sign of each value, and two levels a block (Seide et al., "1-Bit Stochastic Gradient
Descent and its Application to Data-Parallel Distributed Training of Speech DNNs", Interspeech 2014).

Parameters of two dimensions or more have levels of rank one instead, see ``rank_one.py``; or, with ``levels="row"``,
blocks that are rows. What follows is of blocks.

v = values + residual. A value's bit is v >= 0, so -0.0 has it and NaN has not. A block's levels are the mean of its
values whose bit is clear (low) and of those whose bit is set (high), as float32; 0 for a mean of none. Decoded is the
level of the bit, and residual = v - decoded. A block of zeros decodes to zeros. NaN or infinity in a block makes one of
its levels NaN or infinite. So does a float64 mean beyond float32's range.

Payload, block after block, without gaps, little-endian::

    float32 low, float32 high, then bit k % 8 of byte k // 8 for value k of the block; the last bits are zero

A block of b values takes 8 + ceil(b / 8) bytes, the last one of an array being as short as its values. Encoding k
blocks gives k times the bytes that encoding each of them gives, so payloads of pieces are pieces of the payload.

Sums are made in one fixed order that no vector width, thread or alignment changes: NumPy, Numba and CUDA give the same
bits (a NaN's own bits aside). Within a block, lane k of 32 adds values k, k + 32, ... in that order, in the residual's
dtype (negative and other values each have their lanes; a value of the other class counts as zero); then float64 adds
the lanes pairwise: k and k + 16, then k and k + 8, down to k and k + 1. A level is that sum divided by the class's
count, rounded to float32. Where that is not finite, the lanes add in float64 instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bitring.compression.encoder import Array, Encoder, write_out
from bitring.compression.rank_one import PANEL_ROWS, RankOne, fitted, panels_of
from bitring.settings import setting


@dataclass(frozen=True)
class OneBit(Encoder):
    """One bit a value, and two float32 levels for every ``block`` values (a positive multiple of 64).

    ``levels``: of parameters whose shape is known and has two dimensions or more: the first one counts rows.
    "rank_one" are products of numbers of rows and columns; "row", two a row; "block", as if there were no shape; and
    "auto" is rank_one where that can take no more bytes than blocks of 1024 values do, else block.
    """

    most_left: ClassVar[float] = 1.5  # benchmarks/levels.py: at 1.65 and more trainings lost 4 points and more

    block: int = setting(1024, multiple_of=64)
    levels: str = setting("auto", one_of=("auto", "rank_one", "row", "block"))

    def grain(self, shape: tuple[int, ...]) -> int:
        """See Encoder."""
        return self.block if self._of(shape) is self else math.prod(shape[1:])

    def for_parts(self, shapes: Sequence[tuple[int, ...]]) -> list[Encoder]:
        """See Encoder."""
        return fitted([self._of(shape) for shape in shapes], [math.prod(shape) for shape in shapes])

    def _of(self, shape: tuple[int, ...]) -> Encoder:
        """The encoder of a parameter, or of rows of one, before columns share numbers."""
        if len(shape) < 2 or self.levels == "block" or not math.prod(shape):
            return self
        rows, columns = shape[0], math.prod(shape[1:])
        if self.levels == "row":
            return _Rows(columns)
        panels = panels_of(rows, columns)
        if panels is None and self.levels == "rank_one":
            return RankOne(columns, min(rows, PANEL_ROWS))
        return panels or self

    def nbytes(self, n: int, shape: tuple[int, ...] | None = None) -> int:
        """See Encoder; of a parameter of this ``shape``, where one is given."""
        each = self if shape is None else self.for_shape(shape)
        if each is not self:
            return each.nbytes(n)
        blocks, rest = divmod(n, self.block)
        return blocks * (8 + (self.block + 7) // 8) + (8 + (rest + 7) // 8 if rest else 0)

    def settings(self) -> tuple[float, ...]:
        """See Encoder."""
        return (self.block,)

    @np.errstate(all="ignore")
    def encode(
        self, values: Array, residual: Array, payload: Array, seed: int = 0, shape: tuple[int, ...] | None = None
    ) -> int:
        """See Encoder; ``shape``: of the parameter that the values are."""
        used = 0
        for first in range(0, values.size, self.block):
            block = slice(first, first + self.block)
            v = values[block].astype(residual.dtype) + residual[block]
            is_high = v >= 0
            levels = np.array([_mean(v, ~is_high), _mean(v, is_high)])
            residual[block] = v - np.where(is_high, levels[1], levels[0])
            encoded = np.concatenate([levels.view(np.uint8), np.packbits(is_high, bitorder="little")])
            payload[used : used + encoded.size] = encoded
            used += encoded.size
        return used

    def decode(
        self, payload: Array, out: Array, accumulate: bool = False, shape: tuple[int, ...] | None = None
    ) -> None:
        """See Encoder; ``shape``: with which the payload was encoded."""
        at = 0
        for first in range(0, out.size, self.block):
            here = out[first : first + self.block]
            low, high = payload[at : at + 8].copy().view(np.float32)
            end = at + 8 + -(-here.size // 8)
            is_high = np.unpackbits(payload[at + 8 : end], count=here.size, bitorder="little").astype(bool)
            write_out(np.where(is_high, high, low), here, accumulate)
            at = end


@dataclass(frozen=True)
class _Rows(OneBit):
    """Blocks that are rows, of any length."""

    block: int = 1024


def _mean(x: Array, members: Array) -> np.float32:
    """Mean of those ``x`` where ``members`` is true; 0 if there are none."""
    if not members.any():
        return np.float32(0)
    padded = np.zeros((-(-x.size // 32) + 1, 32), x.dtype)  # the first row stays zero, so that no sum is -0.0
    padded.reshape(-1)[32 : 32 + x.size] = np.where(members, x, 0)
    return mean_of_lanes(padded, int(np.count_nonzero(members)))


def mean_of_lanes(padded: Array, count: int) -> np.float32:
    """The sum of the columns of ``padded``, which are lanes, over ``count``."""
    mean = np.float32(0)
    for dtype in (padded.dtype, np.float64):
        lanes: Any = np.add.accumulate(padded.astype(dtype))[-1].astype(np.float64)
        while lanes.size > 1:
            lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
        mean = np.float32(lanes[0] / count)
        if np.isfinite(mean):
            break
    return mean
