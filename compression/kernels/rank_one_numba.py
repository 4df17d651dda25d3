"""1-bit panels with levels of rank one on host memory, compiled by Numba. What they compute: ``rank_one.py``, bit for
bit.

Values are taken in groups of 32 of a row, as vectors of 8 lanes; a panel is passed over twice. Numbers of columns lie
in two arrays, as long as a row and a group: their sums, in which the first pass adds, and the numbers made of them.
Inside, arrays are addresses of any alignment; ``like`` is a pointer that tells a kernel the type of its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from bitring.compression.kernels.doubles_numba import NEGATIVE, OTHERS, sum_in_doubles
from bitring.compression.kernels.jit import shared
from bitring.compression.kernels.onebit_numba import GROUP, PARTS, WORD_NBYTES, _group, _ones, _total
from bitring.compression.kernels.vectors_numba import (
    DOUBLE,
    I1,
    I8,
    I16,
    I64,
    LARGEST,
    PART,
    WORDS,
    Kind,
    address,
    clear,
    copy,
    element,
    get,
    intrinsic,
    itemsize,
    not_negative,
    prefetch,
    put,
    read,
    splat,
    write,
)

HEAD_NBYTES = 8  # two float32 before the codes
COLUMN_NBITS, ROW_NBITS = 3, 4
ROW_SUMS_NBYTES = 32  # four float64: the sum and the count of negative values, then of the others
AHEAD = 64  # parts that are fetched before they are needed
STEP = 22
ONE = 0x3F800000 >> STEP


@intrinsic
def _scan(typing: Any, values: Any, residual: Any, bits: Any, parts: Any, sums: Any, columns: Any, like: Any) -> Any:
    """Write the bits of v = values + residual; add negative v to the 32 lanes at ``sums``, other v to the 32 after.

    And abs(v)·2**-8 to the sums of ``columns``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, residual, bits, parts, sums, columns, _ = arguments
        kind = Kind(like)
        zero = ir.Constant(kind.wide, None)
        part_of_one = ir.Constant(kind.wide, [2.0**-8] * PART)
        lanes = [cgutils.alloca_once_value(builder, kind.load_wide(builder, sums, I64(k))) for k in range(2 * PARTS)]

        def work(part: Any, k: int) -> None:
            low, high = lanes[k], lanes[PARTS + k]
            v = builder.fadd(kind.load(builder, values, part), kind.load_wide(builder, residual, part))
            is_high = not_negative(builder, v)
            write(builder, builder.bitcast(is_high, I8), builder.add(bits, part))
            negative, other = builder.select(is_high, zero, v), builder.select(is_high, v, zero)
            builder.store(builder.fadd(builder.load(low), negative), low)
            builder.store(builder.fadd(builder.load(high), other), high)
            size = builder.fmul(builder.fsub(other, negative), part_of_one)
            total = builder.fadd(kind.load_wide(builder, columns, part), size)
            write(builder, total, element(builder, columns, part, kind.wide_nbytes))

        groups = builder.sdiv(parts, I64(PARTS))
        with cgutils.for_range(builder, groups) as loop:
            first = builder.mul(loop.index, I64(PARTS))
            ahead = builder.add(first, I64(AHEAD))
            prefetch(builder, element(builder, values, ahead, kind.stored_nbytes), PARTS * kind.stored_nbytes)
            prefetch(builder, element(builder, residual, ahead, kind.wide_nbytes), PARTS * kind.wide_nbytes)
            for k in range(PARTS):
                work(builder.add(first, I64(k)), k)
        done = builder.mul(groups, I64(PARTS))
        for k in range(PARTS - 1):
            with builder.if_then(builder.icmp_signed("<", builder.add(done, I64(k)), parts)):
                work(builder.add(done, I64(k)), k)
        for k, lane in enumerate(lanes):
            write(builder, builder.load(lane), element(builder, sums, I64(k), kind.wide_nbytes))
        return context.get_dummy_value()

    signature = types.void(
        *(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64),
        like,
    )
    return signature, generate


