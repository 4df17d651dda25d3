"""1-bit encode and decode on host memory, compiled by Numba. What they compute: ``onebit_reference.py``, bit for bit.

Values are taken in groups of 32, written as LLVM vectors of 8 lanes: a comparison of 8 lanes is a byte of payload bits,
and lane k of a sum is the same on every machine, whatever the width of its registers. A compiler may not reorder the
sums of a plain loop, so that one is slow; with ``fastmath`` it is fast, and rounds differently on each machine.

Inside, arrays are addresses of any alignment; ``like`` is an array that tells a kernel the type of its values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from bitring.compression.encoder import Array
from bitring.compression.jit import jit

GROUP = 32
PART = 8  # lanes of a vector
PARTS = GROUP // PART
LEVELS_NBYTES = 8  # two float32 before a block's bits
WORD_NBYTES = GROUP // 8
LINE_NBYTES = 64  # of a cache; only speed depends on it

FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
I1, I8, I16, I32, I64 = (ir.IntType(width) for width in (1, 8, 16, 32, 64))
WORDS, FLOATS = ir.VectorType(I32, PART), ir.VectorType(FLOAT, PART)
BYTES = I8.as_pointer()

intrinsic: Any = numba_intrinsic  # whose functions lack, when called, the first parameter of their definition


class _Kind:
    """How 8 values are loaded, computed with (in float32, or float64 for float64) and stored."""

    def __init__(self, like: Any) -> None:
        self.dtype = like.dtype
        stored = {types.float32: FLOAT, types.float64: DOUBLE}.get(like.dtype, I16)
        self.stored = ir.VectorType(stored, PART)
        self.stored_nbytes = like.dtype.bitwidth // 8 * PART
        self.wide = ir.VectorType(DOUBLE if stored == DOUBLE else FLOAT, PART)
        self.wide_nbytes = max(self.stored_nbytes, 4 * PART)

    def load(self, builder: Any, array: Any, part: Any) -> Any:
        """Part number ``part`` of the stored values at ``array``, widened exactly."""
        x = _load(builder, self.stored, _at(builder, array, part, self.stored_nbytes))
        if self.dtype == types.int16:
            return _float16_to_float32(builder, x)
        return _bfloat16_to_float32(builder, x) if self.dtype == types.uint16 else x

    def load_wide(self, builder: Any, array: Any, part: Any) -> Any:
        """Part number ``part`` of the wide values at ``array``."""
        return _load(builder, self.wide, _at(builder, array, part, self.wide_nbytes))

    def narrow(self, builder: Any, x: Any) -> Any:
        """``wide`` to ``stored``, rounded to nearest, ties to even."""
        if self.dtype == types.int16:
            return _float32_to_float16(builder, x)
        return _float32_to_bfloat16(builder, x) if self.dtype == types.uint16 else x

    def level(self, builder: Any, level: Any) -> Any:
        """The float32 ``level`` in every lane."""
        return _splat(builder, builder.fpext(level, DOUBLE) if self.wide.element == DOUBLE else level)


def _bfloat16_to_float32(b: Any, x: Any) -> Any:
    return b.bitcast(b.shl(b.zext(x, WORDS), _words(16)), FLOATS)


def _float32_to_bfloat16(b: Any, x: Any) -> Any:
    bits = b.bitcast(x, WORDS)
    odd = b.and_(b.lshr(bits, _words(16)), _words(1))
    rounded = b.add(bits, b.add(odd, _words(0x7FFF)))
    quiet = b.or_(bits, _words(0x400000))  # rounding could make a NaN an infinity
    return b.trunc(
        b.lshr(b.select(b.fcmp_unordered("uno", x, x), quiet, rounded), _words(16)), ir.VectorType(I16, PART)
    )


# LLVM's own float16 conversions call a library, absent here, where the processor has none. These are integer
# arithmetic; below float16's smallest normal number, 2^-14, a float addition does the shift.


def _float16_to_float32(b: Any, x: Any) -> Any:
    bits = b.zext(x, WORDS)
    magnitude = b.shl(b.and_(bits, _words(0x7FFF)), _words(13))
    exponent = b.and_(magnitude, _words(31 << 23))
    normal = b.add(magnitude, _words((127 - 15) << 23))
    special = b.add(normal, _words((128 - 16) << 23))  # infinity, NaN
    tiny = b.fsub(b.bitcast(b.add(normal, _words(1 << 23)), FLOATS), b.bitcast(_words((127 - 14) << 23), FLOATS))
    result = b.select(b.icmp_unsigned("==", exponent, _words(31 << 23)), special, normal)
    result = b.select(b.icmp_unsigned("==", exponent, _words(0)), b.bitcast(tiny, WORDS), result)
    return b.bitcast(b.or_(result, b.shl(b.and_(bits, _words(0x8000)), _words(16))), FLOATS)


def _float32_to_float16(b: Any, x: Any) -> Any:
    bits = b.bitcast(x, WORDS)
    magnitude = b.and_(bits, _words(0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, _words(13)), _words(1))
    normal = b.lshr(b.sub(b.add(b.add(magnitude, odd), _words(0xFFF)), _words((127 - 15) << 23)), _words(13))
    half = _words((127 - 1) << 23)  # 0.5, whose last bit is float16's smallest number
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, FLOATS), b.bitcast(half, FLOATS)), WORDS), half)
    special = b.select(b.icmp_unsigned(">", magnitude, _words(255 << 23)), _words(0x7E00), _words(0x7C00))
    result = b.select(b.icmp_unsigned("<", magnitude, _words((127 - 14) << 23)), tiny, normal)
    result = b.select(b.icmp_unsigned(">=", magnitude, _words((127 + 16) << 23)), special, result)
    sign = b.and_(b.lshr(bits, _words(16)), _words(0x8000))
    return b.trunc(b.or_(result, sign), ir.VectorType(I16, PART))


def _words(x: int) -> Any:
    return ir.Constant(WORDS, [x] * PART)


def _splat(builder: Any, x: Any) -> Any:
    vector = builder.insert_element(ir.Constant(ir.VectorType(x.type, PART), ir.Undefined), x, I32(0))
    return builder.shuffle_vector(vector, vector, _words(0))


def _at(builder: Any, address: Any, index: Any, nbytes: int) -> Any:
    return builder.add(address, builder.mul(index, I64(nbytes)))


def _load(builder: Any, kind: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _store(builder: Any, x: Any, address: Any) -> None:
    builder.store(x, builder.inttoptr(address, x.type.as_pointer()), align=1)


def _not_negative(builder: Any, v: Any) -> Any:
    """v >= 0 lane by lane: true for -0.0, false for NaN."""
    return builder.fcmp_ordered(">=", v, ir.Constant(v.type, None))


def _prefetch(builder: Any, address: Any, nbytes: int) -> None:
    """Begin loading ``nbytes`` into the cache; an address beyond an array does no harm."""
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch", [BYTES], ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])
    )
    for offset in range(0, nbytes, LINE_NBYTES):
        line = builder.inttoptr(builder.add(address, I64(offset)), BYTES)
        builder.call(prefetch, [line, I32(0), I32(3), I32(1)])  # to read, to the nearest cache, data


@intrinsic
def _scan(typing: Any, values: Any, residual: Any, bits: Any, groups: Any, sums: Any, like: Any) -> Any:
    """Write the bits of v = values + residual; add negative v to the 32 lanes at ``sums``, other v to the 32 after."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, residual, bits, groups, sums, _ = arguments
        kind = _Kind(like)
        zero = ir.Constant(kind.wide, None)
        lanes = [cgutils.alloca_once_value(builder, kind.load_wide(builder, sums, I64(k))) for k in range(2 * PARTS)]
        with cgutils.for_range(builder, groups) as loop:
            # Encoding is bound by memory here and by arithmetic in _leave: both fetch for the next block.
            next_block = builder.add(loop.index, groups)
            _prefetch(builder, _at(builder, values, next_block, PARTS * kind.stored_nbytes), PARTS * kind.stored_nbytes)
            first = builder.mul(loop.index, I64(PARTS))
            for k in range(PARTS):
                low, high, part = lanes[k], lanes[PARTS + k], builder.add(first, I64(k))
                v = builder.fadd(kind.load(builder, values, part), kind.load_wide(builder, residual, part))
                is_high = _not_negative(builder, v)
                _store(builder, builder.bitcast(is_high, I8), builder.add(bits, part))
                builder.store(builder.fadd(builder.load(low), builder.select(is_high, zero, v)), low)
                builder.store(builder.fadd(builder.load(high), builder.select(is_high, v, zero)), high)
        for k, lane in enumerate(lanes):
            _store(builder, builder.load(lane), _at(builder, sums, I64(k), kind.wide_nbytes))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64, like), generate


