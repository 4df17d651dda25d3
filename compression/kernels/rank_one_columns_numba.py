"""Numbers of columns for levels of rank one: eight of them are three bytes of a payload, and a vector of 8 lanes.

Arrays are addresses of any alignment; ``like`` is a pointer that tells the type of the values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from bitring.compression.kernels.jit import shared
from bitring.compression.kernels.vectors_numba import (
    DOUBLE,
    FLOATS,
    I16,
    I32,
    I64,
    PART,
    WORDS,
    Kind,
    clear,
    element,
    get,
    intrinsic,
    put,
    read,
    splat,
    write,
)

COLUMN_NBITS = 3
EIGHT_NBYTES = COLUMN_NBITS * PART // 8
TOP = (1 << COLUMN_NBITS) - 1
STEP = 22
ONE = 0x3F800000 >> STEP
NUMBER_NBYTES = 2  # the upper half of a float32, whose lower half is zero


@shared
def columns_nbytes(columns: int, group: int) -> Any:
    """Bytes of the codes of so many columns, of which ``group`` neighbours share one."""
    return (COLUMN_NBITS * ((columns + group - 1) // group) + 7) // 8


def _words(x: int) -> Any:
    return ir.Constant(WORDS, [x] * PART)


def _places() -> Any:
    """Where each code begins in the word of eight."""
    return ir.Constant(WORDS, [COLUMN_NBITS * k for k in range(PART)])


def _folded(builder: Any, vector: Any, combine: Any) -> Any:
    """All lanes combined; in an order that does not matter."""
    half = vector.type.count // 2
    while half:
        lower, upper = (
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, half), list(range(k, k + half))))
            for k in (0, half)
        )
        vector = combine(lower, upper)
        half //= 2
    return builder.extract_element(vector, I32(0))


@intrinsic
def _largest(typing: Any, sums: Any, parts: Any, like: Any) -> Any:
    """The largest of so many parts of numbers that are at least 0; NaN where one of them is not finite."""
    wide = types.float64 if like.dtype == types.float64 else types.float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        sums, parts, _ = arguments
        kind = Kind(like)
        zero = ir.Constant(kind.wide, None)
        largest = cgutils.alloca_once_value(builder, zero)
        zeros = cgutils.alloca_once_value(builder, zero)  # or NaN
        with cgutils.for_range(builder, parts) as loop:
            x, found = kind.load_wide(builder, sums, loop.index), builder.load(largest)
            builder.store(builder.select(builder.fcmp_ordered(">", x, found), x, found), largest)
            builder.store(builder.fadd(builder.load(zeros), builder.fsub(x, x)), zeros)

        def larger(x: Any, y: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", x, y), x, y)

        nothing = _folded(builder, builder.load(zeros), builder.fadd)
        return builder.fadd(_folded(builder, builder.load(largest), larger), nothing)

    return wide(types.int64, types.int64, like), generate


@intrinsic
def _codes(typing: Any, means: Any, largest: Any, like: Any) -> Any:
    """The codes of eight numbers over the largest of all: 24 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        means, largest, _ = arguments
        kind = Kind(like)
        ratio = builder.fdiv(kind.load_wide(builder, means, I64(0)), splat(builder, largest))
        if kind.wide.element == DOUBLE:
            ratio = builder.fptrunc(ratio, FLOATS)
        rounded = builder.lshr(builder.add(builder.bitcast(ratio, WORDS), _words(1 << (STEP - 1))), _words(STEP))
        code = builder.sub(rounded, _words(ONE - TOP))
        code = builder.select(builder.icmp_signed("<", code, _words(1)), _words(1), code)
        code = builder.select(builder.icmp_signed(">", code, _words(TOP)), _words(TOP), code)
        least = ir.Constant(FLOATS, [2.0 ** -(1 << COLUMN_NBITS - 1)] * PART)
        code = builder.select(builder.fcmp_ordered(">=", ratio, least), code, _words(0))
        return builder.zext(_folded(builder, builder.shl(code, _places()), builder.or_), I64)

    return types.int64(types.int64, like.dtype if like.dtype == types.float64 else types.float32, like), generate


