"""The MPI library's own AllReduce, as a runner. It is not the blocking one, so that ranks that are gone are noticed."""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import Array, device_of
from bitring.collectives.execution.runner import Task
from bitring.collectives.interop.mpi_library import library_functions
from bitring.collectives.interop.steps import Progress, Steps, run, wait_for
from bitring.collectives.runtime.context import Context
from bitring.native import address_of, extension, native

MOST_VALUES = 2**31 - 1
"""Of one call of the native operation, which counts in an int."""


def native_call(
    comm: MPI.Intracomm, collective: str, dtype: np.dtype[Any], count: int, op: MPI.Op = MPI.OP_NULL, root: int = 0
) -> Any:
    """A native operation: the library's own call, begun and then asked about. ``count``: of values, or of a block's."""
    return extension.LibraryCollective.make(
        library=library_functions(),
        handle_size=MPI._sizeof(MPI.Comm),
        collective=extension.Collective[collective],
        comm=MPI._handleof(comm),
        datatype=MPI._handleof(MPI.Datatype.fromcode(dtype.char)),
        op=MPI._handleof(op),
        in_place=int(MPI.IN_PLACE),
        count=count,
        root=root,
    )


class LibraryRunner:
    """The library's AllReduce of the buffer in place; a plan's is a persistent request."""

    scratch_nbytes = 0

    def __init__(self, context: Context, task: Task) -> None:
        assert task.collective == "allreduce"
        flat = task.flat
        self._comm = context.comm
        self._size = context.size
        self._op = task.op
        self._request: MPI.Prequest | None = None
        self.nbytes_sent = 2 * flat.nbytes * (context.size - 1) // context.size
        self.operation: Any = None
        self._buffer = flat
        self._under_way = False
        if device_of(flat) is not None or flat.size > MOST_VALUES or context.size == 1:
            return
        if task.persistent:  # without the native engine, too, which other ranks may have: no other call matches it
            self._request = context.comm.Allreduce_init(MPI.IN_PLACE, flat, task.op)
        if native() is None:
            return
        if self._request is not None:
            self.operation = extension.LibraryCollective.persistent(
                library_functions(), MPI._sizeof(MPI.Comm), MPI._handleof(self._request)
            )
        else:
            self.operation = native_call(context.comm, "allreduce", flat.dtype, flat.size, task.op)
            self.bind(flat)

    def bind(self, buffer: Array) -> None:
        """See Runner."""
        self._buffer = buffer
        if self.operation is not None:
            self.operation.bind(address_of(buffer), address_of(buffer))

    def unbind(self) -> None:
        """See Runner."""
        self._buffer = None

    def steps(self, progress: Progress) -> Steps:
        """See Runner."""
        if self._size == 1:
            return
        if self.operation is not None:
            yield from run(self.operation, progress)
        else:
            progress.exchanging = self._under_way = True
            request: MPI.Request | None = self._request
            if self._request is not None:
                self._request.Start()
            else:
                request = self._comm.Iallreduce(MPI.IN_PLACE, self._buffer, self._op)
            assert request is not None
            yield from wait_for(request, progress)
            progress.exchanging = self._under_way = False

    def close(self) -> None:
        """See Runner."""
        over = not self._under_way if self.operation is None else self.operation.over
        if self._request is not None and over:  # else it was cut short, and the library goes on
            self._request.Free()
        self._request = self.operation = None
