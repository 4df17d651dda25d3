"""1-bit encode and decode on host memory, compiled by Numba. What they compute: ``onebit.py``, bit for bit.

Values are taken in groups of 32, written as vectors of 8 lanes: a comparison of 8 lanes is a byte of payload bits.
Inside, arrays are addresses of any alignment; ``like`` is a pointer that tells a kernel the type of its values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from bitring.compression.kernels.doubles_numba import NEGATIVE, OTHERS, sum_in_doubles
from bitring.compression.kernels.vectors_numba import (
    DOUBLE,
    FLOAT,
    I1,
    I8,
    I32,
    I64,
    LARGEST,
    PART,
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
    unused_are_zero,
    write,
)

GROUP = 32
PARTS = GROUP // PART
LEVELS_NBYTES = 8  # two float32 before a block's bits
WORD_NBYTES = GROUP // 8


@intrinsic
def _scan(typing: Any, values: Any, residual: Any, bits: Any, groups: Any, sums: Any, like: Any) -> Any:
    """Write the bits of v = values + residual; add negative v to the 32 lanes at ``sums``, other v to the 32 after."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, residual, bits, groups, sums, _ = arguments
        kind = Kind(like)
        zero = ir.Constant(kind.wide, None)
        lanes = [cgutils.alloca_once_value(builder, kind.load_wide(builder, sums, I64(k))) for k in range(2 * PARTS)]
        with cgutils.for_range(builder, groups) as loop:
            # Encoding is bound by memory here and by arithmetic in _leave: both fetch for the next block.
            next_block = builder.add(loop.index, groups)
            prefetch(
                builder, element(builder, values, next_block, PARTS * kind.stored_nbytes), PARTS * kind.stored_nbytes
            )
            first = builder.mul(loop.index, I64(PARTS))
            for k in range(PARTS):
                low, high, part = lanes[k], lanes[PARTS + k], builder.add(first, I64(k))
                v = builder.fadd(kind.load(builder, values, part), kind.load_wide(builder, residual, part))
                is_high = not_negative(builder, v)
                write(builder, builder.bitcast(is_high, I8), builder.add(bits, part))
                builder.store(builder.fadd(builder.load(low), builder.select(is_high, zero, v)), low)
                builder.store(builder.fadd(builder.load(high), builder.select(is_high, v, zero)), high)
        for k, lane in enumerate(lanes):
            write(builder, builder.load(lane), element(builder, sums, I64(k), kind.wide_nbytes))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64, like), generate


@intrinsic
def _total(typing: Any, sums: Any, like: Any) -> Any:
    """The sum of the 32 lanes at ``sums`` in float64: lane k takes lane k + 16, then k + 8, ... then k + 1."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = Kind(like).wide.element
        x = read(builder, ir.VectorType(wide, GROUP), arguments[0])
        if wide == FLOAT:
            x = builder.fpext(x, ir.VectorType(DOUBLE, GROUP))
        half = GROUP // 2
        while half:
            lower, upper = (
                builder.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, half), list(range(k, k + half))))
                for k in (0, half)
            )
            x = builder.fadd(lower, upper)
            half //= 2
        return builder.extract_element(x, I32(0))

    return types.float64(types.int64, like), generate


@intrinsic
def _ones(typing: Any, bits: Any, groups: Any) -> Any:
    """How many of the bits are one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, groups = arguments
        count = cgutils.alloca_once_value(builder, I64(0))
        with cgutils.for_range(builder, groups) as loop:
            word = read(builder, I32, element(builder, bits, loop.index, WORD_NBYTES))
            builder.store(builder.add(builder.load(count), builder.zext(builder.ctpop(word), I64)), count)
        return builder.load(count)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _leave(typing: Any, values: Any, residual: Any, groups: Any, low: Any, high: Any, like: Any) -> Any:
    """residual = v - (high if v >= 0 else low), of v = values + residual."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, residual, groups, low, high, _ = arguments
        kind = Kind(like)
        low, high = kind.level(builder, low), kind.level(builder, high)
        with cgutils.for_range(builder, groups) as loop:
            next_block = builder.add(loop.index, groups)
            prefetch(
                builder, element(builder, residual, next_block, PARTS * kind.wide_nbytes), PARTS * kind.wide_nbytes
            )
            first = builder.mul(loop.index, I64(PARTS))
            for k in range(PARTS):
                part = builder.add(first, I64(k))
                v = builder.fadd(kind.load(builder, values, part), kind.load_wide(builder, residual, part))
                left = builder.fsub(v, builder.select(not_negative(builder, v), high, low))
                write(builder, left, element(builder, residual, part, kind.wide_nbytes))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.float32, like), generate


@intrinsic
def _unpack(typing: Any, bits: Any, out: Any, groups: Any, low: Any, high: Any, accumulate: Any, like: Any) -> Any:
    """out = or += (high if bit else low)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, out, groups, low, high, accumulate, _ = arguments
        kind = Kind(like)
        low, high = kind.level(builder, low), kind.level(builder, high)

        def loop_over_parts(high: Any, low: Any, adds: bool) -> None:
            with cgutils.for_range(builder, builder.mul(groups, I64(PARTS))) as loop:
                byte = read(builder, I8, builder.add(bits, loop.index))
                x = builder.select(builder.bitcast(byte, ir.VectorType(I1, PART)), high, low)
                if adds:
                    x = kind.narrow(builder, builder.fadd(kind.load(builder, out, loop.index), x))
                write(builder, x, element(builder, out, loop.index, kind.stored_nbytes))

        with builder.if_else(builder.trunc(accumulate, I1)) as (then, otherwise):
            with then:
                loop_over_parts(high, low, adds=True)
            with otherwise:
                loop_over_parts(kind.narrow(builder, high), kind.narrow(builder, low), adds=False)
        return context.get_dummy_value()

    signature = types.void(types.int64, types.int64, types.int64, types.float32, types.float32, types.boolean, like)
    return signature, generate


