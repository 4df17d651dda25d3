"""1-bit panels of a matrix: signs, and levels of rank one, a number of the row times one of the column.

A dense gradient is a sum of products error·activation, so its magnitudes are nearly of rank one: dead outputs and dead
inputs get levels near zero. (Xu et al., "OneBit: Towards Extremely Low-bit Large Language Models", NeurIPS 2024,
decompose weights so.) Rows keep the mean of their negative and that of their other values, as blocks of 1-bit SGD do.

v = values + residual, a panel of some rows. A value's bit is v >= 0, so -0.0 has it and NaN has not. With groups of
``row_group`` neighbouring rows and of ``column_group`` neighbouring columns:

- a column's number c is the sum of abs(v) over the rows, of its group the mean, over the largest such sum, as 3 bits;
- a row's numbers are the means of the negative and of the other values of its group, each over the largest such mean of
  the panel, as 4 bits;
- low and high, two float32, are these largest means over the mean of all columns' c.

A bit decodes to (low or high · the row's number)·c, products in float32, and residual = v - decoded. Rows and columns
of zeros decode to zeros. NaN or infinity in a panel makes
what it decodes to there NaN, and possibly all of its sign. So does a mean beyond float32's range.

The codes are short floating-point numbers: the nearest of zero, code 0, and the largest ``2**nbits - 1`` of the numbers
1, 3/4, 1/2, 3/8, 1/4, ..., whose float32 bits go down in steps of 2**22. What is less than half of the last of them is
zero, so that nearly dead columns and rows get nothing, rather than noise; what they have gathers in the residual.

Payload, panel after panel, without gaps, little-endian; the last bits of each part are zero::

    float32 low, float32 high; 3 bits for each group of columns; a byte for each group of rows, the code of its low in
    the 4 lower bits; a bit for each value, each row beginning with a byte

Groups are of as many rows as ``256 / columns`` asks for, and of as many columns as it takes to keep all panels of a
buffer together within the bytes of 1-bit blocks of 1024 values, 17/16 bits a value; both are powers of two. Small
matrices are the last whose columns share numbers.

Sums are made in one fixed order: of a row as ``onebit.py`` makes those of a block, and float64 adds those of a group's
rows, one after the other; of a column in the residual's dtype, of abs(v)·2**-8, row after row; of a group's columns
likewise.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bitring.compression.encoder import Array, Encoder, write_out
from bitring.settings import setting

PANEL_ROWS = 64
"""A panel has about as many rows, or fewer: it stays in the cache from the first pass over it to the second."""

NARROW = 576
"""With fewer columns, panels have about twice as many rows: columns need not share numbers then."""

MOST_ROWS = 256
"""Where such panels are not worth their levels; the sum of so many values·2**-8 does not overflow."""

COLUMN_NBITS, ROW_NBITS = 3, 4
LARGEST = float(np.finfo(np.float32).max)
_STEP = 22
_ONE = 0x3F800000 >> _STEP


@dataclass(frozen=True)
class RankOne(Encoder):
    """One bit a value, and levels of rank one for panels of up to ``rows`` rows of ``columns`` values.

    ``column_group`` neighbouring columns share a number, a power of two.
    """

    columns: int = setting(1024, least=1)
    rows: int = setting(PANEL_ROWS, least=1, most=MOST_ROWS)
    column_group: int = setting(1, least=1)
    block: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "block", self.columns * self.rows)

    def nbytes(self, n: int) -> int:
        """See Encoder. Raises ValueError unless ``n`` values are whole rows."""
        if n % self.columns:
            raise ValueError(f"RankOne.nbytes: n must be whole rows of {self.columns} values; got {n}")
        panels, rest = divmod(n // self.columns, self.rows)
        return panels * self.panel_nbytes(self.rows) + (self.panel_nbytes(rest) if rest else 0)

    def panel_nbytes(self, rows: int) -> int:
        """Bytes of a panel of so many rows."""
        return 8 + self._codes_nbytes + -(-rows // self.row_group) + rows * self._row_nbytes

    @property
    def _row_nbytes(self) -> int:
        return (self.columns + 7) // 8

    @property
    def _codes_nbytes(self) -> int:
        return (COLUMN_NBITS * -(-self.columns // self.column_group) + 7) // 8

    @property
    def row_group(self) -> int:
        """Neighbouring rows that share their numbers."""
        group = 1
        while group * self.columns < 256:
            group *= 2
        return group

    def settings(self) -> tuple[float, ...]:
        """See Encoder."""
        return self.columns, self.rows, self.column_group

    @np.errstate(all="ignore")
    def encode(self, values: Array, residual: Array, payload: Array, seed: int = 0) -> int:
        """See Encoder."""
        used = 0
        for first in range(0, values.size, self.block):
            panel = slice(first, first + self.block)
            v = (values[panel].astype(residual.dtype) + residual[panel]).reshape(-1, self.columns)
            is_high = v >= 0
            parts, levels = self._levels(v, is_high)
            residual[panel] = (v - levels.astype(v.dtype)).reshape(-1)
            for part in (*parts, np.packbits(is_high, axis=1, bitorder="little").reshape(-1)):
                payload[used : used + part.size] = part
                used += part.size
        return used

    def _levels(self, v: Array, is_high: Array) -> tuple[list[Array], Array]:
        """The parts of the payload before the bits, and what the bits decode to."""
        columns, group = self.columns, self.column_group
        sums = np.add.accumulate(np.abs(v) * v.dtype.type(2.0**-8), axis=0)[-1]
        column_codes = _coded(_group_sums(sums, group) / _group_counts(columns, group), COLUMN_NBITS)
        mean = float(np.repeat(_decoded(column_codes, COLUMN_NBITS), group)[:columns].sum(dtype=np.float64)) / columns
        largest: list[float] = []
        codes: list[Array] = []
        for members in (~is_high, is_high):
            sums = _group_sums(_sums_of_rows(v, members), self.row_group)
            counts = _group_sums(np.count_nonzero(members, axis=1).astype(np.float64), self.row_group)
            means = np.abs(np.where(counts > 0, sums / np.maximum(counts, 1), 0).astype(np.float32))
            codes.append(_coded(means, ROW_NBITS))
            largest.append(_level(float(means.max()), mean))
        head = np.array([-largest[0], largest[1]], np.float32)
        row_bytes = codes[0] | codes[1] << ROW_NBITS
        bits = (column_codes[:, None] >> np.arange(COLUMN_NBITS, dtype=np.uint8)) & 1
        parts = [head.view(np.uint8), np.packbits(bits, bitorder="little"), row_bytes.astype(np.uint8)]
        return parts, self._products(head, column_codes, row_bytes, is_high)

    def _products(self, head: Array, column_codes: Array, row_bytes: Array, is_high: Array) -> Array:
        rows, columns = is_high.shape
        c = np.repeat(_decoded(column_codes, COLUMN_NBITS), self.column_group)[:columns]
        nibbles = row_bytes & (1 << ROW_NBITS) - 1, row_bytes >> ROW_NBITS
        low, high = (
            np.repeat(level * _decoded(codes, ROW_NBITS), self.row_group)[:rows, None]
            for level, codes in zip(head, nibbles, strict=True)
        )
        return np.where(is_high, high, low) * c

    @np.errstate(all="ignore")
    def decode(self, payload: Array, out: Array, accumulate: bool = False) -> None:
        """See Encoder."""
        at = 0

        def take(count: int) -> Array:
            nonlocal at
            at += count
            return payload[at - count : at]

        for first in range(0, out.size, self.block):
            here = out[first : first + self.block]
            rows = here.size // self.columns
            head = take(8).copy().view(np.float32)
            columns = -(-self.columns // self.column_group)
            packed = take(self._codes_nbytes)
            codes = _unpacked(packed.reshape(1, -1), COLUMN_NBITS * columns).reshape(-1, COLUMN_NBITS)
            column_codes = codes @ (1 << np.arange(COLUMN_NBITS))
            row_bytes = take(-(-rows // self.row_group))
            bits = _unpacked(take(rows * self._row_nbytes).reshape(rows, -1), self.columns)
            write_out(self._products(head, column_codes, row_bytes, bits == 1).reshape(-1), here, accumulate)


def panels_of(rows: int, columns: int) -> RankOne | None:
    """Panels of so many rows, as high as each other; columns share no numbers.

    None where panels would take more bytes than blocks of 1024 values do even if all columns shared one.
    """
    most = PANEL_ROWS if columns >= NARROW else 2 * PANEL_ROWS
    while True:
        count = max(1, (2 * rows + most) // (2 * most), -(-rows // MOST_ROWS))
        height = -(-rows // count)
        panels = RankOne(columns, height)
        if 128 * _coarsest(panels).nbytes(rows * columns) <= 17 * rows * columns:
            return panels
        if height == rows or most == MOST_ROWS:
            return None
        most = min(MOST_ROWS, most + most // 2)


def fitted(encoders: Sequence[Encoder], sizes: Sequence[int]) -> list[Encoder]:
    """Panels with as many numbers of columns as fit in; ``sizes``: the values that each of the encoders is for.

    What is encoded together takes no more bytes than blocks of 1024 values do, as far as columns that share numbers can
    bring that about. Groups of columns are doubled that are the smallest, of those where most bytes are.
    """
    fitting = list(encoders)
    nbytes = [encoder.nbytes(size) for encoder, size in zip(fitting, sizes, strict=True)]
    panels = {k: each for k, each in enumerate(fitting) if isinstance(each, RankOne)}
    least = {k: _coarsest(each).nbytes(sizes[k]) for k, each in panels.items()}
    room = sum(max(17 * size, 128 * least.get(k, nbytes[k])) for k, size in enumerate(sizes))
    total = sum(nbytes)
    finest = [(each.column_group, -nbytes[k], k) for k, each in panels.items()]
    heapq.heapify(finest)
    while 128 * total > room:
        group, _, k = heapq.heappop(finest)
        fitting[k] = panels[k] = replace(panels[k], column_group=2 * group)
        total -= nbytes[k]
        nbytes[k] = fitting[k].nbytes(sizes[k])
        total += nbytes[k]
        if 2 * group < panels[k].columns:
            heapq.heappush(finest, (2 * group, -nbytes[k], k))
    return fitting


def _coarsest(panels: RankOne) -> RankOne:
    """The panels with a single number of all columns."""
    return replace(panels, column_group=1 << panels.columns.bit_length())


def _group_counts(n: int, group: int) -> Array:
    return np.minimum(group, n - np.arange(0, n, group)).astype(np.float32)


def _group_sums(x: Array, group: int) -> Array:
    """Sums of each ``group`` neighbours in a row, one after the other; the last group may be smaller."""
    padded = np.zeros(-(-x.size // group) * group, x.dtype)
    padded[: x.size] = x
    return np.add.accumulate(padded.reshape(-1, group), axis=1)[:, -1]


def _sums_of_rows(v: Array, members: Array) -> Array:
    """The sum of those values of each row where ``members`` is true, float64, in 32 lanes."""
    rows, columns = v.shape
    padded = np.zeros((rows, -(-columns // 32) + 1, 32), v.dtype)  # the first stay zero, so that no sum is -0.0
    padded.reshape(rows, -1)[:, 32 : 32 + columns] = np.where(members, v, 0)
    result = _folded(padded)
    return np.where(np.isfinite(result), result, _folded(padded.astype(np.float64)))


def _folded(padded: Array) -> Array:
    lanes: Any = np.add.accumulate(padded, axis=1)[:, -1].astype(np.float64)
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _level(largest: float, mean: float) -> float:
    level = largest / (mean or 1.0)
    return min(level, LARGEST) if math.isfinite(largest) else level


def _coded(x: Array, nbits: int) -> Array:
    """The codes of ``x``, at least 0, over the largest of them."""
    largest = x.max()
    if not (largest > 0 and math.isfinite(largest)):
        return np.zeros(x.size, np.uint8)
    ratio = (x / largest).astype(np.float32)
    top = (1 << nbits) - 1
    steps = ((ratio.view(np.uint32) + (1 << (_STEP - 1))) >> _STEP).astype(np.int64) - _ONE
    return np.where(ratio >= 2.0 ** -(1 << nbits - 1), np.clip(steps + top, 1, top), 0).astype(np.uint8)


def _decoded(codes: Array, nbits: int) -> Array:
    top = (1 << nbits) - 1
    numbers = ((codes.astype(np.int64) - top + _ONE) << _STEP).astype(np.uint32).view(np.float32)
    return np.where(codes > 0, numbers, np.float32(0))


def _unpacked(packed: Array, count: int) -> Array:
    """The first ``count`` bits of each row. Raises ValueError where others are set."""
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    if bits[:, count:].any():
        raise ValueError("bits behind the last value")
    return bits[:, :count]
