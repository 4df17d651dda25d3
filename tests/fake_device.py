"""A device over host memory, with a stream whose work is done LATE.

Copies and ufuncs are queued; they are performed when an event behind them has been polled a few times, and not
before, so that a forgotten synchronisation reads or sends old values. Ufuncs and slices are queued like copies.
``__cuda_array_interface__`` gives the host pointer, so that mpi4py takes a :class:`DeviceArray` as it would a CUDA
array; conversion to NumPy raises, as CuPy's does.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

POLLS = 3
"""How often an event is asked before the work in front of it is performed."""


class Stream:
    """Work in order. ``ended`` counts what has been performed, ``asked`` all there ever was."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], object]] = deque()
        self.asked = self.ended = 0
        self._lock = threading.RLock()  # the progress thread asks for work and waits for it, too

    def ask(self, work: Callable[[], object]) -> None:
        with self._lock:
            self.queue.append(work)
            self.asked += 1

    def perform(self, until: int) -> None:
        with self._lock, np.errstate(all="ignore"):
            while self.ended < until:
                self.queue.popleft()()
                self.ended += 1

    def synchronize(self) -> None:
        self.perform(self.asked)


stream = Stream()


class Current(threading.local):
    """What stands for CUDA's current device and stream, which each thread has for itself."""

    def __init__(self) -> None:
        self.name = "user's" if threading.current_thread() is threading.main_thread() else "another thread's"


current = Current()


class Event:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._behind = stream.asked
        self._polls = 0

    @property
    def done(self) -> bool:
        self._polls += 1
        if self._polls > POLLS:
            self._stream.perform(self._behind)
        return self._stream.ended >= self._behind


class DeviceArray:
    """Values in device memory. ``get`` waits for the stream, nothing else does."""

    def __init__(self, memory: np.ndarray, stream: Stream = stream) -> None:
        self._memory = memory
        self.stream = stream

    def get(self) -> np.ndarray:
        self.stream.synchronize()
        return self._memory.copy()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("implicit conversion of a device array to NumPy")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        described = self._memory.__array_interface__
        return {"version": 0, **{key: described[key] for key in ("shape", "typestr", "data", "strides")}}

    dtype = property(lambda self: self._memory.dtype)
    shape = property(lambda self: self._memory.shape)
    ndim = property(lambda self: self._memory.ndim)
    size = property(lambda self: self._memory.size)
    nbytes = property(lambda self: self._memory.nbytes)
    flags = property(lambda self: self._memory.flags)
    strides = property(lambda self: self._memory.strides)
    itemsize = property(lambda self: self._memory.itemsize)
    T = property(lambda self: DeviceArray(self._memory.T, self.stream))

    def __len__(self) -> int:
        return len(self._memory)

    def view(self, dtype: Any) -> DeviceArray:
        return DeviceArray(self._memory.view(dtype), self.stream)

    def reshape(self, *shape: Any) -> DeviceArray:
        return DeviceArray(self._memory.reshape(*shape), self.stream)

    def __getitem__(self, part: Any) -> DeviceArray:
        return DeviceArray(self._memory[part], self.stream)

    def __setitem__(self, part: Any, values: Any) -> None:
        assert isinstance(values, (DeviceArray, int, float)), "a host array was assigned to device memory"
        source = values._memory if isinstance(values, DeviceArray) else values
        target = self._memory

        def assign() -> None:
            target[part] = source

        self.stream.ask(assign)

    def _in_place(self, ufunc: Any, other: Any) -> DeviceArray:
        given = other._memory if isinstance(other, DeviceArray) else other
        self.stream.ask(lambda: ufunc(self._memory, given, out=self._memory))
        return self

    def __iadd__(self, other: Any) -> DeviceArray:
        return self._in_place(np.add, other)

    def __isub__(self, other: Any) -> DeviceArray:
        return self._in_place(np.subtract, other)

    def __imul__(self, other: Any) -> DeviceArray:
        return self._in_place(np.multiply, other)

    def sum(self, dtype: Any) -> DeviceArray:
        made = empty((), dtype)
        self.stream.ask(lambda: np.sum(self._memory, dtype=dtype, out=made._memory))
        return made


ndarray = DeviceArray


def zeros_like(x: DeviceArray) -> DeviceArray:
    made = empty(x.shape, x.dtype)
    made[...] = 0
    return made


def empty_like(x: DeviceArray) -> DeviceArray:
    return empty(x.shape, x.dtype)


def concatenate(arrays: Sequence[DeviceArray], axis: None, out: DeviceArray | None = None) -> DeviceArray:
    assert axis is None
    made = empty(sum(x.size for x in arrays), arrays[0].dtype) if out is None else out
    parts = [x._memory for x in arrays]
    stream.ask(lambda: np.concatenate(parts, axis=None, out=made._memory))
    return made


def empty(shape: Any, dtype: Any = np.float64) -> DeviceArray:
    return DeviceArray(np.full(shape, 77).astype(dtype))


def array(values: np.ndarray, stream: Stream = stream) -> DeviceArray:
    """A device array that holds ``values``: only when the stream has come to it."""
    made = DeviceArray(np.full(values.shape, 55).astype(values.dtype), stream)
    source = values.copy()

    def fill() -> None:
        made._memory[...] = source

    stream.ask(fill)
    return made


def __getattr__(name: str) -> Any:
    """NumPy's ufuncs, queued."""
    ufunc = getattr(np, name)
    if not isinstance(ufunc, np.ufunc):
        raise AttributeError(name)

    def queued(a: DeviceArray, b: Any, out: DeviceArray, **how: Any) -> DeviceArray:
        given = b._memory if isinstance(b, DeviceArray) else b
        out.stream.ask(lambda: ufunc(a._memory, given, out=out._memory, **how))
        return out

    return queued


class FakeDevice:
    """bitring's Device interface."""

    xp: Any = sys.modules[__name__]

    def __init__(self, stream: Stream = stream) -> None:
        self._stream = stream

    def asarray(self, x: Any) -> DeviceArray:
        assert isinstance(x, DeviceArray)
        return x

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.full(nbytes, 33, np.uint8)

    def copy_out(self, host: np.ndarray, array: DeviceArray) -> Event:
        assert isinstance(host, np.ndarray) and host.dtype == array.dtype and host.size == array.size
        self._stream.ask(lambda: np.copyto(host, array._memory))
        return Event(self._stream)

    def copy_in(self, array: DeviceArray, host: np.ndarray) -> Event:
        assert isinstance(host, np.ndarray) and host.dtype == array.dtype and host.size == array.size
        self._stream.ask(lambda: np.copyto(array._memory, host))
        return Event(self._stream)

    def record(self) -> Event:
        assert current.name == "user's", "the device is used outside of the surroundings of the thread that asked"
        return Event(self._stream)

    def capture(self) -> Any:
        name = current.name

        @contextlib.contextmanager
        def enter() -> Any:
            before, current.name = current.name, name
            yield
            current.name = before

        return enter
