"""Numba's compiler as bitring's kernels use it: lazy, without the interpreter lock, cached on disk where that works."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., object])


def jit(function: Function) -> Function:
    """Compile ``function`` once for each combination of argument types, when it is first called with them.

    The machine code is kept where Numba keeps it (NUMBA_CACHE_DIR, else beside the source, else in the user's cache
    folder), so that one process on a node compiles and the others load. Where no such folder can be written, or
    writing fails, each process compiles for itself.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # Numba found no writable folder
        return cast(Function, numba.njit(**options)(function))

    @functools.wraps(function)
    def call(*arguments: object) -> object:
        try:
            return compiled(*arguments)
        except OSError:  # a full disk, say: the function was compiled, but has neither been saved nor run
            return compiled(*arguments)

    return cast(Function, call)
