"""Generalized requests that the MPI library polls, where it can: a caller waiting in it takes the job further itself.

MPI's own generalized requests are completed by another thread, here the progress thread, while a caller in ``Waitany``
spins inside the library. Where that spinning keeps the library's lock, and there are more ranks than cores, the other
thread hardly gets to run. MPICH has the extension that ends this (R. Latham, W. Gropp, R. Ross, R. Thakur:
Extending the MPI-2 Generalized Request Interface, EuroPVM/MPI 2007): ``MPIX_Grequest_start`` takes a function that the
library calls while somebody tests the request or waits for any of several.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, cast

from mpi4py import MPI

from bitring.collectives.interop.mpi_library import library_path


class Callbacks(NamedTuple):
    """The functions of a request that the library calls."""

    query: Callable[[], None]  # at its completion; an MPI.Exception is the request's error
    poll: Callable[[], None]  # now and then while somebody waits for any of several, or tests
    wait: Callable[[], None]  # when somebody waits for all: returns when it is complete
    interrupted: Callable[[BaseException], None]  # what ``poll`` or ``wait`` raised cannot pass through the library


class _Known(NamedTuple):
    callbacks: Callbacks
    poll: Callable[[Any], int]  # kept alive: its address is how the library knows the request


_known: dict[int, _Known] = {}


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


def _polling(callbacks: Callbacks) -> Generator[int, Any, None]:
    """Each ``send`` polls. A generator, because Python raises what a signal handler raises where it enters a function.

    A generator is entered where it stopped, inside the ``try``.
    """
    while True:
        try:
            yield MPI.SUCCESS
            callbacks.poll()
        except GeneratorExit:
            return
        except BaseException as error:
            callbacks.interrupted(error)


def _query(key: int, status_address: int) -> int:
    status = MPI.Status()
    status.Set_elements(MPI.BYTE, 0)
    status.Set_cancelled(False)
    status.Set_source(MPI.ANY_SOURCE)
    status.Set_tag(MPI.ANY_TAG)
    ctypes.memmove(status_address, MPI._addressof(status), MPI._sizeof(MPI.Status))
    try:
        _known[key].callbacks.query()
    except MPI.Exception as error:
        return error.Get_error_code()
    return MPI.SUCCESS


def _wait(count: int, keys: Any, seconds: float, status_address: int) -> int:
    callbacks = _known[keys[0]].callbacks
    try:
        callbacks.wait()
    except BaseException as error:
        callbacks.interrupted(error)
    return MPI.SUCCESS


def _free(key: int) -> int:
    del _known[key]
    return MPI.SUCCESS


def _cancel(key: int, complete: int) -> int:
    return MPI.SUCCESS  # as MPI says of what cannot be cancelled


class _Extension:
    """``MPIX_Grequest_start``, and the functions that it is given for every request."""

    def __init__(self, start: Any) -> None:
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        self._start = start
        self._functions = (
            ctypes.CFUNCTYPE(integer, pointer, pointer)(_query),
            ctypes.CFUNCTYPE(integer, pointer)(_free),
            ctypes.CFUNCTYPE(integer, pointer, integer)(_cancel),
            # Calls the request's own function without a Python frame between the library and its generator.
            ctypes.CFUNCTYPE(integer, ctypes.py_object, pointer)(functools.partial.__call__),
            ctypes.CFUNCTYPE(integer, integer, ctypes.POINTER(pointer), ctypes.c_double, pointer)(_wait),
        )

    def start(self, callbacks: Callbacks) -> MPI.Grequest:
        generator = _polling(callbacks)
        next(generator)
        known = _Known(callbacks, functools.partial(generator.send))
        key, request = id(known.poll), MPI.Request()
        _known[key] = known
        code = self._start(*self._functions, ctypes.c_void_p(key), ctypes.c_void_p(MPI._addressof(request)))
        if code != MPI.SUCCESS:
            del _known[key]
            raise MPI.Exception(code)
        return cast(MPI.Grequest, MPI.Grequest.fromhandle(MPI._handleof(request)))


@functools.cache
def _extension() -> _Extension | None:
    # Older versions keep a lock while they poll, and wait for several requests in another way.
    version = re.match(r"MPICH Version:\s*(\d+)", MPI.Get_library_version())
    path = library_path()
    if path is None or version is None or int(version[1]) < 5:
        return None
    start = getattr(ctypes.CDLL(path, mode=os.RTLD_NOLOAD), "MPIX_Grequest_start", None)
    return None if start is None else _Extension(start)


def start(callbacks: Callbacks) -> MPI.Grequest:
    """A generalized request: ``Complete`` it. Only ``callbacks.query`` is called where the library has no extension."""
    extension = _extension()
    if extension is None:
        return MPI.Grequest.Start(lambda status: callbacks.query())
    return extension.start(callbacks)