def _levels(builder: Any, kind: Kind, is_high: Any, low: Any, high: Any, numbers: Any, part: Any) -> Any:
    """(high if the bit is set, else low) times the columns' numbers, in float32, widened."""
    row = builder.select(is_high, high, low)
    halves = read(builder, ir.VectorType(I16, PART), element(builder, numbers, part, 2 * PART))
    words = builder.shl(builder.zext(halves, WORDS), ir.Constant(WORDS, [16] * PART))
    x = builder.fmul(row, builder.bitcast(words, row.type))
    return builder.fpext(x, kind.wide) if kind.wide.element == DOUBLE else x


def _for_parts(builder: Any, parts: Any, work: Callable[[Any], None]) -> None:
    """``work`` on each of so many parts, whole groups of them first."""
    groups = builder.sdiv(parts, I64(PARTS))
    with cgutils.for_range(builder, groups) as loop:
        first = builder.mul(loop.index, I64(PARTS))
        for k in range(PARTS):
            work(builder.add(first, I64(k)))
    done = builder.mul(groups, I64(PARTS))
    with cgutils.for_range(builder, builder.sub(parts, done)) as loop:
        work(builder.add(done, loop.index))


@intrinsic
def _leave(typing: Any, values: Any, residual: Any, parts: Any, low: Any, high: Any, numbers: Any, like: Any) -> Any:
    """residual = v - decoded, of v = values + residual."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, residual, parts, low, high, numbers, _ = arguments
        kind = Kind(like)
        low, high = splat(builder, low), splat(builder, high)

        def work(part: Any) -> None:
            v = builder.fadd(kind.load(builder, values, part), kind.load_wide(builder, residual, part))
            x = _levels(builder, kind, not_negative(builder, v), low, high, numbers, part)
            write(builder, builder.fsub(v, x), element(builder, residual, part, kind.wide_nbytes))

        _for_parts(builder, parts, work)
        return context.get_dummy_value()

    signature = types.void(
        *(types.int64, types.int64, types.int64, types.float32, types.float32, types.int64),
        like,
    )
    return signature, generate


@intrinsic
def _unpack(
    typing: Any, bits: Any, out: Any, parts: Any, low: Any, high: Any, numbers: Any, accumulate: Any, like: Any
) -> Any:
    """out = or += decoded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, out, parts, low, high, numbers, accumulate, _ = arguments
        kind = Kind(like)
        low, high = splat(builder, low), splat(builder, high)

        def loop_over_parts(adds: bool) -> None:
            def work(part: Any) -> None:
                is_high = builder.bitcast(read(builder, I8, builder.add(bits, part)), ir.VectorType(I1, PART))
                x = _levels(builder, kind, is_high, low, high, numbers, part)
                if adds:
                    x = builder.fadd(kind.load(builder, out, part), x)
                write(builder, kind.narrow(builder, x), element(builder, out, part, kind.stored_nbytes))

            _for_parts(builder, parts, work)

        with builder.if_else(builder.trunc(accumulate, I1)) as (then, otherwise):
            with then:
                loop_over_parts(adds=True)
            with otherwise:
                loop_over_parts(adds=False)
        return context.get_dummy_value()

    signature = types.void(
        *(types.int64, types.int64, types.int64, types.float32, types.float32, types.int64, types.boolean),
        like,
    )
    return signature, generate


