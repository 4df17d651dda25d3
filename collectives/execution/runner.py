"""Runners of collectives on a buffer: an executor runs an algorithm's schedule, unless the algorithm names a runner."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any, NamedTuple, Protocol

from mpi4py import MPI

from bitring.arrays import Array, device_of
from bitring.collectives.execution.native import NativeTransport, served
from bitring.collectives.execution.transport import make_transport
from bitring.collectives.interop.operators import ufunc_name
from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.tags import channel_of
from bitring.collectives.schedules.program import compile_program
from bitring.collectives.schedules.schedule import algorithms, rounds
from bitring.collectives.selection.selection import segment_values


class Runner(Protocol):
    """A collective that can be run again and again on the buffer that it is bound to."""

    nbytes_sent: int
    """Bytes that one run sends to other ranks."""

    scratch_nbytes: int
    """Memory that it keeps."""

    operation: Any
    """The native operation that is a run; None where Python takes part."""

    def bind(self, buffer: Array) -> None:
        """Work on ``buffer`` from now on, which is like the one that it was made for."""
        ...

    def unbind(self) -> None:
        """Forget the buffer."""
        ...

    def steps(self, progress: Progress) -> Steps:
        """One run."""
        ...

    def close(self) -> None:
        """Free its MPI requests."""
        ...


class OperandRunner(Runner, Protocol):
    """A runner of an algorithm whose small plans travel as pieces."""

    operands: list[tuple[int, int, int, int]]
    """The arrays that one run reduces, as the native engine takes them: address, values, bytes per value, kernel."""


class SelfCheckingRunner(Runner, Protocol):
    """A runner of an algorithm whose runs are roll calls, too."""

    def signed(self, signature: int) -> Any:
        """Its native operation, for one run in which ranks find out that all mean ``signature``."""
        ...


class Task(NamedTuple):
    """The task of a runner: ``collective`` on ``flat``, 1-D, under ``op``, from or to ``root``.

    ``number``: the plan's, whose buffer stays the same; 0 for a call without a plan. ``signature``: a hash that tells
    the plan's runs from those of others.
    """

    collective: str
    flat: Array
    op: MPI.Op = MPI.SUM
    root: int = 0
    number: int = 0
    signature: int = 0

    @property
    def channel(self) -> int:
        """The channel of its messages."""
        return channel_of(self.number)

    @property
    def persistent(self) -> bool:
        """Whether the buffer stays the same."""
        return self.number > 0


MakeRunner = Callable[[Context, Task], Runner]
"""Makes a runner of an algorithm that is not run by its schedule. ``Algorithm.runner`` names one."""


def make_runner(context: Context, algorithm: str, task: Task) -> Runner:
    """A runner of ``algorithm``, as it was chosen. Collective for an algorithm that needs setting up, else local."""
    named = algorithms.get(algorithm).runner
    if named is not None:
        make: MakeRunner = resolve_name(named)
        return make(context, task)
    return schedule_runner(
        context.comm, task.collective, algorithm, task.flat, task.op, task.root, task.channel, task.persistent
    )


def schedule_runner(
    comm: MPI.Intracomm,
    collective: str,
    algorithm: str,
    flat: Array,
    op: MPI.Op,
    root: int,
    channel: int,
    persistent: bool,
) -> Runner:
    """A runner of ``algorithm``'s schedule: native for host memory, where that is to be had."""
    made, size = algorithms.get(algorithm)(), comm.Get_size()
    ufunc = ufunc_name(op, flat.dtype)
    reduces = collective in ("allreduce", "reduce", "reduce_scatter")
    is_native = device_of(flat) is None and served(flat.dtype, ufunc, reduces)
    segment = segment_values(flat.nbytes, flat.dtype.itemsize)
    schedule = rounds(made, collective, comm.Get_rank(), size, root)
    program = compile_program(schedule, made.chunks(size), flat.size, segment)
    if not is_native:
        portable: Runner = make_transport(comm, program, flat, ufunc, channel, persistent)
        return portable
    runner = NativeTransport(comm, program, flat.dtype, ufunc, channel)
    runner.bind(flat)
    return runner
