"""Vectors of 8 lanes for the kernels, as LLVM instructions: loads and stores of any alignment, and 16-bit floats.

A compiler may not reorder the sums of a plain loop, so that one is slow; with ``fastmath`` it is fast, and rounds
differently on each machine. Lane k of a sum of vectors is the same on every machine, whatever the width of its
registers.

Addresses are integers; ``like`` is a pointer that tells what it points to. ``lanes_numba.py`` is for kernels written in
Python.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

PART = 8  # lanes of a vector
LARGEST = float.fromhex("0x1.fffffep127")  # of float32
LINE_NBYTES = 64  # of a cache; only speed depends on it

FLOAT, DOUBLE = ir.FloatType(), ir.DoubleType()
I1, I8, I16, I32, I64 = (ir.IntType(width) for width in (1, 8, 16, 32, 64))
WORDS, FLOATS = ir.VectorType(I32, PART), ir.VectorType(FLOAT, PART)
POINTER = I8.as_pointer()
LANE_NBYTES = {I16: 2, FLOAT: 4, DOUBLE: 8}

intrinsic: Any = numba_intrinsic  # whose functions lack, when called, the first parameter of their definition


_intrinsic_of_constants: Any = numba_intrinsic(prefer_literal=True)


class Kind:
    """How a part of so many values is loaded, computed with (in float32, or float64 for float64) and stored."""

    def __init__(self, like: Any, lanes: int = PART) -> None:
        self.dtype = like.dtype
        stored = {types.float32: FLOAT, types.float64: DOUBLE}.get(like.dtype, I16)
        self.stored = ir.VectorType(stored, lanes)
        self.stored_nbytes = like.dtype.bitwidth // 8 * lanes
        self.wide = ir.VectorType(DOUBLE if stored == DOUBLE else FLOAT, lanes)
        self.wide_nbytes = max(self.stored_nbytes, 4 * lanes)

    def load(self, builder: Any, array: Any, part: Any) -> Any:
        """Part number ``part`` of the stored values at ``array``, widened exactly."""
        return self.widen(builder, read(builder, self.stored, element(builder, array, part, self.stored_nbytes)))

    def widen(self, builder: Any, x: Any) -> Any:
        """``stored`` to ``wide``, exactly."""
        if self.dtype == types.int16:
            return _float16_to_float32(builder, x)
        return _bfloat16_to_float32(builder, x) if self.dtype == types.uint16 else x

    def load_wide(self, builder: Any, array: Any, part: Any) -> Any:
        """Part number ``part`` of the wide values at ``array``."""
        return read(builder, self.wide, element(builder, array, part, self.wide_nbytes))

    def narrow(self, builder: Any, x: Any) -> Any:
        """``wide`` to ``stored``, rounded to nearest, ties to even."""
        if self.dtype == types.int16:
            return _float32_to_float16(builder, x)
        return _float32_to_bfloat16(builder, x) if self.dtype == types.uint16 else x

    def level(self, builder: Any, level: Any) -> Any:
        """The float32 ``level`` in every lane."""
        return splat(builder, builder.fpext(level, DOUBLE) if self.wide.element == DOUBLE else level)


def _bfloat16_to_float32(b: Any, x: Any) -> Any:
    number, words, floats, _ = _as(x)
    return b.bitcast(b.shl(b.zext(x, words), number(16)), floats)


def _float32_to_bfloat16(b: Any, x: Any) -> Any:
    number, words, _, halves = _as(x)
    bits = b.bitcast(x, words)
    odd = b.and_(b.lshr(bits, number(16)), number(1))
    rounded = b.add(bits, b.add(odd, number(0x7FFF)))
    quiet = b.or_(bits, number(0x400000))  # rounding could make a NaN an infinity
    return b.trunc(b.lshr(b.select(b.fcmp_unordered("uno", x, x), quiet, rounded), number(16)), halves)


# LLVM's own float16 conversions call a library, absent here, where the processor has none. These are integer
# arithmetic; below float16's smallest normal number, 2^-14, a float addition does the shift.


def _float16_to_float32(b: Any, x: Any) -> Any:
    number, words, floats, _ = _as(x)
    bits = b.zext(x, words)
    magnitude = b.shl(b.and_(bits, number(0x7FFF)), number(13))
    exponent = b.and_(magnitude, number(31 << 23))
    normal = b.add(magnitude, number((127 - 15) << 23))
    special = b.add(normal, number((128 - 16) << 23))  # infinity, NaN
    tiny = b.fsub(b.bitcast(b.add(normal, number(1 << 23)), floats), b.bitcast(number((127 - 14) << 23), floats))
    result = b.select(b.icmp_unsigned("==", exponent, number(31 << 23)), special, normal)
    result = b.select(b.icmp_unsigned("==", exponent, number(0)), b.bitcast(tiny, words), result)
    return b.bitcast(b.or_(result, b.shl(b.and_(bits, number(0x8000)), number(16))), floats)


def _float32_to_float16(b: Any, x: Any) -> Any:
    number, words, floats, halves = _as(x)
    bits = b.bitcast(x, words)
    magnitude = b.and_(bits, number(0x7FFFFFFF))
    odd = b.and_(b.lshr(magnitude, number(13)), number(1))
    normal = b.lshr(b.sub(b.add(b.add(magnitude, odd), number(0xFFF)), number((127 - 15) << 23)), number(13))
    half = number((127 - 1) << 23)  # 0.5, whose last bit is float16's smallest number
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, floats), b.bitcast(half, floats)), words), half)
    special = b.select(b.icmp_unsigned(">", magnitude, number(255 << 23)), number(0x7E00), number(0x7C00))
    result = b.select(b.icmp_unsigned("<", magnitude, number((127 - 14) << 23)), tiny, normal)
    result = b.select(b.icmp_unsigned(">=", magnitude, number((127 + 16) << 23)), special, result)
    sign = b.and_(b.lshr(bits, number(16)), number(0x8000))
    return b.trunc(b.or_(result, sign), halves)


def _as(x: Any) -> tuple[Callable[[int], Any], Any, Any, Any]:
    """For lanes as many as those of ``x``: a whole number in all, and types of words, floats and 16 bits."""
    lanes = x.type.count
    words = ir.VectorType(I32, lanes)
    return lambda k: ir.Constant(words, [k] * lanes), words, ir.VectorType(FLOAT, lanes), ir.VectorType(I16, lanes)


def splat(builder: Any, x: Any, lanes: int = PART) -> Any:
    """The number ``x`` in every lane."""
    vector = builder.insert_element(ir.Constant(ir.VectorType(x.type, lanes), ir.Undefined), x, I32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def element(builder: Any, address: Any, index: Any, nbytes: int) -> Any:
    """The address of element ``index`` of those of ``nbytes`` bytes."""
    return builder.add(address, builder.mul(index, I64(nbytes)))


def read(builder: Any, kind: Any, address: Any) -> Any:
    """What lies at ``address``, of LLVM's type ``kind``."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def write(builder: Any, x: Any, address: Any) -> None:
    """Put ``x`` at ``address``."""
    builder.store(x, builder.inttoptr(address, x.type.as_pointer()), align=1)


