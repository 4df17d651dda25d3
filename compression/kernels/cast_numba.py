"""Values as 16-bit floats: the parts of the kernels of ``float16.py`` and ``bfloat16.py``."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from bitring.compression.kernels.jit import inline
from bitring.compression.kernels.lanes_numba import convert, lanes, load, select, store
from bitring.compression.kernels.vectors_numba import PART, intrinsic


def _pointer_to(kind: Any) -> Any:
    @intrinsic
    def cast(typing: Any, payload: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], ir.IntType(16).as_pointer())

        return types.CPointer(kind)(payload), generate

    return cast


float16s = _pointer_to(types.int16)
bfloat16s = _pointer_to(types.uint16)


@inline
def encode_halves(values: Any, residual: Any, n: int, halves: Any, capacity: int, largest: float) -> Any:
    """``encode`` of ``functions.py``: beyond ±largest, the largest number there is, the rest is left."""
    if 2 * n > capacity:
        return -1
    high, low = lanes(largest, values), lanes(-largest, values)
    for i in range(0, n, PART):
        v = load(values, i, n) + load(residual, i, n)
        x = select(v > high, high, select(v < low, low, v))
        store(halves, i, n, convert(x, halves))
        store(residual, i, n, v - convert(load(halves, i, n), residual))
    return 2 * n


@inline
def decode_halves(halves: Any, nbytes: int, out: Any, n: int, accumulate: int) -> Any:
    """``decode`` of ``functions.py``."""
    if nbytes != 2 * n:
        return -1
    for i in range(0, n, PART):
        x = convert(load(halves, i, n), out)
        if accumulate:
            x = load(out, i, n) + x
        store(out, i, n, convert(x, out))
    return 0
