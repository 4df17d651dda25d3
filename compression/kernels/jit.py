"""Numba's compiler as bitring's kernels use it: C functions that need no interpreter, cached on disk where it can."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba import types
from numba.core.ccallback import CFunc

from bitring.kernel_cache import with_cache

Function = TypeVar("Function", bound=Callable[..., object])

INT = types.int64
BYTES = types.CPointer(types.uint8)
DOUBLES = types.CPointer(types.float64)

_OPTIONS: dict[str, Any] = {"error_model": "numpy"}  # whose division raises nothing
_PART_OPTIONS: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_kept: list[Any] = []  # machine code lives as long as its object


def pointer_type(dtype: Any) -> Any:
    """Numba's type of a pointer to values of ``dtype``. It has no 16-bit floats, so integers stand for them."""
    name = np.dtype(dtype).name
    stand_ins = {"float16": types.int16, "bfloat16": types.uint16}
    return types.CPointer(stand_ins.get(name) or getattr(types, name))


def wide_pointer_type(dtype: Any) -> Any:
    """The same of what sums of such values are made in: float64 for float64, else float32."""
    return types.CPointer(types.float64 if np.dtype(dtype) == np.float64 else types.float32)


def inline(function: Function) -> Function:
    """A part of kernels, compiled into each that calls it."""
    return _part(function, forceinline=True)


def shared(function: Function) -> Function:
    """A larger part of kernels, which may stay a function of its own: that compiles faster."""
    return _part(function)


def _part(function: Function, **options: Any) -> Function:
    """For kernels alone, and once for each combination of types.

    Left to itself, Numba compiles another one for each constant that is an argument, and for the constant that a
    variable begins with: half of the time that a kernel took.
    """
    part: Any = numba.njit(**_PART_OPTIONS, **options)(function)
    made = part.get_call_template

    def get_call_template(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return made(tuple(types.unliteral(each) for each in arguments), named)

    part.get_call_template = get_call_template
    return cast(Function, part)


def jit(function: Function) -> Function:
    """For arrays: compiled once for each combination of argument types, when it is first called with them.

    Without the interpreter lock, and cached as ``compiled`` does, but for functions that use no others.
    """
    dispatcher: Any = numba.njit(nogil=True, **_OPTIONS)(function)
    return cast(Function, with_cache(dispatcher, function))


def compiled(function: Callable[..., Any], arguments: tuple[Any, ...]) -> int:
    """The address of ``function``, compiled for Numba's types ``arguments`` as a C function that returns an int64.

    The machine code is kept where Numba keeps it (NUMBA_CACHE_DIR, else beside the source, else in the user's cache
    folder), so that one process on a node compiles and the others load. Where no such folder can be written, or
    writing fails, each process compiles for itself.
    """
    result: Any = CFunc(function, (arguments, INT), locals={}, options={"nopython": True, **_OPTIONS})
    with_cache(result, function, parts=_digest(function.__module__)).compile()
    _kept.append(result)
    address: int = result.address
    return address


@functools.cache
def _digest(module: str) -> str:
    files = sorted(str(inspect.getsourcefile(sys.modules[name])) for name in _parts(module, set()))
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _parts(module: str, found: set[str]) -> set[str]:
    """``module`` and the kernel files, ``*_numba.py``, whose things it uses."""
    found.add(module)
    for thing in list(vars(sys.modules[module]).values()):
        name = getattr(thing, "__module__", None)
        if isinstance(name, str) and name.endswith("_numba") and name not in found:
            _parts(name, found)
    return found