def write_past_cache(builder: Any, x: Any, address: Any, count: int) -> None:
    """Put ``x`` at ``address`` in so many equal pieces, a multiple of whose length it is, without room in the cache."""
    lanes = x.type.count // count
    now = builder.module.add_metadata([I32(1)])
    for k in range(count):
        lane = ir.Constant(ir.VectorType(I32, lanes), list(range(k * lanes, (k + 1) * lanes)))
        piece = builder.shuffle_vector(x, x, lane)
        nbytes = LANE_NBYTES[x.type.element] * lanes
        place = builder.inttoptr(builder.add(address, I64(k * nbytes)), piece.type.as_pointer())
        builder.store(piece, place, align=nbytes).set_metadata("nontemporal", now)


def not_negative(builder: Any, v: Any) -> Any:
    """v >= 0 lane by lane: true for -0.0, false for NaN."""
    return builder.fcmp_ordered(">=", v, ir.Constant(v.type, None))


def prefetch(builder: Any, address: Any, nbytes: int) -> None:
    """Begin loading ``nbytes`` into the cache; an address beyond an array does no harm."""
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch", [POINTER], ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
    )
    for offset in range(0, nbytes, LINE_NBYTES):
        line = builder.inttoptr(builder.add(address, I64(offset)), POINTER)
        builder.call(prefetch, [line, I32(0), I32(3), I32(1)])  # to read, to the nearest cache, data


@intrinsic
def end_of_stores(typing: Any) -> Any:
    """What was put past the cache is there for other threads before anything that is stored from now on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def address(typing: Any, pointer: Any) -> Any:
    """The pointer as an integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.ptrtoint(arguments[0], I64)

    return types.int64(pointer), generate


@intrinsic
def itemsize(typing: Any, pointer: Any) -> Any:
    """Bytes of one value that the pointer points to."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return I64(pointer.dtype.bitwidth // 8)

    return types.int64(pointer), generate


@intrinsic
def copy(typing: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """Copy bytes from one address to another; not overlapping."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, source = (builder.inttoptr(address, POINTER) for address in arguments[:2])
        cgutils.raw_memcpy(builder, target, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def get(typing: Any, address: Any, like: Any) -> Any:
    """The number of ``like``'s type at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return read(builder, context.get_value_type(like), arguments[0])

    return like(types.int64, like), generate


@intrinsic
def put(typing: Any, address: Any, x: Any) -> Any:
    """Put the number ``x`` at ``address``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        write(builder, arguments[1], arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64, x), generate


@intrinsic
def clear(typing: Any, address: Any, nbytes: Any) -> Any:
    """Set bytes to zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        cgutils.memset(builder, builder.inttoptr(arguments[0], POINTER), arguments[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@_intrinsic_of_constants
def stack(typing: Any, nbytes: Any) -> Any:
    """The address of so many bytes (a constant) of stack memory. Each call that the code holds has its own."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(ir.VectorType(I64, PART), -(-nbytes.literal_value // 64)))
        return builder.ptrtoint(memory, I64)

    return types.int64(nbytes), generate


@intrinsic
def unused_are_zero(typing: Any, payload: Any, nbytes: Any, nbits: Any) -> Any:
    """Whether the last of ``nbytes`` bytes, of which ``nbits`` % 8 bits are used (0: all), has zeros behind them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        payload, nbytes, nbits = arguments
        used = builder.and_(builder.trunc(nbits, I8), I8(7))
        result = cgutils.alloca_once_value(builder, I1(1))
        with builder.if_then(builder.icmp_unsigned("!=", used, I8(0))):
            last = read(builder, I8, builder.add(builder.ptrtoint(payload, I64), builder.sub(nbytes, I64(1))))
            builder.store(builder.icmp_unsigned("==", builder.lshr(last, used), I8(0)), result)
        return builder.load(result)

    return types.boolean(payload, types.int64, types.int64), generate


@intrinsic
def as_type(typing: Any, address: Any, like: Any) -> Any:
    """The address as a pointer of ``like``'s type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(like))

    return like(types.int64, like), generate
