"""Passes over a row for levels of rank one: vectors of 16 lanes, which Numba's own code would not come to.

A processor takes them as one register or as two. What is left at the end of a row, fewer than 32 values, goes by
vectors of 8. Arrays are addresses of any alignment; ``like`` is a pointer that tells the type of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from bitring.compression.kernels.onebit_numba import GROUP, PARTS
from bitring.compression.kernels.vectors_numba import (
    DOUBLE,
    I1,
    I16,
    I32,
    I64,
    LINE_NBYTES,
    PART,
    Kind,
    element,
    intrinsic,
    not_negative,
    prefetch,
    read,
    splat,
    write,
    write_past_cache,
)

LANES = 16
AHEAD = 32  # groups that are fetched before they are needed


class _Row:
    """What a pass over a row is made of: ``work`` on the parts of a group of 32, or on a part of 8."""

    def __init__(self, builder: Any, like: Any, lanes: int) -> None:
        self.builder, self.lanes = builder, lanes
        self.kind = Kind(like, lanes)
        self.zero = ir.Constant(self.kind.wide, None)

    def value(self, values: Any, residual: Any, part: Any) -> Any:
        """v = values + residual."""
        return self.builder.fadd(
            self.kind.load(self.builder, values, part), self.kind.load_wide(self.builder, residual, part)
        )

    def put_bits(self, is_high: Any, bits: Any, part: Any) -> None:
        word = self.builder.bitcast(is_high, ir.IntType(self.lanes))
        write(self.builder, word, element(self.builder, bits, part, self.lanes // 8))

    def get_bits(self, bits: Any, part: Any) -> Any:
        word = read(self.builder, ir.IntType(self.lanes), element(self.builder, bits, part, self.lanes // 8))
        return self.builder.bitcast(word, ir.VectorType(I1, self.lanes))

    def wide(self, array: Any, part: Any) -> Any:
        """The address of a part of wide numbers."""
        return element(self.builder, array, part, self.kind.wide_nbytes)

    def levels(self, is_high: Any, low: Any, high: Any, numbers: Any, part: Any) -> Any:
        """(high if the bit is set, else low) times the columns' numbers, in float32, widened."""
        builder, lanes = self.builder, self.lanes
        row = builder.select(is_high, splat(builder, high, lanes), splat(builder, low, lanes))
        halves = read(builder, ir.VectorType(I16, lanes), element(builder, numbers, part, 2 * lanes))
        words = ir.VectorType(I32, lanes)
        upper = builder.shl(builder.zext(halves, words), ir.Constant(words, [16] * lanes))
        x = builder.fmul(row, builder.bitcast(upper, row.type))
        return builder.fpext(x, self.kind.wide) if self.kind.wide.element == DOUBLE else x


