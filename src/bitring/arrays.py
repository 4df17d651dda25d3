"""The one place that decides between NumPy and CuPy.

A buffer is a NumPy array (host memory) or a device array. What the rest of bitring needs to know of a device is the
small :class:`Device` interface: its array module, pinned host memory, asynchronous copies, and events. CuPy's is
below; a test registers a fake one over host memory in ``devices``, so that the device paths run without a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import ml_dtypes
import numpy as np

Array = Any  # numpy.ndarray, cupy.ndarray, or a registered device's array

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_SCALARS: tuple[Any, ...] = (
    np.bool_,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.uint8,
    np.uint16,
    np.uint32,
    np.uint64,
    np.float16,
    BFLOAT16,
    np.float32,
    np.float64,
    np.longdouble,
    np.complex64,
    np.complex128,
    np.clongdouble,
)
NUMERIC_DTYPES: tuple[np.dtype[Any], ...] = tuple(map(np.dtype, _SCALARS))
"""The dtypes that bitring moves and reduces; the extension knows all of them."""

_NUMERIC = frozenset(NUMERIC_DTYPES)


class Event(Protocol):
    """A point in a device's stream."""

    @property
    def done(self) -> bool:
        """Whether the work before this point has finished."""
        ...


Surroundings = Callable[[], AbstractContextManager[Any]]


class Device(Protocol):
    """The operations that bitring needs of a device."""

    xp: Any  # array module: empty, ufuncs with out=

    def asarray(self, x: Any) -> Array:
        """``x``, an object in this device's memory, as an array of this device, sharing memory."""
        ...

    def pinned(self, nbytes: int) -> Any:
        """Page-locked host memory as a NumPy uint8 array of ``nbytes``."""
        ...

    def copy_out(self, host: Any, array: Array) -> Event:
        """Begin copying ``array`` to the NumPy array ``host``, after the current stream's work; same size and dtype."""
        ...

    def copy_in(self, array: Array, host: Any) -> Event:
        """Begin copying the NumPy array ``host`` to ``array``, in the current stream."""
        ...

    def record(self) -> Event:
        """An event at the end of the current stream."""
        ...

    def capture(self) -> Surroundings:
        """The context that is current in the calling thread (device, stream), to be entered in another thread."""
        ...


class _CudaEvent:
    def __init__(self, event: Any) -> None:
        self._event = event

    @property
    def done(self) -> bool:
        return bool(self._event.done)


class Cupy:
    """CUDA through CuPy. Work is ordered by CuPy's current stream."""

    def __init__(self) -> None:
        import cupy

        self.xp: Any = cupy

    def asarray(self, x: Any) -> Array:
        """See Device."""
        if isinstance(x, self.xp.ndarray):
            return x
        return self.xp.asarray(x) if hasattr(x, "__cuda_array_interface__") else self.xp.from_dlpack(x)

    def pinned(self, nbytes: int) -> Any:
        """See Device."""
        return np.frombuffer(self.xp.cuda.alloc_pinned_memory(max(nbytes, 1)), np.uint8, nbytes)

    def copy_out(self, host: Any, array: Array) -> Event:
        """See Device."""
        array.get(out=host, blocking=False)
        return self.record()

    def copy_in(self, array: Array, host: Any) -> Event:
        """See Device."""
        array.set(host)
        return self.record()

    def record(self) -> Event:
        """See Device."""
        event = self.xp.cuda.Event(disable_timing=True)
        event.record()
        return _CudaEvent(event)

    def capture(self) -> Surroundings:
        """See Device."""
        device, stream = self.xp.cuda.Device(), self.xp.cuda.get_current_stream()

        def enter() -> AbstractContextManager[Any]:
            stack = ExitStack()
            stack.enter_context(device)
            stack.enter_context(stream)
            return stack

        return enter


devices: dict[str, Callable[[], Device]] = {"cupy": Cupy}
"""Array type's top-level module -> its device."""

_made: dict[str, Device] = {}


def _device_named(name: str) -> Device:
    if name not in _made:
        _made[name] = devices[name]()
    return _made[name]


def _home(x: Any) -> str:
    return type(x).__module__.partition(".")[0]


