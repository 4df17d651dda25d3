"""Transport of one message of a program: from and to host memory, device memory, or a device through pinned memory.

The only place where bitring waits for a device's stream: an event stands before every send of device memory and
after every copy or reduction into it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import Array, Device, Event, bytes_of, device_of
from bitring.collectives.execution.portable import execute
from bitring.collectives.interop.cuda_aware import cuda_aware
from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.tags import message_tag
from bitring.collectives.schedules.program import Program


class Transport:
    """A program bound to a communicator and, by ``bind``, to a buffer in host memory.

    ``buffer`` is a 1-D contiguous array of as many values as the program was compiled for. ``persistent`` keeps MPI's
    persistent requests between runs; it is for buffers that are bound once.
    """

    operation = None  # every message is Python's

    def __init__(
        self,
        comm: MPI.Intracomm,
        program: Program,
        dtype: np.dtype[Any],
        ufunc: str | None,
        channel: int,
        persistent: bool,
    ) -> None:
        self.program = program
        self._comm = comm
        self._rank = comm.Get_rank()
        self._dtype = dtype
        self._ufunc_name = ufunc
        self._channel = channel
        self._persistent = persistent
        self._requests: dict[int, MPI.Prequest] = {}
        self._scratch: dict[int, Array] = {}
        self.nbytes_sent = program.values_sent * dtype.itemsize
        self.scratch_nbytes = len(program.slots) * program.slot_values * dtype.itemsize

    def bind(self, buffer: Array) -> None:
        """Work on ``buffer`` from now on."""
        xp = self._xp(buffer)
        self._buffer = buffer
        self._bytes = bytes_of(buffer)
        self._ufunc = getattr(xp, self._ufunc_name) if self._ufunc_name else None
        if not self._scratch:
            self._scratch = {slot: xp.empty(self.program.slot_values, self._dtype) for slot in self.program.slots}

    def unbind(self) -> None:
        """Forget the buffer."""
        del self._buffer, self._bytes

    def steps(self, progress: Progress) -> Steps:
        """Run the program once on the buffer."""
        return execute(self, progress)

    def _xp(self, buffer: Array) -> Any:
        return np

    def prepare(self, index: int) -> Event | None:
        """Start the device's part before ``begin``: an event to wait for, None where there is none."""
        return None

    def begin(self, index: int) -> MPI.Request:
        """Start sending or receiving the message."""
        if self._persistent:
            if index not in self._requests:
                self._requests[index] = self._request(index, persistent=True)
            self._requests[index].Start()
            return self._requests[index]
        request: MPI.Request = self._request(index, persistent=False)
        return request

    def _request(self, index: int, persistent: bool) -> Any:
        m = self.program.messages[index]
        tag = message_tag(self._channel, m.sequence)
        memory = self._memory(index)
        comm = self._comm
        if m.sends:
            return comm.Send_init(memory, m.peer, tag) if persistent else comm.Isend(memory, m.peer, tag)
        return comm.Recv_init(memory, m.peer, tag) if persistent else comm.Irecv(memory, m.peer, tag)

    def _memory(self, index: int) -> Any:
        """The memory that MPI sends from or receives into, as bytes."""
        m = self.program.messages[index]
        if m.slot >= 0:
            return bytes_of(self._scratch[m.slot][: m.stop - m.start])
        itemsize = self._dtype.itemsize
        return self._bytes[m.start * itemsize : m.stop * itemsize]

    def apply(self, index: int) -> Event | None:
        """Take over a received message: reduce or copy what came into scratch."""
        m = self.program.messages[index]
        if m.slot < 0:
            return None
        mine = self._buffer[m.start : m.stop]
        theirs = self._scratch[m.slot][: m.stop - m.start]
        if m.reduces:
            assert self._ufunc is not None
            lower, upper = (theirs, mine) if m.peer < self._rank else (mine, theirs)
            with np.errstate(all="ignore"):  # overflow and NaN are passed on, as MPI does
                self._ufunc(lower, upper, out=mine)
        else:
            mine[:] = theirs
        return None

    def release(self, index: int) -> None:
        """End the message."""

    def close(self) -> None:
        """Free the persistent requests."""
        while self._requests:
            self._requests.popitem()[1].Free()


class CudaAwareTransport(Transport):
    """Device memory handed to the MPI library as it is."""

    def __init__(self, device: Device, *args: Any) -> None:
        super().__init__(*args)
        self._device = device

    def _xp(self, buffer: Array) -> Any:
        return self._device.xp

    def prepare(self, index: int) -> Event | None:
        """Record an event: the stream's earlier work may still write values to send, or read those to be replaced."""
        return self._device.record() if self.program.messages[index].slot < 0 else None

    def apply(self, index: int) -> Event | None:
        """Reduce or copy on the device."""
        super().apply(index)
        return self._device.record() if self.program.messages[index].slot >= 0 else None


class StagedTransport(Transport):
    """Device memory sent and received through pinned host memory, segment by segment, copies overlapping messages."""

    def __init__(self, device: Device, *args: Any) -> None:
        super().__init__(*args)
        self._device = device
        self._persistent = False  # a message's staging memory changes from run to run
        self._free: list[Any] = []
        self._staging: dict[int, Any] = {}
        self._nbytes = max((m.stop - m.start for m in self.program.messages), default=0) * self._dtype.itemsize

    def _xp(self, buffer: Array) -> Any:
        return self._device.xp

    def _memory(self, index: int) -> Any:
        m = self.program.messages[index]
        if index not in self._staging:
            self._staging[index] = self._free.pop() if self._free else self._device.pinned(self._nbytes)
        return self._staging[index][: (m.stop - m.start) * self._dtype.itemsize]

    def prepare(self, index: int) -> Event | None:
        """Copy the values to send out of the device."""
        m = self.program.messages[index]
        if not m.sends:
            return None
        return self._device.copy_out(self._memory(index).view(self._dtype), self._buffer[m.start : m.stop])

    def apply(self, index: int) -> Event | None:
        """Copy what came in to the device, and reduce there."""
        m = self.program.messages[index]
        into = self._scratch[m.slot][: m.stop - m.start] if m.reduces else self._buffer[m.start : m.stop]
        copied = self._device.copy_in(into, self._memory(index).view(self._dtype))
        if not m.reduces:
            return copied
        super().apply(index)
        return self._device.record()

    def release(self, index: int) -> None:
        """Give the staging memory to the next message."""
        if index in self._staging:
            self._free.append(self._staging.pop(index))


def make_transport(
    comm: MPI.Intracomm, program: Program, buffer: Array, ufunc: str | None, channel: int, persistent: bool
) -> Transport:
    """The transport for where ``buffer`` lives, bound to it."""
    device = device_of(buffer)
    args = (comm, program, buffer.dtype, ufunc, channel, persistent)
    if device is None:
        transport = Transport(*args)
    elif cuda_aware():
        transport = CudaAwareTransport(device, *args)
    else:
        transport = StagedTransport(device, *args)
    transport.bind(buffer)
    return transport