@intrinsic
def _group(typing: Any) -> Any:
    """Address of stack memory, zeroed, for the values of two groups. Each call that the code holds has its own."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(ir.VectorType(DOUBLE, GROUP), 2))
        cgutils.memset(builder, memory, I64(2 * GROUP * 8), 0)
        return builder.ptrtoint(memory, I64)

    return types.int64(), generate


def encode(values: Any, residual: Any, n: int, payload: Any, capacity: int, seed: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block."""
    block: Any = np.int64(settings[0])
    nbytes, wide_nbytes = itemsize(values), itemsize(residual)
    here, left, code = address(values), address(residual), address(payload)
    end = code + capacity
    # The last values of an array may fill no group. They are copied to one; the zeros behind them add nothing to sums.
    last_here, last_left, last_bits = _group(), _group(), _group()
    for first in range(0, n, block):
        count = min(block, n - first)
        groups, rest = count // GROUP, count % GROUP
        bits = code + LEVELS_NBYTES
        if bits + (count + 7) // 8 > end:
            return -1
        sums = _group()
        _scan(here, left, bits, groups, sums, values)
        highs = _ones(bits, groups)
        at, at_left, at_bits = groups * GROUP * nbytes, groups * GROUP * wide_nbytes, groups * WORD_NBYTES
        if rest:
            clear(last_left, GROUP * wide_nbytes)  # of what the block before left there
            copy(last_here, here + at, rest * nbytes)
            copy(last_left, left + at_left, rest * wide_nbytes)
            _scan(last_here, last_left, last_bits, 1, sums, values)
            put(last_bits, get(last_bits, np.uint32(0)) & np.uint32((1 << rest) - 1))
            highs += _ones(last_bits, 1)
            copy(bits + at_bits, last_bits, (rest + 7) // 8)

        low = np.float32(_total(sums, values) / (count - highs)) if highs < count else np.float32(0)
        high = np.float32(_total(sums + GROUP * wide_nbytes, values) / highs) if highs else np.float32(0)
        if not abs(low) <= LARGEST:
            low = np.float32(sum_in_doubles(values, residual, first, first + count, GROUP, NEGATIVE) / (count - highs))
        if not abs(high) <= LARGEST:
            high = np.float32(sum_in_doubles(values, residual, first, first + count, GROUP, OTHERS) / highs)
        put(code, low)
        put(code + 4, high)
        _leave(here, left, groups, low, high, values)
        if rest:
            _leave(last_here, last_left, 1, low, high, values)
            copy(left + at_left, last_left, rest * wide_nbytes)
        here += count * nbytes
        left += count * wide_nbytes
        code = bits + (count + 7) // 8
    return code - address(payload)


def decode(payload: Any, nbytes: int, out: Any, n: int, accumulate: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block."""
    block: Any = np.int64(settings[0])
    here, code = address(out), address(payload)
    end = code + nbytes
    last_here, last_bits = _group(), _group()
    for first in range(0, n, block):
        count = min(block, n - first)
        groups, rest = count // GROUP, count % GROUP
        bits = code + LEVELS_NBYTES
        if bits + (count + 7) // 8 > end:
            return -1
        low, high = get(code, np.float32(0)), get(code + 4, np.float32(0))
        _unpack(bits, here, groups, low, high, accumulate != 0, out)
        if rest:
            at = here + groups * GROUP * itemsize(out)
            copy(last_here, at, rest * itemsize(out))
            copy(last_bits, bits + groups * WORD_NBYTES, (rest + 7) // 8)
            _unpack(last_bits, last_here, 1, low, high, accumulate != 0, out)
            copy(at, last_here, rest * itemsize(out))
        here += count * itemsize(out)
        code = bits + (count + 7) // 8
    return 0 if code == end and unused_are_zero(payload, nbytes, n % block) else -1
