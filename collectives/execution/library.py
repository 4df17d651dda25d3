"""The MPI library's own AllReduce, as a runner. It is not the blocking one, so that ranks that are gone are noticed."""

from __future__ import annotations

from mpi4py import MPI

from bitring.arrays import Array
from bitring.collectives.execution.runner import Task
from bitring.collectives.interop.steps import Progress, Steps, wait_for
from bitring.collectives.runtime.context import State


class LibraryRunner:
    """The library's AllReduce of the buffer in place."""

    scratch_nbytes = 0
    operation = None

    def __init__(self, state: State, task: Task) -> None:
        assert task.collective == "allreduce"
        self._comm = state.comm
        self._size = state.size
        self._op = task.op
        self.nbytes_sent = 2 * task.flat.nbytes * (state.size - 1) // state.size
        self.bind(task.flat)

    def bind(self, buffer: Array) -> None:
        """See Runner."""
        self._buffer = buffer

    def unbind(self) -> None:
        """See Runner."""
        self._buffer = None

    def steps(self, progress: Progress) -> Steps:
        """See Runner."""
        if self._size > 1:
            progress.exchanging = True
            yield from wait_for(self._comm.Iallreduce(MPI.IN_PLACE, self._buffer, self._op), progress)
            progress.exchanging = False

    def close(self) -> None:
        """See Runner."""