@intrinsic
def _total(typing: Any, sums: Any, like: Any) -> Any:
    """The sum of the 32 lanes at ``sums`` in float64: lane k takes lane k + 16, then k + 8, ... then k + 1."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = _Kind(like).wide.element
        x = _load(builder, ir.VectorType(wide, GROUP), arguments[0])
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
            word = _load(builder, I32, _at(builder, bits, loop.index, WORD_NBYTES))
            builder.store(builder.add(builder.load(count), builder.zext(builder.ctpop(word), I64)), count)
        return builder.load(count)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _leave(typing: Any, values: Any, residual: Any, groups: Any, low: Any, high: Any, like: Any) -> Any:
    """residual = v - (high if v >= 0 else low), of v = values + residual."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, residual, groups, low, high, _ = arguments
        kind = _Kind(like)
        low, high = kind.level(builder, low), kind.level(builder, high)
        with cgutils.for_range(builder, groups) as loop:
            next_block = builder.add(loop.index, groups)
            _prefetch(builder, _at(builder, residual, next_block, PARTS * kind.wide_nbytes), PARTS * kind.wide_nbytes)
            first = builder.mul(loop.index, I64(PARTS))
            for k in range(PARTS):
                part = builder.add(first, I64(k))
                v = builder.fadd(kind.load(builder, values, part), kind.load_wide(builder, residual, part))
                left = builder.fsub(v, builder.select(_not_negative(builder, v), high, low))
                _store(builder, left, _at(builder, residual, part, kind.wide_nbytes))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.float32, like), generate