@intrinsic
def _put_eight(typing: Any, word: Any, numbers: Any) -> Any:
    """Put what the eight codes of a word say at ``numbers``; returns their sum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, numbers = arguments
        code = builder.lshr(splat(builder, builder.trunc(word, I32)), _places())
        code = builder.and_(code, _words(TOP))
        bits = builder.shl(builder.add(code, _words(ONE - TOP)), _words(STEP))
        bits = builder.select(builder.icmp_unsigned("==", code, _words(0)), _words(0), bits)
        halves = builder.trunc(builder.lshr(bits, _words(16)), ir.VectorType(I16, PART))
        write(builder, halves, numbers)
        # Multiples of 1/16, none above 1: their sum is exact in any order.
        return builder.fpext(_folded(builder, builder.bitcast(bits, FLOATS), builder.fadd), DOUBLE)

    return types.float64(types.int64, types.int64), generate


@intrinsic
def wide_nbytes(typing: Any, pointer: Any) -> Any:
    """Bytes of one number of the type in which values behind the pointer are computed."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return I64(Kind(pointer).wide_nbytes // PART)

    return types.int64(pointer), generate


@intrinsic
def wide_total(typing: Any, address: Any, index: Any, like: Any) -> Any:
    """The sum of a column, of the type in which values behind the pointer ``like`` are computed."""
    wide = types.float64 if like.dtype == types.float64 else types.float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = Kind(like)
        sums, index, _ = arguments
        return read(builder, kind.wide.element, element(builder, sums, index, kind.wide_nbytes // PART))

    return wide(types.int64, types.int64, like), generate


@shared
def put_numbers(codes: int, columns: int, group: int, numbers: int) -> Any:
    """Write what the codes say for each of the columns, and up to the next multiple of 8; returns the columns' sum."""
    groups = (columns + group - 1) // group
    total = 0.0
    for k in range(groups // PART):
        word: Any = np.int64(get(codes + k * EIGHT_NBYTES, np.uint32(0)))
        total += _put_eight(word, numbers + k * PART * NUMBER_NBYTES)
    if groups % PART:
        at = codes + groups // PART * EIGHT_NBYTES
        word = np.int64(0)
        for k in range((groups % PART * COLUMN_NBITS + 7) // 8):
            word |= np.int64(get(at + k, np.uint8(0))) << (8 * k)
        total += _put_eight(word, numbers + groups // PART * PART * NUMBER_NBYTES)
    if group == 1:
        return total
    last = np.uint32(np.int64(get(numbers + (groups - 1) * NUMBER_NBYTES, np.uint16(0))) << 16).view(np.float32)
    total = total * group - np.float64(last) * (groups * group - columns)
    for k in range(groups - 1, -1, -1):
        number = get(numbers + k * NUMBER_NBYTES, np.uint16(0))
        for j in range(k * group, min(k * group + group, columns)):
            put(numbers + j * NUMBER_NBYTES, number)
    return total


@shared
def put_column_codes(sums: int, codes: int, columns: int, group: int, values: Any) -> None:
    """Write the codes of groups of columns, whose sums are overwritten by their means; zeros follow the sums."""
    nbytes = wide_nbytes(values)
    groups = (columns + group - 1) // group
    if group > 1:
        for k in range(groups):
            total = wide_total(sums, k * group, values)
            end = min(k * group + group, columns)
            for j in range(k * group + 1, end):
                total += wide_total(sums, j, values)
            put(sums + k * nbytes, total / np.float32(end - k * group))
        clear(sums + groups * nbytes, (PART - groups % PART) * nbytes)
    largest = _largest(sums, (groups + PART - 1) // PART, values)
    if not largest > 0:
        clear(codes, columns_nbytes(columns, group))
        return
    for k in range(groups // PART):
        word = _codes(sums + k * PART * nbytes, largest, values)
        put(codes + k * EIGHT_NBYTES, np.uint16(word))
        put(codes + k * EIGHT_NBYTES + 2, np.uint8(word >> 16))
    if groups % PART:
        word = _codes(sums + groups // PART * PART * nbytes, largest, values)
        at = codes + groups // PART * EIGHT_NBYTES
        for k in range((groups % PART * COLUMN_NBITS + 7) // 8):
            put(at + k, np.uint8(word >> (8 * k)))
