"""The MPI library's own AllReduce, as a runner. It is not the blocking one, so that ranks that are gone are noticed."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from bitring.arrays import Array, device_of
from bitring.collectives.execution.runner import Task
from bitring.collectives.interop.mpi_library import library_functions
from bitring.collectives.interop.steps import Progress, Steps, run, wait_for
from bitring.collectives.runtime.context import Context
from bitring.native import address_of, extension, native

_MOST_VALUES = 2**31 - 1
"""Of one call of the native operation, which counts in an int."""


class LibraryRunner:
    """The library's AllReduce of the buffer in place."""

    scratch_nbytes = 0

    def __init__(self, context: Context, task: Task) -> None:
        assert task.collective == "allreduce"
        self._comm = context.comm
        self._size = context.size
        self._op = task.op
        self.nbytes_sent = 2 * task.flat.nbytes * (context.size - 1) // context.size
        self.operation: Any = None
        if native() is not None and device_of(task.flat) is None and task.flat.size <= _MOST_VALUES:
            self.operation = extension.LibraryAllreduce.make(
                library=library_functions(),
                handle_size=MPI._sizeof(MPI.Comm),
                comm=MPI._handleof(context.comm),
                datatype=MPI._handleof(MPI.Datatype.fromcode(task.flat.dtype.char)),
                op=MPI._handleof(task.op),
                in_place=int(MPI.IN_PLACE),
                count=task.flat.size,
            )
        self.bind(task.flat)

    def bind(self, buffer: Array) -> None:
        """See Runner."""
        self._buffer = buffer
        if self.operation is not None:
            self.operation.bind(address_of(buffer))

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
            progress.exchanging = True
            yield from wait_for(self._comm.Iallreduce(MPI.IN_PLACE, self._buffer, self._op), progress)
            progress.exchanging = False

    def close(self) -> None:
        """See Runner."""