@intrinsic
def _unpack(typing: Any, bits: Any, out: Any, groups: Any, low: Any, high: Any, accumulate: Any, like: Any) -> Any:
    """out = or += (high if bit else low)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, out, groups, low, high, accumulate, _ = arguments
        kind = _Kind(like)
        low, high = kind.level(builder, low), kind.level(builder, high)

        def loop_over_parts(high: Any, low: Any, adds: bool) -> None:
            with cgutils.for_range(builder, builder.mul(groups, I64(PARTS))) as loop:
                byte = _load(builder, I8, builder.add(bits, loop.index))
                x = builder.select(builder.bitcast(byte, ir.VectorType(I1, PART)), high, low)
                if adds:
                    x = kind.narrow(builder, builder.fadd(kind.load(builder, out, loop.index), x))
                _store(builder, x, _at(builder, out, loop.index, kind.stored_nbytes))

        with builder.if_else(builder.trunc(accumulate, I1)) as (then, otherwise):
            with then:
                loop_over_parts(high, low, adds=True)
            with otherwise:
                loop_over_parts(kind.narrow(builder, high), kind.narrow(builder, low), adds=False)
        return context.get_dummy_value()

    signature = types.void(types.int64, types.int64, types.int64, types.float32, types.float32, types.boolean, like)
    return signature, generate


@intrinsic
def _address(typing: Any, array: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(context.make_array(array)(context, builder, arguments[0]).data, I64)

    return types.int64(array), generate


@intrinsic
def _group(typing: Any) -> Any:
    """Address of stack memory, zeroed, for the values of two groups. Each call that the code holds has its own."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(ir.VectorType(DOUBLE, GROUP), 2))
        cgutils.memset(builder, memory, I64(2 * GROUP * 8), 0)
        return builder.ptrtoint(memory, I64)

    return types.int64(), generate


