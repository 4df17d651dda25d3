"""Passes over a row for levels of rank one: vectors of 8 lanes, which Numba's own code would not come to.

Arrays are addresses of any alignment; ``like`` is a pointer that tells the type of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from bitring.compression.kernels.onebit_numba import PARTS
from bitring.compression.kernels.vectors_numba import (
    DOUBLE,
    I1,
    I8,
    I16,
    I64,
    PART,
    WORDS,
    Kind,
    element,
    intrinsic,
    not_negative,
    prefetch,
    read,
    splat,
    write,
)

AHEAD = 64  # parts that are fetched before they are needed


@intrinsic
def scan(typing: Any, values: Any, residual: Any, bits: Any, parts: Any, sums: Any, columns: Any, like: Any) -> Any:
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
def leave(typing: Any, values: Any, residual: Any, parts: Any, low: Any, high: Any, numbers: Any, like: Any) -> Any:
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
def unpack(
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
def wide_total(typing: Any, address: Any, index: Any, like: Any) -> Any:
    """The sum of a column, of the type in which values behind the pointer ``like`` are computed."""
    wide = types.float64 if like.dtype == types.float64 else types.float32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = Kind(like)
        sums, index, _ = arguments
        return read(builder, kind.wide.element, element(builder, sums, index, kind.wide_nbytes // PART))

    return wide(types.int64, types.int64, like), generate
