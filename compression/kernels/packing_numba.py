"""Whole numbers of a few bits each, without gaps: the parts that the kernels of ``linear.py`` and ``fixed.py`` share.

8 numbers of b bits, 2 <= b <= 16, in two's complement, are b bytes: a word of up to 64 bits, one more where b > 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from bitring.compression.kernels.jit import inline
from bitring.compression.kernels.lanes_numba import absolute, lanes, largest, load, select, store
from bitring.compression.kernels.vectors_numba import (
    DOUBLE,
    FLOAT,
    I16,
    I32,
    I64,
    PART,
    address,
    copy,
    get,
    intrinsic,
    put,
    splat,
    stack,
    unused_are_zero,
)

STEP_NBYTES = 4
WORDS_NBYTES = 16
HALVES, WORDS = ir.VectorType(I16, PART), ir.VectorType(I64, 2)


def _in_both(builder: Any, x: Any) -> Any:
    words = builder.insert_element(ir.Constant(WORDS, ir.Undefined), x, I32(0))
    return builder.insert_element(words, x, I32(1))


def _constants(x: int) -> Any:
    return ir.Constant(WORDS, [x, x])


@intrinsic
def _words(typing: Any, x: Any, nbits: Any) -> Any:
    """Lanes of whole numbers as two words: the last ``nbits`` bits of four numbers each, with no gaps between them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, nbits = arguments
        # Numbers are as wide as the lanes at first: vectors convert to that in one instruction.
        numbers = builder.fptosi(vector, ir.VectorType(I64 if x.dtype == types.float64 else I32, PART))
        kept = splat(builder, builder.lshr(I16(0xFFFF), builder.trunc(builder.sub(I64(16), nbits), I16)))
        words = builder.bitcast(builder.and_(builder.trunc(numbers, HALVES), kept), WORDS)
        b, even = _in_both(builder, nbits), _constants(0x0000FFFF0000FFFF)
        odd = builder.shl(builder.and_(builder.lshr(words, _constants(16)), even), b)
        pairs = builder.or_(builder.and_(words, even), odd)
        second = builder.shl(builder.lshr(pairs, _constants(32)), builder.add(b, b))
        fours = builder.or_(builder.and_(pairs, _constants(0xFFFFFFFF)), second)
        both = [builder.extract_element(fours, I32(k)) for k in (0, 1)]
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(types.uint64, 2)(x, types.int64), generate


@intrinsic
def _numbers(typing: Any, low: Any, high: Any, nbits: Any, like: Any) -> Any:
    """What ``_words`` was given, as lanes of ``like``'s type; bits of a word behind its four numbers are ignored."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high, nbits, _ = arguments
        fours = builder.insert_element(_in_both(builder, low), high, I32(1))
        b = _in_both(builder, nbits)
        twice = builder.add(b, b)
        mask = builder.sub(builder.shl(_constants(1), twice), _constants(1))
        second = builder.shl(builder.and_(builder.lshr(fours, twice), mask), _constants(32))
        pairs = builder.or_(builder.and_(fours, mask), second)
        # The bits above each number are shifted out below.
        odd = builder.shl(builder.lshr(pairs, b), _constants(16))
        even = _constants(0x0000FFFF0000FFFF)
        words = builder.or_(builder.and_(pairs, even), builder.and_(odd, _constants(0xFFFF0000FFFF0000)))
        unused = splat(builder, builder.trunc(builder.sub(I64(16), nbits), I16))
        numbers = builder.ashr(builder.shl(builder.bitcast(words, HALVES), unused), unused)
        wide = builder.sext(numbers, ir.VectorType(I32, PART))
        return builder.sitofp(wide, ir.VectorType(DOUBLE if like.dtype == types.float64 else FLOAT, PART))

    return like(types.uint64, types.uint64, types.int64, like), generate


@inline
def pack(numbers: Any, nbits: int, at: int, end: int) -> None:
    """Write 8 numbers at address ``at``, or as many of their bytes as there is room before ``end``."""
    b = np.uint64(nbits)
    first, second = _words(numbers, nbits)
    half, rest = b + b, np.uint64(32) - b - b  # shifted by twice: a shift by all 64 bits is undefined
    low, high = first | second << half << half, second >> rest >> rest
    if at + WORDS_NBYTES <= end:  # what is written behind the numbers, the next ones overwrite
        put(at, low)
        if nbits > 8:
            put(at + 8, high)
    else:
        words = stack(WORDS_NBYTES)
        put(words, low)
        put(words + 8, high)
        copy(at, words, min(nbits, end - at))


@inline
def unpack(like: Any, nbits: int, at: int, end: int) -> Any:
    """The 8 numbers at address ``at``, as lanes of ``like``'s type; nothing from ``end`` on is read."""
    b = np.uint64(nbits)
    low, high = np.uint64(0), np.uint64(0)
    if at + WORDS_NBYTES <= end:
        low = get(at, np.uint64(0))
        if nbits > 8:
            high = get(at + 8, np.uint64(0))
    else:
        words = stack(WORDS_NBYTES)
        put(words, low)
        put(words + 8, high)
        copy(words, at, min(nbits, end - at))
        low, high = get(words, np.uint64(0)), get(words + 8, np.uint64(0))
    half, rest = b + b, np.uint64(32) - b - b
    return _numbers(low, low >> half >> half | high << rest << rest, nbits, like)


@inline
def nbytes_of(count: int, nbits: int) -> Any:
    """Bytes of a block: the step, then the numbers."""
    return STEP_NBYTES + (count * nbits + 7) // 8


@inline
def largest_magnitude(values: Any, residual: Any, first: int, stop: int) -> Any:
    """The largest |v| of a block, v = values + residual; a NaN does not count."""
    most = lanes(0.0, values)
    for i in range(first, stop, PART):
        magnitude = absolute(load(values, i, stop) + load(residual, i, stop))
        most = select(magnitude > most, magnitude, most)
    return largest(most)


def decode(payload: Any, nbytes: int, out: Any, n: int, accumulate: int, settings: Any) -> Any:
    """See ``functions.py``; settings: block, bits."""
    block: Any = np.int64(settings[0])
    nbits: Any = np.int64(settings[1])
    like = lanes(0.0, out)
    at = 0
    for first in range(0, n, block):
        stop = min(first + block, n)
        end = at + nbytes_of(stop - first, nbits)
        if end > nbytes:
            return -1
        step = lanes(get(address(payload) + at, np.float32(0)), out)
        here = address(payload) + at + STEP_NBYTES
        for i in range(first, stop, PART):
            x = unpack(like, nbits, here, address(payload) + end) * step
            if accumulate:
                x = load(out, i, stop) + x
            store(out, i, stop, x)
            here += nbits
        at = end
    return 0 if at == nbytes and unused_are_zero(payload, nbytes, n % block * nbits) else -1