@intrinsic
def _copy(typing: Any, target: Any, source: Any, nbytes: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(address, BYTES) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _get(typing: Any, address: Any, like: Any) -> Any:
    """The number of ``like``'s type at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, context.get_value_type(like), arguments[0])

    return like(types.int64, like), generate


@intrinsic
def _put(typing: Any, address: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _store(builder, arguments[1], arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64, x), generate


@jit
def _encode(values: Any, residual: Any, payload: Any, block: int) -> None:
    """``encode`` of a ``_numba_view``."""
    n, nbytes, wide_nbytes = values.size, values.itemsize, residual.itemsize
    here, left, code = _address(values), _address(residual), _address(payload)
    # The last values of an array may fill no group. They are copied to one; the zeros behind them add nothing to sums.
    last_here, last_left, last_bits = _group(), _group(), _group()
    for first in range(0, n, block):
        count = min(block, n - first)
        groups, rest = count // GROUP, count % GROUP
        bits = code + LEVELS_NBYTES
        sums = _group()
        _scan(here, left, bits, groups, sums, values)
        highs = _ones(bits, groups)
        at, at_left, at_bits = groups * GROUP * nbytes, groups * GROUP * wide_nbytes, groups * WORD_NBYTES
        if rest:
            _copy(last_here, here + at, rest * nbytes)
            _copy(last_left, left + at_left, rest * wide_nbytes)
            _scan(last_here, last_left, last_bits, 1, sums, values)
            _put(last_bits, _get(last_bits, np.uint32(0)) & np.uint32((1 << rest) - 1))
            highs += _ones(last_bits, 1)
            _copy(bits + at_bits, last_bits, (rest + 7) // 8)

        low = np.float32(_total(sums, values) / (count - highs)) if highs < count else np.float32(0)
        high = np.float32(_total(sums + GROUP * wide_nbytes, values) / highs) if highs else np.float32(0)
        _put(code, low)
        _put(code + 4, high)
        _leave(here, left, groups, low, high, values)
        if rest:
            _leave(last_here, last_left, 1, low, high, values)
            _copy(left + at_left, last_left, rest * wide_nbytes)
        here += count * nbytes
        left += count * wide_nbytes
        code = bits + block // 8


@jit
def _decode(payload: Any, out: Any, block: int, accumulate: bool) -> None:
    """``decode`` to a ``_numba_view``."""
    n, nbytes = out.size, out.itemsize
    here, code = _address(out), _address(payload)
    last_here, last_bits = _group(), _group()
    for first in range(0, n, block):
        count = min(block, n - first)
        groups, rest = count // GROUP, count % GROUP
        bits = code + LEVELS_NBYTES
        low, high = _get(code, np.float32(0)), _get(code + 4, np.float32(0))
        _unpack(bits, here, groups, low, high, accumulate, out)
        if rest:
            at = here + groups * GROUP * nbytes
            _copy(last_here, at, rest * nbytes)
            _copy(last_bits, bits + groups * WORD_NBYTES, (rest + 7) // 8)
            _unpack(last_bits, last_here, 1, low, high, accumulate, out)
            _copy(at, last_here, rest * nbytes)
        here += count * nbytes
        code = bits + block // 8


def _numba_view(x: Array) -> Any:
    """Numba has no 16-bit floats, so integers stand for them."""
    name = x.dtype.name
    return x.view(np.int16) if name == "float16" else x.view(np.uint16) if name == "bfloat16" else x


def encode(values: Array, residual: Array, payload: Array, block: int) -> None:
    """See ``OneBit.encode``; unchecked."""
    _encode(_numba_view(values), residual, payload, block)


def decode(payload: Array, out: Array, block: int, accumulate: bool) -> None:
    """See ``OneBit.decode``; unchecked."""
    _decode(payload, _numba_view(out), block, bool(accumulate))