def surroundings() -> Surroundings | None:
    """The calling thread's context, for the thread that runs its job; None while no device is in use."""
    captured = [device.capture() for device in _made.values()]
    if not captured:
        return None

    def enter() -> AbstractContextManager[Any]:
        stack = ExitStack()
        for each in captured:
            stack.enter_context(each())
        return stack

    return enter


def is_device(x: Any) -> bool:
    """Whether ``x`` is a device array (CuPy's, or a registered device's)."""
    return _home(x) in devices


def device_of(x: Array) -> Device | None:
    """The device that holds the array ``x``; None for host memory."""
    home = _home(x)
    return _device_named(home) if home in devices else None


def is_numeric(dtype: np.dtype[Any]) -> bool:
    """Whether bitring moves and reduces arrays of ``dtype``: numbers and bools in the machine's byte order."""
    return dtype in _NUMERIC


def require_numeric(dtype: np.dtype[Any], function: str, argument: str) -> None:
    """Raise TypeError, naming ``function`` and ``argument``, for a dtype that bitring does not reduce."""
    require_native(dtype, function, argument)
    if not is_numeric(dtype):
        raise TypeError(f"{function}: {argument} must have a numeric dtype; got {dtype}")


def require_native(dtype: np.dtype[Any], function: str, argument: str) -> None:
    """Raise TypeError, naming ``function`` and ``argument``, unless ``dtype`` has the machine's byte order."""
    if not dtype.isnative:
        raise TypeError(
            f"{function}: {argument} must have this machine's byte order; got {dtype}, whose bytes are swapped: "
            "x.astype(x.dtype.newbyteorder('=')) is a copy in the right order"
        )


def xp_of(x: Array) -> Any:
    """The array module of ``x``: ``numpy``, ``cupy``, or a registered device's."""
    device = device_of(x)
    return np if device is None else device.xp


_HOST_DLPACK = {1, 3}  # kDLCPU, kDLCUDAHost


def as_array(x: Any, function: str, argument: str) -> Array:
    """``x`` as an array, sharing its memory: NumPy and device arrays, the buffer protocol, DLPack, CUDA arrays.

    NumPy's subclasses become plain arrays of all their data: what a masked array hides is there, too. Memory that its
    owner does not let others write to (JAX's) is a read-only array. Raises TypeError, naming ``function`` and
    ``argument``, for anything else.
    """
    if isinstance(x, np.ndarray):
        return np.asarray(x)
    if is_device(x):
        return _device_named(_home(x)).asarray(x)
    if any(cls.__name__ == "Tracer" and cls.__module__.startswith("jax") for cls in type(x).__mro__):
        raise TypeError(
            f"{function}: {argument} is a JAX tracer, which has no values yet: call this outside of jax.jit and other "
            "transformations; bitring.jax has what works inside"
        )
    try:
        on_host = hasattr(x, "__dlpack_device__") and int(x.__dlpack_device__()[0]) in _HOST_DLPACK
    except Exception as error:  # each library has its own, for what has no memory or none that it can tell of
        raise TypeError(f"{function}: {argument} offers DLPack, but {error}") from error
    if not on_host and (hasattr(x, "__cuda_array_interface__") or hasattr(x, "__dlpack__")):
        if importlib.util.find_spec("cupy") is None:
            raise TypeError(
                f"{function}: {argument} is in device memory, which needs CuPy (pip install 'bitring[gpu]')"
            )
        return _device_named("cupy").asarray(x)
    if on_host:
        return _from_dlpack(x, function, argument)
    try:
        return np.asarray(memoryview(x))
    except TypeError:
        raise TypeError(
            f"{function}: {argument} must be a NumPy or CuPy array, or offer DLPack, __cuda_array_interface__ or the "
            f"buffer protocol; got {type(x).__name__}"
        ) from None


class _DLDataType(ctypes.Structure):
    """As in dlpack.h, where a DLTensor has it behind data (8 bytes), device (8) and ndim (4)."""

    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


_DTYPE_OFFSET = 20
_VERSIONED_HEADER_NBYTES = 32  # version, manager_ctx, deleter and flags of a DLManagedTensorVersioned
_INT_CODE, _BFLOAT_CODE = 0, 4

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.argtypes, _capsule_pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