@intrinsic
def wide_nbytes(typing: Any, pointer: Any) -> Any:
    """Bytes of one number of the type in which values behind the pointer are computed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return I64(Kind(pointer).wide_nbytes // PART)

    return types.int64(pointer), generate


@intrinsic
def _wide_total(typing: Any, address: Any, index: Any, like: Any) -> Any:
    """The sum of a column, of the type in which values behind the pointer ``like`` are computed."""
    wide = types.float64 if like.dtype == types.float64 else types.float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = Kind(like)
        sums, index, _ = arguments
        return read(builder, kind.wide.element, element(builder, sums, index, kind.wide_nbytes // PART))

    return wide(types.int64, types.int64, like), generate


@shared
def _code(ratio: Any, nbits: int) -> Any:
    """The code of a float32 from 0 to 1."""
    if not ratio > np.float32(0):
        return 0
    top = (1 << nbits) - 1
    bits = np.int64(np.float32(ratio).view(np.uint32))
    return min(max(((bits + (1 << (STEP - 1))) >> STEP) - ONE + top, 1), top)


@shared
def _number(code: int, nbits: int) -> Any:
    """What a code says."""
    if code == 0:
        return np.float32(0)
    return np.uint32((code - ((1 << nbits) - 1) + ONE) << STEP).view(np.float32)


@shared
def _row_group(columns: int) -> Any:
    group = 1
    while group * columns < 256:
        group *= 2
    return group


@shared
def _columns_nbytes(columns: int, group: int) -> Any:
    return (COLUMN_NBITS * ((columns + group - 1) // group) + 7) // 8


@shared
def _column_group(rows: int, columns: int) -> Any:
    row_group = _row_group(columns)
    rest = HEAD_NBYTES + (rows + row_group - 1) // row_group + rows * ((columns + 7) // 8)
    group = 1
    while group < columns and 128 * (rest + _columns_nbytes(columns, group)) > 17 * rows * columns:
        group *= 2
    return group


@shared
def _put_numbers(codes: int, columns: int, group: int, numbers: int) -> Any:
    """Write what the codes say for each of the columns; returns their sum."""
    total = 0.0
    for k in range(0, columns, group):
        at = k // group * COLUMN_NBITS
        code: Any = np.int64(get(codes + at // 8, np.uint8(0))) >> (at % 8)
        if at % 8 > 8 - COLUMN_NBITS:
            code |= np.int64(get(codes + at // 8 + 1, np.uint8(0))) << (8 - at % 8)
        number = _number(code & ((1 << COLUMN_NBITS) - 1), COLUMN_NBITS)
        for j in range(k, min(k + group, columns)):
            put(numbers + 2 * j, np.uint16(np.float32(number).view(np.uint32) >> 16))
            total += np.float64(number)
    return total


@shared
def _put_column_codes(sums: int, codes: int, columns: int, group: int, values: Any) -> None:
    """Write the codes of groups of columns, whose sums are overwritten by their means."""
    nbytes = wide_nbytes(values)
    largest, finite = _wide_total(sums, 0, values) * np.float32(0), True
    for k in range(0, columns, group):
        total = _wide_total(sums, k, values)
        for j in range(k + 1, min(k + group, columns)):
            total += _wide_total(sums, j, values)
        mean = total if group == 1 else total / np.float32(min(group, columns - k))
        finite = finite and mean - mean == 0
        if mean > largest or k == 0:
            largest = mean
        put(sums + k // group * nbytes, mean)
    clear(codes, _columns_nbytes(columns, group))
    if not (finite and largest > 0):
        return
    for k in range((columns + group - 1) // group):
        code = _code(np.float32(_wide_total(sums, k, values) / largest), COLUMN_NBITS)
        at = codes + k * COLUMN_NBITS // 8
        shifted = code << (k * COLUMN_NBITS % 8)
        put(at, np.uint8(get(at, np.uint8(0)) | (shifted & 255)))
        if shifted > 255:
            put(at + 1, np.uint8(shifted >> 8))


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
        code = _code(np.float32(x / largest), ROW_NBITS) if finite and largest > 0 else 0
        put(codes + k, np.uint8(get(codes + k, np.uint8(0)) | (code << (which * ROW_NBITS))))
    level = np.float64(largest) / (mean if mean > 0 else 1.0)
    return np.float32(min(level, LARGEST) if finite else level)


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; settings: columns, rows."""
    columns: Any = np.int64(settings[0])
    most: Any = np.int64(settings[1])
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
        row_groups, group = (rows + row_group - 1) // row_group, _column_group(rows, columns)
        codes = code + HEAD_NBYTES
        row_codes = codes + _columns_nbytes(columns, group)
        bits = row_codes + row_groups
        if bits + rows * row_nbytes > end:
            return -1
        clear(column_sums, padded * wide)
        clear(row_sums, row_groups * ROW_SUMS_NBYTES)
        for i in range(rows):
            x, r, b = here + i * columns * nbytes, left + i * columns * wide, bits + i * row_nbytes
            sums = _group()
            _scan(x, r, b, groups * PARTS if odd else parts, sums, column_sums, values)
            highs = _ones(b, groups)
            if odd:
                clear(last_left, GROUP * wide)
                copy(last_here, x + tail, rest * nbytes)
                copy(last_left, r + tail_wide, rest * wide)
                _scan(last_here, last_left, last_bits, PARTS, sums, column_sums + groups * GROUP * wide, values)
                put(last_bits, get(last_bits, np.uint32(0)) & np.uint32((1 << rest) - 1))
                copy(b + tail_bits, last_bits, (rest + 7) // 8)
            elif rest:
                put(last_bits, np.uint32(0))
                copy(last_bits, b + tail_bits, rest // 8)
            if rest:
                highs += _ones(last_bits, 1)
            low, high = _total(sums, values), _total(sums + GROUP * wide, values)
            begin = first + i * columns
            if low - low != 0:
                low = sum_in_doubles(values, residual, begin, begin + columns, GROUP, NEGATIVE)
            if high - high != 0:
                high = sum_in_doubles(values, residual, begin, begin + columns, GROUP, OTHERS)
            at = row_sums + i // row_group * ROW_SUMS_NBYTES
            put(at, get(at, 0.0) + low)
            put(at + 8, get(at + 8, 0.0) + (columns - highs))
            put(at + 16, get(at + 16, 0.0) + high)
            put(at + 24, get(at + 24, 0.0) + highs)
        _put_column_codes(column_sums, codes, columns, group, values)
        mean = _put_numbers(codes, columns, group, numbers) / columns
        clear(row_codes, row_groups)
        low_level = -_put_row_codes(row_sums, row_groups, 0, row_codes, mean)
        high_level = _put_row_codes(row_sums, row_groups, 1, row_codes, mean)
        put(code, low_level)
        put(code + 4, high_level)
        for i in range(rows):
            byte: Any = np.int64(get(row_codes + i // row_group, np.uint8(0)))
            low_row = low_level * _number(byte & ((1 << ROW_NBITS) - 1), ROW_NBITS)
            high_row = high_level * _number(byte >> ROW_NBITS, ROW_NBITS)
            _leave(here, left, parts, low_row, high_row, numbers, values)
            if odd:
                place, place_wide = here + parts * PART * nbytes, left + parts * PART * wide
                copy(last_here, place, odd * nbytes)
                copy(last_left, place_wide, odd * wide)
                _leave(last_here, last_left, 1, low_row, high_row, numbers + parts * PART * 2, values)
                copy(place_wide, last_left, odd * wide)
            here += columns * nbytes
            left += columns * wide
        code = bits + rows * row_nbytes
    return code - address(payload)


def decode(payload: Any, nbytes: int, out: Any, n: int, accumulate: int, settings: Any) -> Any:
    """See ``functions.py``; settings: columns, rows."""
    columns: Any = np.int64(settings[0])
    most: Any = np.int64(settings[1])
    size = itemsize(out)
    parts, odd, row_nbytes = columns // PART, columns % PART, (columns + 7) // 8
    tail = parts * PART * size
    memory = np.zeros((parts + 1) * PART, np.uint16)
    numbers = memory.ctypes.data
    here, code = address(out), address(payload)
    end = code + nbytes
    last_here = _group()
    row_group = _row_group(columns)
    for first in range(0, n, columns * most):
        rows = min(most, (n - first) // columns)
        row_groups, group = (rows + row_group - 1) // row_group, _column_group(rows, columns)
        codes = code + HEAD_NBYTES
        row_codes = codes + _columns_nbytes(columns, group)
        bits = row_codes + row_groups
        if bits + rows * row_nbytes > end:
            return -1
        used = (columns + group - 1) // group * COLUMN_NBITS % 8
        if used and get(row_codes - 1, np.uint8(0)) >> used:
            return -1
        _put_numbers(codes, columns, group, numbers)
        low_level, high_level = get(code, np.float32(0)), get(code + 4, np.float32(0))
        for i in range(rows):
            byte: Any = np.int64(get(row_codes + i // row_group, np.uint8(0)))
            low = low_level * _number(byte & ((1 << ROW_NBITS) - 1), ROW_NBITS)
            high = high_level * _number(byte >> ROW_NBITS, ROW_NBITS)
            _unpack(bits, here, parts, low, high, numbers, accumulate != 0, out)
            if odd:
                if get(bits + parts, np.uint8(0)) >> odd:
                    return -1
                copy(last_here, here + tail, odd * size)
                _unpack(bits + parts, last_here, 1, low, high, numbers + parts * PART * 2, accumulate != 0, out)
                copy(here + tail, last_here, odd * size)
            here += columns * size
            bits += row_nbytes
        code = bits
    return 0 if code == end and n % columns == 0 else -1
