"""What runs an algorithm's collective on a buffer: an executor a schedule, or the native engine one of its own ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mpi4py import MPI

from bitring.arrays import Array, device_of
from bitring.collectives.execution.native import NativeTransport, served
from bitring.collectives.execution.transport import make_transport
from bitring.collectives.interop.library_steps import allgather_steps
from bitring.collectives.interop.operators import op_name, ufunc_name
from bitring.collectives.interop.steps import Progress, Steps, StepsTo, run
from bitring.collectives.runtime.context import State
from bitring.collectives.runtime.objects import jointly
from bitring.collectives.runtime.tags import channel_of
from bitring.collectives.schedules.program import compile_program
from bitring.collectives.schedules.schedule import algorithms, rounds
from bitring.collectives.selection.selection import segment_values
from bitring.native import address_of, kernel, native


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
        """Give back what is MPI's."""
        ...


def make_runner(
    state: State,
    collective: str,
    algorithm: str,
    flat: Array,
    op: MPI.Op = MPI.SUM,
    root: int = 0,
    number: int = 0,
    signature: int = 0,
) -> Runner:
    """A runner of ``algorithm``, as it was chosen, bound to ``flat``. Collective for ``multilane``, else local.

    ``number``: the plan's that it is for, whose buffer stays the same; 0 for a call without one. ``signature``: what
    tells a run of the plan from those of others.
    """
    channel = channel_of(number)
    if algorithm == "shared_memory":
        return SharedRunner(state, flat, op, signature)
    if algorithm == "multilane":

        def ring(comm: MPI.Intracomm, values: Array) -> Runner:
            state.lane.meets(comm)
            return schedule_runner(comm, "allreduce", "ring", values, op, 0, channel, persistent=True)

        runner = lane_runner(state, flat, op, signature, ring, persistent=number > 0)
        if runner is not None:
            return runner
        algorithm = "ring"
    return schedule_runner(state.comm, collective, algorithm, flat, op, root, channel, persistent=number > 0)


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
    segment = segment_values(flat.nbytes, flat.dtype.itemsize, made.chunks(size))
    schedule = rounds(made, collective, comm.Get_rank(), size, root)
    program = compile_program(schedule, made.chunks(size), flat.size, segment)
    if not is_native:
        portable: Runner = make_transport(comm, program, flat, ufunc, channel, persistent)
        return portable
    runner = NativeTransport(comm, program, flat.dtype, ufunc, channel)
    runner.bind(flat)
    return runner


class SharedRunner:
    """The reduction of the ranks' buffers through their shared memory."""

    scratch_nbytes = 0

    def __init__(self, state: State, flat: Array, op: MPI.Op, signature: int) -> None:
        assert state.common is not None
        self._shared = state.common
        self._kernel = kernel(ufunc_name(op, flat.dtype), flat.dtype)
        assert self._kernel, f"no kernel for {op_name(op)} of {flat.dtype}"
        self._signature = signature
        module = native()
        small = flat.nbytes <= module.SharedAllreduce.small(state.size)
        self.nbytes_sent = (state.size - 1) * flat.nbytes // (1 if small else state.size) * (1 if small else 2)
        self.bind(flat)

    def bind(self, buffer: Array) -> None:
        """See Runner."""
        module = native()
        self._buffer = buffer
        self.pieces = [(address_of(buffer), buffer.size, buffer.itemsize, self._kernel)]
        self.operation = module.SharedAllreduce(
            self._shared.node, self._signature, self.pieces, self._shared.region_of(buffer)
        )

    def unbind(self) -> None:
        """See Runner."""
        self._buffer = self.operation = None

    def steps(self, progress: Progress) -> Steps:
        """See Runner."""
        yield from run(self.operation, progress)

    def close(self) -> None:
        """See Runner."""


class LaneRunner:
    """The reduction inside the nodes, between them in parallel lanes, and inside them again."""

    def __init__(
        self, state: State, region: Any, lane: Runner | None, flat: Array, op: MPI.Op, signature: int, staged: bool
    ) -> None:
        assert state.shared is not None
        self._state = state
        self._node = state.shared.node
        self._region = region
        self._lane = lane
        self._kernel = kernel(ufunc_name(op, flat.dtype), flat.dtype)
        assert self._kernel, f"no kernel for {op_name(op)} of {flat.dtype}"
        self._signature = signature
        inside = state.node.size
        self.scratch_nbytes = region.nbytes if staged else 0
        self.nbytes_sent = 2 * (inside - 1) * flat.nbytes // inside + (0 if lane is None else lane.nbytes_sent)
        self.bind(flat)

    def bind(self, buffer: Array) -> None:
        """See Runner."""
        module = native()
        self._buffer = buffer
        self.operation = module.LaneAllreduce(
            self._node,
            self._signature,
            address_of(buffer),
            buffer.size,
            buffer.itemsize,
            self._kernel,
            self._region,
            self._state.topology.lanes,
            None if self._lane is None else self._lane.operation,
        )
        if self._lane is not None:
            self._lane.operation.bind(self.operation.lane_values)

    def unbind(self) -> None:
        """See Runner."""
        self._buffer = self.operation = None

    def steps(self, progress: Progress) -> Steps:
        """See Runner."""
        yield from run(self.operation, progress)

    def close(self) -> None:
        """See Runner."""


def lane_runner(
    state: State,
    flat: Array,
    op: MPI.Op,
    signature: int,
    between: Callable[[MPI.Intracomm, Array], Runner],
    persistent: bool,
) -> LaneRunner | None:
    """A runner of a node's exact reduction, and of one ``between`` nodes in each lane. Collective.

    ``between`` makes a runner with a native operation, which is bound later, for the communicator of a lane and an
    array such as its values. None on all ranks where some node has no room for the values.
    """
    module, shared, node = native(), state.shared, state.node
    assert module is not None and shared is not None

    def common(progress: Progress) -> StepsTo[tuple[Any, bool]]:
        """A region of all ranks of the node, and whether it is there to stage the values in."""
        region = shared.region_of(flat) if persistent else None
        place = 0 if region is None else region.where(address_of(flat))
        places = yield from allgather_steps(node.comm, place, progress)
        staged = region is None or places.count(places[0]) < len(places)
        if staged:
            region = yield from shared.new_region(node.comm, flat.nbytes, progress)
        everywhere = yield from allgather_steps(state.comm, region is not None, progress)
        return region if all(everywhere) else None, staged

    region, staged = jointly(state, common, "multilane")
    if region is None:
        return None
    lane = None
    if state.lane_comm != MPI.COMM_NULL:
        lane = between(state.lane_comm, flat[slice(*lane_extent(state, flat.size))])
    return LaneRunner(state, region, lane, flat, op, signature, staged)


def lane_extent(state: State, n: int) -> tuple[int, int]:
    """Of n values those in this rank's lane: the first, and the one after the last."""
    lanes, number = state.topology.lanes, state.node.rank
    if number >= lanes:
        return n, n
    start = native().LaneAllreduce.chunk_start
    return start(n, lanes, number), start(n, lanes, number + 1)