class _Producer:
    """A DLPack producer that gives no copy, if it knows the word, and remembers what kind of capsule it gave.

    NumPy's DLPack knows no bfloat16: ``bfloat16`` says that the capsule, which had such values, tells of int16.
    """

    def __init__(self, x: Any) -> None:
        self._x = x
        self.versioned = False
        self.bfloat16 = False

    def __dlpack_device__(self) -> Any:
        return self._x.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        if "copy" in options:  # None would let a producer copy that cannot share
            options["copy"] = False
        capsule = self._x.__dlpack__(**options)
        self.versioned = "dltensor_versioned" in repr(capsule)
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        tensor = _capsule_pointer(capsule, name) + (_VERSIONED_HEADER_NBYTES if self.versioned else 0)
        dtype = _DLDataType.from_address(tensor + _DTYPE_OFFSET)
        self.bfloat16 = (dtype.code, dtype.bits, dtype.lanes) == (_BFLOAT_CODE, 16, 1)
        if self.bfloat16:
            dtype.code = _INT_CODE
        return capsule


class _Memory:
    """The memory of ``array``, writable."""

    def __init__(self, array: Any) -> None:
        self._array = array
        described = array.__array_interface__
        self.__array_interface__ = {**described, "data": (described["data"][0], False)}


def _from_dlpack(x: Any, function: str, argument: str) -> Any:
    producer = _Producer(x)
    try:
        array = np.from_dlpack(producer)
    except Exception as error:  # each library has its own; a tensor that requires a gradient is a RuntimeError
        raise TypeError(f"{function}: {argument} offers DLPack, but {error}") from error
    # Before version 1 a capsule could not say "read-only", and NumPy takes every such memory for that.
    if not (producer.versioned or array.flags.writeable or _is_immutable(x)):
        array = np.asarray(_Memory(array))
    return array.view(BFLOAT16) if producer.bfloat16 else array


def _is_immutable(x: Any) -> bool:
    """Whether ``x``, whose capsule cannot say so, must not be written to, as the buffer protocol or NumPy knows it."""
    try:
        return memoryview(x).readonly
    except TypeError:  # it has no such protocol
        return False
    except BufferError:  # it has, but not for such values: JAX's bfloat16
        return not np.asarray(x).flags.writeable


def memory_order(x: Array) -> str:
    """In which order the contiguous array ``x`` has its values; C, too, where at most one axis is longer than 1."""
    return "C" if x.flags.c_contiguous else "Fortran"


def flat_view(x: Array, function: str, argument: str, writable: bool) -> Array:
    """The contiguous array ``x`` as a 1-D view in memory order; no copy.

    Raises ValueError, naming ``function`` and ``argument``, when ``x`` is not contiguous, or read-only where
    ``writable`` is asked for.
    """
    if not (x.flags.c_contiguous or x.flags.f_contiguous):
        raise ValueError(
            f"{function}: {argument} must be contiguous; got an array of shape {tuple(x.shape)} with strides "
            f"{tuple(x.strides)}"
        )
    if writable and isinstance(x, np.ndarray) and not x.flags.writeable:
        raise ValueError(f"{function}: {argument} must be writable; got a read-only array")
    return x.reshape(-1) if x.flags.c_contiguous else x.T.reshape(-1)


def is_dense(x: Array) -> bool:
    """Whether the values of ``x`` fill its memory, in any order of axes, such as PyTorch's channels_last."""
    axes = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
    return bool(x.transpose(axes).flags.c_contiguous)


def bytes_of(x: Array) -> Array:
    """The 1-D contiguous array ``x`` as uint8, sharing memory."""
    return x.view(np.uint8)


def all_finite(x: Array) -> bool:
    """Whether the 1-D array ``x`` holds neither NaN nor Inf."""
    xp = xp_of(x)
    if x.dtype.kind == "f" and x.dtype.itemsize > 2:
        with np.errstate(all="ignore"):
            squares = xp.dot(x, x)  # one pass without a temporary; overflows for huge values, hence the second look
        if bool(xp.isfinite(squares)):
            return True
    return bool(xp.isfinite(x).all())
