"""Compiled kernels as C functions: what an encoder is for the native engine, which calls them without Python.

The two functions of an encoder, for values of one dtype, never touch the interpreter::

    int64 encode(const void* values, void* residual, int64 n, uint8* payload, int64 capacity, int64 seed,
                 const double* settings)    // the bytes used, or -1: capacity is too small, and residual is spoilt
    int64 decode(const uint8* payload, int64 nbytes, void* out, int64 n, int64 accumulate, const double* settings)
                                            // 0, or -1: the payload is not one of n values

A payload may begin at any address; values, residual and out at one that suits their dtype. ``decode`` reads nothing but
the ``nbytes`` bytes, and writes nothing but the n values, of which some may have changed when it returns -1.

They are the functions ``encode`` and ``decode`` of the encoder's kernel file, ``NAME_numba.py``, and ``Encoder`` calls
the same machine code. An encoder without such a file runs its own NumPy code.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

ENCODE: Any = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64),
    *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
)
DECODE: Any = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64),
    *(ctypes.c_int64, ctypes.c_void_p),
)


class Functions(NamedTuple):
    """Addresses: of the two functions, valid as long as the process lives, and of the settings that both are given."""

    encode: int
    decode: int
    settings: int


_COMPRESSION = "bitring.compression."


@functools.cache
def kernel_file(module: str, kind: str) -> str | None:
    """The module with the kernels of the encoder that was written in ``module``; None where there is none.

    ``kind``: "numba" or "cuda". Of a NAME.py in ``compression`` it is ``compression/kernels/NAME_KIND.py``; in
    packages outside, ``their_package/NAME_KIND.py`` beside ``their_package/NAME.py``.
    """
    name = f"{module}_{kind}"
    if name.startswith(_COMPRESSION):
        name = f"bitring.compression.kernels.{name.rpartition('.')[2]}"
    try:
        return name if importlib.util.find_spec(name) is not None else None
    except ModuleNotFoundError:  # what it is in is no package
        return None


@functools.cache
def encode_function(module: str, dtype: Any) -> Callable[..., int]:
    """``encode`` of the kernel file ``module`` for values of ``dtype``; ctypes releases the interpreter lock."""
    from bitring.compression.kernels import jit

    values, wide = jit.pointer_type(dtype), jit.wide_pointer_type(dtype)
    arguments = (values, wide, jit.INT, jit.BYTES, jit.INT, jit.INT, jit.DOUBLES)
    function: Callable[..., int] = ENCODE(jit.compiled(importlib.import_module(module).encode, arguments))
    return function


@functools.cache
def decode_function(module: str, dtype: Any) -> Callable[..., int]:
    """``decode`` of the kernel file ``module`` to values of ``dtype``."""
    from bitring.compression.kernels import jit

    arguments = (jit.BYTES, jit.INT, jit.pointer_type(dtype), jit.INT, jit.INT, jit.DOUBLES)
    function: Callable[..., int] = DECODE(jit.compiled(importlib.import_module(module).decode, arguments))
    return function


@functools.cache
def _kept(settings: tuple[float, ...]) -> Any:
    return np.array(settings, np.float64)


@functools.cache
def settings_address(settings: tuple[float, ...]) -> int:
    """The address of these numbers, valid as long as the process lives."""
    address: int = _kept(settings).ctypes.data
    return address


def address_of(function: Any) -> int:
    """The address of a function that ctypes calls."""
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
