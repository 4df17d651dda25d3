"""Vectors of 8 lanes as values of Numba's, for kernels written in Python: arithmetic, comparisons, loads and stores.

Loads widen 16 bits to float32, and stores round to them. At the end of an array both take what there is; the lanes
behind it are zeros. Nothing is contracted or reordered, so that results are the same on every machine.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models, register_model

from bitring.compression.kernels.vectors_numba import (
    DOUBLE,
    FLOAT,
    I1,
    I8,
    I32,
    I64,
    PART,
    POINTER,
    Kind,
    element,
    intrinsic,
    read,
    splat,
    write,
)


class Lanes(types.Type):  # type: ignore[misc]
    """8 numbers of ``dtype``, float32 or float64."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


class Mask(types.Type):  # type: ignore[misc]
    """8 truth values."""

    def __init__(self) -> None:
        super().__init__(name="Mask")


MASK = Mask()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(DOUBLE if fe_type.dtype == types.float64 else FLOAT, PART))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(I1, PART))


def _wide(like: Any) -> Any:
    """The lanes that values behind the pointer ``like``, or lanes like it, are computed in."""
    return Lanes(types.float64 if like.dtype == types.float64 else types.float32)


def _operator(function: Any, result: Callable[[Any], Any], lower: Callable[[Any, Any, Any], Any]) -> None:
    class Template(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            x, y = args
            return signature(result(x), x, y) if isinstance(x, Lanes) and x == y else None

    found: Any = infer_global(function)
    found(Template)
    registered: Any = functools.partial(lower_builtin, function)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return lower(builder, *arguments)

    registered(Lanes, Lanes)(generate)


_operator(operator.add, lambda x: x, lambda builder, x, y: builder.fadd(x, y))
_operator(operator.sub, lambda x: x, lambda builder, x, y: builder.fsub(x, y))
_operator(operator.mul, lambda x: x, lambda builder, x, y: builder.fmul(x, y))
_operator(operator.ge, lambda _: MASK, lambda builder, x, y: builder.fcmp_ordered(">=", x, y))
_operator(operator.gt, lambda _: MASK, lambda builder, x, y: builder.fcmp_ordered(">", x, y))
_operator(operator.lt, lambda _: MASK, lambda builder, x, y: builder.fcmp_ordered("<", x, y))


def _whole_part(builder: Any, index: Any, stop: Any) -> Any:
    return builder.icmp_signed("<=", builder.add(index, I64(PART)), stop)


def _some(builder: Any, index: Any, stop: Any, nbytes: int) -> Any:
    return builder.mul(builder.sub(stop, index), I64(nbytes))


@intrinsic
def load(typing: Any, pointer: Any, index: Any, stop: Any) -> Any:
    """The values from ``index``, 8 or as many as there are before ``stop``; behind them zeros."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, index, stop = arguments
        kind = Kind(pointer)
        place = element(builder, builder.ptrtoint(values, I64), index, kind.stored_nbytes // PART)
        result = cgutils.alloca_once(builder, kind.wide)
        with builder.if_else(_whole_part(builder, index, stop), likely=True) as (whole, some):
            with whole:
                builder.store(kind.load(builder, place, I64(0)), result)
            with some:
                last = cgutils.alloca_once_value(builder, ir.Constant(kind.stored, None))
                nbytes = _some(builder, index, stop, kind.stored_nbytes // PART)
                builder.store(ir.Constant(kind.stored, None), last)
                cgutils.raw_memcpy(builder, builder.bitcast(last, POINTER), builder.inttoptr(place, POINTER), nbytes, 1)
                builder.store(kind.load(builder, builder.ptrtoint(last, I64), I64(0)), result)
        return builder.load(result)

    return _wide(pointer)(pointer, types.int64, types.int64), generate


@intrinsic
def store(typing: Any, pointer: Any, index: Any, stop: Any, x: Any) -> Any:
    """Put lanes where ``load`` takes them from."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, index, stop, x = arguments
        kind = Kind(pointer)
        place = element(builder, builder.ptrtoint(values, I64), index, kind.stored_nbytes // PART)
        stored = kind.narrow(builder, x)
        with builder.if_else(_whole_part(builder, index, stop), likely=True) as (whole, some):
            with whole:
                write(builder, stored, place)
            with some:
                last = cgutils.alloca_once_value(builder, stored)
                builder.store(stored, last)
                nbytes = _some(builder, index, stop, kind.stored_nbytes // PART)
                cgutils.raw_memcpy(builder, builder.inttoptr(place, POINTER), builder.bitcast(last, POINTER), nbytes, 1)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64, _wide(pointer)), generate


@intrinsic
def get_value(typing: Any, pointer: Any, index: Any) -> Any:
    """One value, widened."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = Kind(pointer)
        place = element(builder, builder.ptrtoint(arguments[0], I64), arguments[1], kind.stored_nbytes // PART)
        stored = splat(builder, read(builder, kind.stored.element, place))
        return builder.extract_element(kind.widen(builder, stored), I32(0))

    return _wide(pointer).dtype(pointer, types.int64), generate


@intrinsic
def put_value(typing: Any, pointer: Any, index: Any, x: Any) -> Any:
    """Store one value, rounded."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = Kind(pointer)
        place = element(builder, builder.ptrtoint(arguments[0], I64), arguments[1], kind.stored_nbytes // PART)
        stored = kind.narrow(builder, splat(builder, arguments[2]))
        write(builder, builder.extract_element(stored, I32(0)), place)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, _wide(pointer).dtype), generate


@intrinsic
def lanes(typing: Any, x: Any, like: Any) -> Any:
    """The number ``x`` in every lane, of the type in which values behind the pointer ``like`` are computed."""
    result = _wide(like)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splat(builder, arguments[0])

    return result(result.dtype, like), generate


@intrinsic
def convert(typing: Any, x: Any, like: Any) -> Any:
    """Lanes as those in which values behind the pointer ``like`` are computed."""
    result = _wide(like)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if result == x:
            return arguments[0]
        change = builder.fptrunc if result.dtype == types.float32 else builder.fpext
        return change(arguments[0], context.get_value_type(result))

    return result(x, like), generate


@intrinsic
def select(typing: Any, mask: Any, x: Any, y: Any) -> Any:
    """``x`` where the mask is true, else ``y``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.select(*arguments)

    return x(mask, x, x), generate


@intrinsic
def absolute(typing: Any, x: Any) -> Any:
    """The absolute values."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = arguments[0].type
        width = 64 if x.dtype == types.float64 else 32
        words = ir.VectorType(ir.IntType(width), PART)
        magnitude = ir.Constant(words, [(1 << (width - 1)) - 1] * PART)
        return builder.bitcast(builder.and_(builder.bitcast(arguments[0], words), magnitude), vector)

    return x(x), generate


@intrinsic
def bits(typing: Any, mask: Any) -> Any:
    """A mask as a byte, lane k as bit k."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I8)

    return types.uint8(mask), generate


@intrinsic
def mask_of(typing: Any, byte: Any) -> Any:
    """The mask whose byte this is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.VectorType(I1, PART))

    return MASK(types.uint8), generate


@intrinsic
def total(typing: Any, x: Any) -> Any:
    """The sum of the lanes in float64: lane k takes lane k + 4, then k + 2, then k + 1."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = arguments[0]
        if x.dtype == types.float32:
            vector = builder.fpext(vector, ir.VectorType(DOUBLE, PART))
        return _folded(builder, vector, builder.fadd)

    return types.float64(x), generate


@intrinsic
def largest(typing: Any, x: Any) -> Any:
    """The largest lane, of numbers that are no NaN."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def larger(x: Any, y: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", x, y), x, y)

        return _folded(builder, arguments[0], larger)

    return x.dtype(x), generate


def _folded(builder: Any, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
    half = PART // 2
    while half:
        lower, upper = (
            builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, half), list(range(k, k + half))))
            for k in (0, half)
        )
        vector = combine(lower, upper)
        half //= 2
    return builder.extract_element(vector, I32(0))


@intrinsic
def nearest(typing: Any, x: Any) -> Any:
    """Whole numbers, ties to even, of magnitudes below 2^22: what a sum with a large number leaves of them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = arguments[0].type
        large = ir.Constant(vector, [1.5 * 2.0 ** (52 if x.dtype == types.float64 else 23)] * PART)
        return builder.fsub(builder.fadd(arguments[0], large), large)

    return x(x), generate
