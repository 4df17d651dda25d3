"""1-bit panels with levels of rank one on host memory, compiled by Numba. What they compute: ``rank_one.py``, bit for
bit.

Values are taken in groups of 32 of a row. A panel is passed over twice, from its first row to the last and back; in
between v is where the residual is. Numbers of columns lie in two arrays, as long as a row and a group: their sums, in
which the first pass adds, and the numbers made of them. Decoded values of large buffers go past the cache. Inside,
arrays are addresses of any alignment; ``like`` is a pointer that tells a kernel the type of its values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitring.compression.kernels.doubles_numba import NEGATIVE, OTHERS, sum_of_v_in_doubles
from bitring.compression.kernels.jit import shared
from bitring.compression.kernels.onebit_numba import GROUP, PARTS, WORD_NBYTES, _group, _ones, _total
from bitring.compression.kernels.rank_one_columns_numba import (
    COLUMN_NBITS,
    ONE,
    STEP,
    columns_nbytes,
    put_column_codes,
    put_numbers,
)
from bitring.compression.kernels.rank_one_rows_numba import ADD, PAST_CACHE, REPLACE, STORED_NBYTES, leave, scan, unpack
from bitring.compression.kernels.vectors_numba import (
    LARGEST,
    PART,
    address,
    clear,
    copy,
    end_of_stores,
    get,
    itemsize,
    put,
)

HEAD_NBYTES = 8  # two float32 before the codes
ROW_NBITS = 4
ROW_TOP = (1 << ROW_NBITS) - 1
LARGE = 1 << 19  # bytes of decoded values that will not be in the cache when they are needed
ROW_SUMS_NBYTES = 32  # four float64: the sum and the count of negative values, then of the others


@shared
def _code(ratio: Any) -> Any:
    """The code of a row's float32 from 0 to 1."""
    if not ratio >= 2.0 ** -(1 << ROW_NBITS - 1):
        return 0
    bits = np.int64(np.float32(ratio).view(np.uint32))
    return min(max(((bits + (1 << (STEP - 1))) >> STEP) - ONE + ROW_TOP, 1), ROW_TOP)


@shared
def _number(code: int) -> Any:
    """What a row's code says."""
    if code == 0:
        return np.float32(0)
    return np.uint32((code - ROW_TOP + ONE) << STEP).view(np.float32)


@shared
def _row_group(columns: int) -> Any:
    group = 1
    while group * columns < 256:
        group *= 2
    return group


