"""An XLA FFI target whose handler is Python: it works on the computation's own buffers, without copies.

XLA calls a handler with a call frame, laid out as in ``xla/ffi/api/c_api.h`` in ``jax.ffi.include_dir()``. What of it
is used here is written down in ``ctypes``, so that bitring is built without jaxlib. XLA compares the version of the
interface that a handler names with its own; where the two do not match there is no target.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap
import os
from typing import Any
from weakref import WeakValueDictionary

import jax
import ml_dtypes
import numpy as np

from bitring.jax.work import Work

TARGET = "bitring_work"

_MAJOR, _MINOR = 0, 3  # the version of the interface that is written down here
_METADATA = 1
_EXECUTE = 3
_INTERNAL = 13
_TOKEN = 17
_DTYPES = {
    1: np.bool_,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.uint8,
    7: np.uint16,
    8: np.uint32,
    9: np.uint64,
    10: np.float16,
    11: np.float32,
    12: np.float64,
    15: np.complex64,
    16: ml_dtypes.bfloat16,
    18: np.complex128,
}

_LARGE_NBYTES = 4 << 20

_Pointer = ctypes.c_void_p
_madvise: Any = None
if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux
    _madvise = ctypes.CDLL(None).madvise
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class _Extension(ctypes.Structure):
    _fields_ = (("struct_size", ctypes.c_size_t), ("type", ctypes.c_int), ("next", _Pointer))


class _Version(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", _Pointer),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
    )


class _Metadata(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("version", _Version),
        ("traits", ctypes.c_uint32),
        ("state_type", ctypes.c_int64),
    )


class _MetadataExtension(ctypes.Structure):
    _fields_ = (("base", _Extension), ("metadata", ctypes.POINTER(_Metadata)))


class _ErrorArguments(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", _Pointer),
        ("message", ctypes.c_char_p),
        ("code", ctypes.c_int),
    )


_CreateError = ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_ErrorArguments))


class _Api(ctypes.Structure):
    """Its beginning."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", _Pointer),
        ("version", _Version),
        ("internal", _Pointer),
        ("create_error", _CreateError),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", _Pointer),
        ("dtype", ctypes.c_int),
        ("data", _Pointer),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.POINTER(ctypes.c_int64)),
    )


class _Buffers(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", _Pointer),
        ("size", ctypes.c_int64),
        ("types", _Pointer),
        ("values", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    )


class _Scalar(ctypes.Structure):
    _fields_ = (("dtype", ctypes.c_int), ("value", ctypes.POINTER(ctypes.c_int64)))


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", _Pointer),
        ("size", ctypes.c_int64),
        ("types", _Pointer),
        ("names", _Pointer),
        ("values", ctypes.POINTER(ctypes.POINTER(_Scalar))),
    )


class _CallFrame(ctypes.Structure):
    """Its beginning."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.POINTER(_Api)),
        ("context", _Pointer),
        ("stage", ctypes.c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


_works: WeakValueDictionary[int, Work] = WeakValueDictionary()
_under_way: list[Work] = []  # JAX may drop a computation that it has still to run
# Numbers are this process's own: an executable that another one has left in a cache on the disk is never of this work.
_numbers = itertools.count(int.from_bytes(os.urandom(7), "little"))


def number_of(work: Work) -> int:
    """The number by which the handler finds ``work``, as long as it is alive, or ``forget`` was not called."""
    _under_way.append(work)
    for number, known in list(_works.items()):
        if known is work:
            return number
    number = next(_numbers)
    _works[number] = work
    return number


def forget() -> None:
    """All that was dispatched is done: from now on only a computation that is kept keeps its works."""
    _under_way.clear()


def _in_large_pages(address: int, nbytes: int) -> None:
    """Ask for large pages, as NumPy does for its arrays: XLA's results are mostly new memory, and each page costs."""
    first, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _madvise is not None:
        _madvise(first, end - first, mmap.MADV_HUGEPAGE)  # a hint: what it returns is of no interest


def _arrays(buffers: _Buffers, writable: bool) -> list[Any]:
    """The memory of each buffer as a NumPy array; tokens are left out."""
    found: list[Any] = []
    for i in range(buffers.size):
        buffer = buffers.values[i].contents
        if buffer.dtype == _TOKEN:
            continue
        shape, dtype = tuple(buffer.dims[: buffer.rank]), np.dtype(_DTYPES[buffer.dtype])
        nbytes = math.prod(shape) * dtype.itemsize
        array: Any = np.empty(shape, dtype)
        if nbytes:
            if writable and nbytes >= _LARGE_NBYTES:
                _in_large_pages(buffer.data, nbytes)
            memory: Any = (ctypes.c_uint8 * nbytes).from_address(buffer.data)
            array = np.frombuffer(memory, dtype).reshape(shape)
        array.flags.writeable = writable
        found.append(array)
    return found


def _handle(pointer: Any) -> int | None:
    frame = pointer.contents
    try:
        if frame.extension and frame.extension.contents.type == _METADATA:
            extension = ctypes.cast(frame.extension, ctypes.POINTER(_MetadataExtension)).contents
            version = extension.metadata.contents.version
            version.struct_size, version.extension = ctypes.sizeof(_Version), None
            version.major, version.minor = _MAJOR, _MINOR
            extension.metadata.contents.traits = 0
            return None
        if frame.stage != _EXECUTE:
            return None
        work = _works[frame.attributes.values[0].contents.value.contents.value]
        work.run(_arrays(frame.arguments, writable=False), _arrays(frame.results, writable=True))
    except BaseException as error:  # this is called from C, which knows no exceptions
        text = f"{type(error).__name__}: {error}".encode(errors="replace")
        arguments = _ErrorArguments(ctypes.sizeof(_ErrorArguments), None, text, _INTERNAL)
        created: int | None = frame.api.contents.create_error(ctypes.byref(arguments))
        return created
    return None


_handler = ctypes.CFUNCTYPE(_Pointer, ctypes.POINTER(_CallFrame))(_handle)


@functools.cache
def registered() -> bool:
    """Whether there is the target: it is registered now, unless XLA refuses it."""
    jax.local_devices(backend="cpu")  # registered before there is one, a target that is refused would spoil JAX's start
    try:
        address = ctypes.cast(_handler, ctypes.c_void_p).value
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(address), platform="cpu")
    except Exception:  # another version of the interface
        return False
    return True