def _for_parts(
    builder: Any, like: Any, parts: Any, work: Callable[[_Row, Any, int], None], between: Callable[[], None]
) -> None:
    """``work`` on each of so many parts of 8, whole groups of 32 first, by 16; ``between``: after these.

    It is given the number of the part, of those of its size, and the place of its first lane in a group.
    """
    groups = builder.sdiv(parts, I64(PARTS))
    row = _Row(builder, like, LANES)
    with cgutils.for_range(builder, groups) as loop:
        for k in range(GROUP // LANES):
            work(row, builder.add(builder.mul(loop.index, I64(GROUP // LANES)), I64(k)), k * LANES)
    between()
    done = builder.mul(groups, I64(PARTS))
    row = _Row(builder, like, PART)
    for k in range(PARTS - 1):
        with builder.if_then(builder.icmp_signed("<", builder.add(done, I64(k)), parts)):
            work(row, builder.add(done, I64(k)), k * PART)


def _nothing() -> None:
    pass


@intrinsic
def scan(typing: Any, values: Any, residual: Any, bits: Any, parts: Any, sums: Any, columns: Any, like: Any) -> Any:
    """``residual`` becomes v = values + residual, whose bits are written.

    Negative v are added to the 32 lanes at ``sums``, other v to the 32 after, and abs(v)·2**-8 to those of ``columns``.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, residual, bits, parts, sums, columns, _ = arguments
        whole = Kind(like, LANES)
        lanes = [
            cgutils.alloca_once_value(builder, whole.load_wide(builder, sums, I64(k)))
            for k in range(2 * GROUP // LANES)
        ]

        def keep() -> None:
            for k, lane in enumerate(lanes):
                write(builder, builder.load(lane), element(builder, sums, I64(k), whole.wide_nbytes))

        def add(row: _Row, x: Any, first: int) -> None:
            """To the lanes from ``first`` on: in registers, or where they were put when groups were done."""
            if row.lanes == LANES:
                lane = lanes[first // LANES]
                builder.store(builder.fadd(builder.load(lane), x), lane)
            else:
                at = row.wide(sums, I64(first // PART))
                write(builder, builder.fadd(read(builder, x.type, at), x), at)

        def work(row: _Row, part: Any, first: int) -> None:
            if row.lanes == LANES:
                ahead = builder.add(part, I64(AHEAD * GROUP // LANES))
                for array, nbytes in ((values, row.kind.stored_nbytes), (residual, row.kind.wide_nbytes)):
                    prefetch(builder, element(builder, array, ahead, nbytes), max(nbytes, LINE_NBYTES))
            v = row.value(values, residual, part)
            is_high = not_negative(builder, v)
            write(builder, v, row.wide(residual, part))
            row.put_bits(is_high, bits, part)
            add(row, builder.select(is_high, row.zero, v), first)
            add(row, builder.select(is_high, v, row.zero), first + GROUP)
            size = builder.fmul(_absolute(builder, v), ir.Constant(v.type, [2.0**-8] * row.lanes))
            total = builder.fadd(row.kind.load_wide(builder, columns, part), size)
            write(builder, total, row.wide(columns, part))

        _for_parts(builder, like, parts, work, keep)
        return context.get_dummy_value()

    signature = types.void(
        *(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64),
        like,
    )
    return signature, generate


def _absolute(builder: Any, v: Any) -> Any:
    width = 64 if v.type.element == DOUBLE else 32
    words = ir.VectorType(ir.IntType(width), v.type.count)
    magnitude = ir.Constant(words, [(1 << (width - 1)) - 1] * v.type.count)
    return builder.bitcast(builder.and_(builder.bitcast(v, words), magnitude), v.type)


@intrinsic
def leave(typing: Any, residual: Any, parts: Any, low: Any, high: Any, numbers: Any, like: Any) -> Any:
    """residual = v - decoded, of v, which ``scan`` has put there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        residual, parts, low, high, numbers, _ = arguments

        def work(row: _Row, part: Any, first: int) -> None:
            v = row.kind.load_wide(builder, residual, part)
            x = row.levels(not_negative(builder, v), low, high, numbers, part)
            write(builder, builder.fsub(v, x), row.wide(residual, part))

        _for_parts(builder, like, parts, work, _nothing)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.float32, types.int64, like), generate


REPLACE, ADD, PAST_CACHE = 0, 1, 2
"""Decoded values are put in place of what is there, or added to it, or put in place but not in the cache.

The last is for addresses that are multiples of ``STORED_NBYTES``, and saves reading what is there from memory.
"""

STORED_NBYTES = 16


@intrinsic
def unpack(
    typing: Any, bits: Any, out: Any, parts: Any, low: Any, high: Any, numbers: Any, what: Any, like: Any
) -> Any:
    """out = or += decoded, as ``what`` says."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, out, parts, low, high, numbers, what, _ = arguments

        def loop_over_parts(how: int) -> None:
            def work(row: _Row, part: Any, first: int) -> None:
                x = row.levels(row.get_bits(bits, part), low, high, numbers, part)
                if how == ADD:
                    x = builder.fadd(row.kind.load(builder, out, part), x)
                x, at = row.kind.narrow(builder, x), element(builder, out, part, row.kind.stored_nbytes)
                if how == PAST_CACHE:
                    write_past_cache(builder, x, at, row.kind.stored_nbytes // STORED_NBYTES)
                else:
                    write(builder, x, at)

            _for_parts(builder, like, parts, work, _nothing)

        for how in (REPLACE, ADD, PAST_CACHE):
            with builder.if_then(builder.icmp_signed("==", what, I64(how))):
                loop_over_parts(how)
        return context.get_dummy_value()

    signature = types.void(
        *(types.int64, types.int64, types.int64, types.float32, types.float32, types.int64, types.int64),
        like,
    )
    return signature, generate