@shared
def _put_row_codes(sums: int, row_groups: int, which: int, codes: int, mean: float) -> Any:
    """Write the codes of groups of rows, whose sums and counts become means; returns the level of the largest."""
    largest, finite = np.float32(0), True
    for k in range(row_groups):
        at = sums + k * ROW_SUMS_NBYTES + which * 16
        count = get(at + 8, 0.0)
        x = np.float32(abs(get(at, 0.0) / count)) if count > 0 else np.float32(0)
        put(at, x)
        finite = finite and x - x == 0
        if x > largest or not finite:
            largest = largest if largest - largest != 0 else x
    for k in range(row_groups):
        x = get(sums + k * ROW_SUMS_NBYTES + which * 16, np.float32(0))
        code = _code(np.float32(x / largest)) if finite and largest > 0 else 0
        put(codes + k, np.uint8(get(codes + k, np.uint8(0)) | (code << (which * ROW_NBITS))))
    level = np.float64(largest) / (mean if mean > 0 else 1.0)
    return np.float32(min(level, LARGEST) if finite else level)


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; settings: columns, rows, columns of a group."""
    columns: Any = np.int64(settings[0])
    most: Any = np.int64(settings[1])
    group: Any = np.int64(settings[2])
    nbytes, wide = itemsize(values), itemsize(residual)
    groups, rest, row_nbytes = columns // GROUP, columns % GROUP, (columns + 7) // 8
    parts, odd = columns // PART, columns % PART
    tail, tail_wide, tail_bits = groups * GROUP * nbytes, groups * GROUP * wide, groups * WORD_NBYTES
    padded = (groups + 1) * GROUP
    memory = np.zeros(padded * (wide + 2) + most * ROW_SUMS_NBYTES, np.uint8)
    column_sums = memory.ctypes.data
    numbers = column_sums + padded * wide
    row_sums = numbers + padded * 2
    here, left, code = address(values), address(residual), address(payload)
    end = code + capacity
    last_here, last_left, last_bits = _group(), _group(), _group()
    row_group = _row_group(columns)
    for first in range(0, n, columns * most):
        rows = min(most, (n - first) // columns)
        row_groups = (rows + row_group - 1) // row_group
        codes = code + HEAD_NBYTES
        row_codes = codes + columns_nbytes(columns, group)
        bits = row_codes + row_groups
        if bits + rows * row_nbytes > end:
            return -1
        clear(column_sums, padded * wide)
        clear(row_sums, row_groups * ROW_SUMS_NBYTES)
        for i in range(rows):
            x, r, b = here + i * columns * nbytes, left + i * columns * wide, bits + i * row_nbytes
            sums = _group()
            scan(x, r, b, groups * PARTS if odd else parts, sums, column_sums, values)
            highs = _ones(b, groups)
            if odd:
                clear(last_left, GROUP * wide)
                copy(last_here, x + tail, rest * nbytes)
                copy(last_left, r + tail_wide, rest * wide)
                scan(last_here, last_left, last_bits, PARTS, sums, column_sums + groups * GROUP * wide, values)
                put(last_bits, get(last_bits, np.uint32(0)) & np.uint32((1 << rest) - 1))
                copy(b + tail_bits, last_bits, (rest + 7) // 8)
                copy(r + tail_wide, last_left, rest * wide)
            elif rest:
                put(last_bits, np.uint32(0))
                copy(last_bits, b + tail_bits, rest // 8)
            if rest:
                highs += _ones(last_bits, 1)
            low, high = _total(sums, values), _total(sums + GROUP * wide, values)
            begin = first + i * columns
            if low - low != 0:
                low = sum_of_v_in_doubles(residual, begin, begin + columns, GROUP, NEGATIVE)
            if high - high != 0:
                high = sum_of_v_in_doubles(residual, begin, begin + columns, GROUP, OTHERS)
            at = row_sums + i // row_group * ROW_SUMS_NBYTES
            put(at, get(at, 0.0) + low)
            put(at + 8, get(at + 8, 0.0) + (columns - highs))
            put(at + 16, get(at + 16, 0.0) + high)
            put(at + 24, get(at + 24, 0.0) + highs)
        put_column_codes(column_sums, codes, columns, group, values)
        mean = put_numbers(codes, columns, group, numbers) / columns
        clear(row_codes, row_groups)
        low_level = -_put_row_codes(row_sums, row_groups, 0, row_codes, mean)
        high_level = _put_row_codes(row_sums, row_groups, 1, row_codes, mean)
        put(code, low_level)
        put(code + 4, high_level)
        for k in range(rows):
            i = rows - 1 - k  # the last row is the likeliest to be in the cache
            byte: Any = np.int64(get(row_codes + i // row_group, np.uint8(0)))
            low_row = low_level * _number(byte & ROW_TOP)
            high_row = high_level * _number(byte >> ROW_NBITS)
            r = left + i * columns * wide
            leave(r, parts, low_row, high_row, numbers, values)
            if odd:
                copy(last_left, r + parts * PART * wide, odd * wide)
                leave(last_left, 1, low_row, high_row, numbers + parts * PART * 2, values)
                copy(r + parts * PART * wide, last_left, odd * wide)
        here += rows * columns * nbytes
        left += rows * columns * wide
        code = bits + rows * row_nbytes
    return code - address(payload)


def decode(payload: Any, nbytes: int, out: Any, n: int, accumulate: int, settings: Any) -> Any:
    """See ``functions.py``; settings: columns, rows, columns of a group."""
    columns: Any = np.int64(settings[0])
    most: Any = np.int64(settings[1])
    group: Any = np.int64(settings[2])
    size = itemsize(out)
    parts, odd, row_nbytes = columns // PART, columns % PART, (columns + 7) // 8
    tail = parts * PART * size
    memory = np.zeros((parts + 1) * PART, np.uint16)
    numbers = memory.ctypes.data
    here, code = address(out), address(payload)
    end = code + nbytes
    last_here = _group()
    adds = ADD if accumulate else REPLACE
    large = not accumulate and n * size >= LARGE
    row_group = _row_group(columns)
    for first in range(0, n, columns * most):
        rows = min(most, (n - first) // columns)
        row_groups = (rows + row_group - 1) // row_group
        codes = code + HEAD_NBYTES
        row_codes = codes + columns_nbytes(columns, group)
        bits = row_codes + row_groups
        if bits + rows * row_nbytes > end:
            return -1
        used = (columns + group - 1) // group * COLUMN_NBITS % 8
        if used and get(row_codes - 1, np.uint8(0)) >> used:
            return -1
        put_numbers(codes, columns, group, numbers)
        low_level, high_level = get(code, np.float32(0)), get(code + 4, np.float32(0))
        for i in range(rows):
            byte: Any = np.int64(get(row_codes + i // row_group, np.uint8(0)))
            low = low_level * _number(byte & ROW_TOP)
            high = high_level * _number(byte >> ROW_NBITS)
            unpack(
                bits, here, parts, low, high, numbers, PAST_CACHE if large and not here % STORED_NBYTES else adds, out
            )
            if odd:
                if get(bits + parts, np.uint8(0)) >> odd:
                    return -1
                copy(last_here, here + tail, odd * size)
                unpack(bits + parts, last_here, 1, low, high, numbers + parts * PART * 2, adds, out)
                copy(here + tail, last_here, odd * size)
            here += columns * size
            bits += row_nbytes
        code = bits
    if large:
        end_of_stores()
    return 0 if code == end and n % columns == 0 else -1
