"""The native executor: programs run by the extension over the MPI library's point-to-point calls, without Python.

For one schedule it gives the bits of the portable executor (``portable.py``), its reference.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import Array
from bitring.collectives.interop.mpi_library import library_functions
from bitring.collectives.interop.steps import Progress, Steps, run
from bitring.collectives.runtime.tags import message_tag
from bitring.collectives.schedules.program import WINDOW, Program
from bitring.native import address_of, extension, kernel, native


def _ragged(lists: Iterable[Iterable[int]]) -> tuple[Any, Any]:
    """Lists as one array of where each starts, and one of their values."""
    parts = [list(each) for each in lists]
    starts = np.cumsum([0, *map(len, parts)], dtype=np.int64)
    return starts, np.array([value for part in parts for value in part], np.int64)


class NativeTransport:
    """A program bound to a communicator and, by ``bind``, to a buffer in host memory; a Runner."""

    def __init__(
        self, comm: MPI.Intracomm, program: Program, dtype: np.dtype[Any], ufunc: str | None, channel: int
    ) -> None:
        self.nbytes_sent = program.values_sent * dtype.itemsize
        tags = [message_tag(channel, m.sequence) for m in program.messages]
        columns = [
            tags if name == "tag" else list(map(attrgetter(name), program.messages))
            for name in extension.Program.message_fields
        ]
        slots = max(program.slots, default=-1) + 1
        self.scratch_nbytes = slots * program.slot_values * dtype.itemsize
        unblocks_starts, unblocks = _ragged(program.unblocks)
        streams_starts, streams = _ragged(program.streams)
        self.operation = extension.Execution(
            extension.Program(
                messages=np.ascontiguousarray(np.array(columns, np.int64).T),
                unblocks_starts=unblocks_starts,
                unblocks=unblocks,
                streams_starts=streams_starts,
                streams=streams,
                slots=slots,
                slot_values=program.slot_values,
                window=WINDOW,
            ),
            library=library_functions(),
            handle_size=MPI._sizeof(MPI.Comm),
            comm=MPI._handleof(comm),
            byte=MPI._handleof(MPI.BYTE),
            rank=comm.Get_rank(),
            itemsize=dtype.itemsize,
            kernel=kernel(ufunc, dtype),
        )
        self._comm = comm
        self._buffer: Array = None

    def bind(self, buffer: Array) -> None:
        """Work on ``buffer``, a 1-D contiguous array of as many values as the program was compiled for."""
        self._buffer = buffer
        self.bind_at(address_of(buffer))

    def bind_at(self, address: int) -> None:
        """As ``bind``, on memory that the caller keeps."""
        self.operation.bind(address, address)

    def unbind(self) -> None:
        """Forget the buffer."""
        self._buffer = None

    def steps(self, progress: Progress) -> Steps:
        """Run the program once."""
        yield from run(self.operation, progress)

    def close(self) -> None:
        """Do nothing: no MPI requests are kept."""


def _outcome(name: str) -> Any:
    return name if native() is None else extension.Outcome[name].value


DONE, DECLINED, REFUSED, UNFINISHED = map(_outcome, ("done", "declined", "refused", "unfinished"))
"""Outcomes of a run past the engine. After any but the first three it has begun, and the engine takes it further."""

ALONE_SECONDS = 0.2
"""A run past the engine that waits for longer is handed to it, which looks for ranks that are gone."""


def may_run_past_engine(operation: Any) -> bool:
    """Whether an operation may be run by the thread that calls: another thread's may be in the MPI library."""
    return operation is not None and (not operation.calls_library or MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def served(dtype: np.dtype[Any], ufunc: str | None, reduces: bool) -> bool:
    """Whether the extension is there and has what a collective needs."""
    return native() is not None and (not reduces or kernel(ufunc, dtype) != 0)
