"""Generalized requests that the MPI library polls, where it can: a caller waiting in it takes the job further itself.

MPI's own generalized requests are completed by another thread, here the progress thread, while a caller in ``Waitany``
spins inside the library. Where that spinning keeps the library's lock, and there are more ranks than cores, the other
thread hardly comes to its turn. MPICH and its descendants have the extension that ends this (R. Latham, W. Gropp,
R. Ross, R. Thakur: Extending the MPI-2 Generalized Request Interface, EuroPVM/MPI 2007): ``MPIX_Grequest_start`` takes
a function that the library calls while somebody waits for, or tests, the request.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from mpi4py import MPI

from bitring.collectives.cuda_aware import mpi_library


class Callbacks(NamedTuple):
    """What the library calls of a request."""

    query: Callable[[MPI.Status], None]  # at its completion; an MPI.Exception is the request's error
    poll: Callable[[], None]  # now and then while somebody waits
    wait: Callable[[], None]  # returns when the request is complete


_open: dict[int, Callbacks] = {}  # the requests that the library knows
_keys = itertools.count(1)


@functools.cache
def _new_code(text: str) -> int:
    try:
        code = MPI.Add_error_code(MPI.ERR_OTHER)
        MPI.Add_error_string(code, text[: MPI.MAX_ERROR_STRING - 1])
    except MPI.Exception:  # the library has only so many
        return MPI.ERR_OTHER
    return code


def as_mpi(error: BaseException) -> MPI.Exception:
    """The error as one that MPI carries to whoever completes the request."""
    return error if isinstance(error, MPI.Exception) else MPI.Exception(_new_code(f"{type(error).__name__}: {error}"))


def _code_of(call: Callable[[], object]) -> int:
    """MPI's error code for what the call raises, Ctrl-C's too: nothing may pass through the library's frames."""
    try:
        call()
    except BaseException as error:
        return as_mpi(error).Get_error_code()
    return MPI.SUCCESS


def _query(key: int, status_address: int) -> int:
    status = MPI.Status()
    status.Set_elements(MPI.BYTE, 0)
    status.Set_cancelled(False)
    status.Set_source(MPI.ANY_SOURCE)
    status.Set_tag(MPI.ANY_TAG)
    ctypes.memmove(status_address, MPI._addressof(status), MPI._sizeof(MPI.Status))
    return _code_of(lambda: _open[key].query(status))


def _free(key: int) -> int:
    del _open[key]
    return MPI.SUCCESS


def _cancel(key: int, complete: int) -> int:
    return MPI.SUCCESS  # as MPI says of what cannot be cancelled


def _poll(key: int, status_address: int) -> int:
    return _code_of(_open[key].poll)


def _wait(count: int, keys: Any, seconds: float, status_address: int) -> int:
    return _code_of(_open[keys[0]].wait)


class _Extension:
    """``MPIX_Grequest_start``, and the functions that it is given for every request."""

    def __init__(self, start: Any) -> None:
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self._start = start
        self._functions = (
            ctypes.CFUNCTYPE(integer, pointer, pointer)(_query),
            ctypes.CFUNCTYPE(integer, pointer)(_free),
            ctypes.CFUNCTYPE(integer, pointer, integer)(_cancel),
            ctypes.CFUNCTYPE(integer, pointer, pointer)(_poll),
            ctypes.CFUNCTYPE(integer, integer, ctypes.POINTER(pointer), ctypes.c_double, pointer)(_wait),
        )

    def start(self, callbacks: Callbacks) -> MPI.Grequest:
        key, request = next(_keys), MPI.Request()
        _open[key] = callbacks
        code = self._start(*self._functions, ctypes.c_void_p(key), ctypes.c_void_p(MPI._addressof(request)))
        if code != MPI.SUCCESS:
            del _open[key]
            raise MPI.Exception(code)
        return cast(MPI.Grequest, MPI.Grequest.fromhandle(MPI._handleof(request)))


@functools.cache
def _extension() -> _Extension | None:
    path = mpi_library()
    start = None if path is None else getattr(ctypes.CDLL(path, mode=os.RTLD_NOLOAD), "MPIX_Grequest_start", None)
    return None if start is None else _Extension(start)


def start(callbacks: Callbacks) -> MPI.Grequest:
    """A generalized request: ``Complete`` it. Only ``callbacks.query`` is called where the library has no extension."""
    extension = _extension()
    if extension is None:
        return MPI.Grequest.Start(callbacks.query)
    return extension.start(callbacks)
