"""AllReduce across nodes in parallel lanes: by the native engine, with a runner between the nodes in each lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from mpi4py import MPI

from bitring.arrays import Array
from bitring.collectives.algorithms.multilane import Multilane
from bitring.collectives.execution.runner import Runner, Task, make_runner, schedule_runner
from bitring.collectives.interop.library_steps import allgather_steps
from bitring.collectives.interop.operators import op_name, ufunc_name
from bitring.collectives.interop.steps import Progress, Steps, StepsTo, run
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.objects import agreed_job
from bitring.native import address_of, extension, kernel


def make_multilane(context: Context, task: Task) -> Runner:
    """A runner of the lanes; of what goes between nodes, among all ranks, where a node has no room. Collective."""

    def between(comm: MPI.Intracomm, values: Array) -> Lane:
        context.queue.meets(comm)
        made = schedule_runner(comm, "allreduce", Multilane.between, values, task.op, 0, task.channel, persistent=True)
        return cast(Lane, made)  # the native one

    runner = lane_runner(context, task.flat, task.op, task.signature, between, task.persistent)
    return make_runner(context, Multilane.between, task) if runner is None else runner


class Lane(Runner, Protocol):
    """What goes between nodes, on memory that is there later."""

    def bind_at(self, address: int) -> None:
        """Work on the values at ``address`` from now on."""
        ...


class LaneRunner:
    """The reduction inside the nodes, between them in parallel lanes, and inside them again."""

    def __init__(
        self, context: Context, region: Any, lane: Lane | None, flat: Array, op: MPI.Op, signature: int, staged: bool
    ) -> None:
        assert context.shared is not None
        self._lane = lane
        reduces = kernel(ufunc_name(op, flat.dtype), flat.dtype)
        assert reduces, f"no kernel for {op_name(op)} of {flat.dtype}"
        inside = context.node.size
        self.scratch_nbytes = region.nbytes if staged else 0
        self.nbytes_sent = 2 * (inside - 1) * flat.nbytes // inside + (0 if lane is None else lane.nbytes_sent)
        self._buffer = flat
        self.operation = extension.LaneAllreduce(
            context.shared.node,
            signature,
            address_of(flat),
            flat.size,
            flat.itemsize,
            reduces,
            region,
            context.topology.lanes,
            None if lane is None else lane.operation,
        )
        if lane is not None:
            lane.bind_at(self.operation.lane_values)

    def bind(self, buffer: Array) -> None:
        """See Runner; for a call without a plan."""
        self._buffer = buffer
        self.operation.bind(address_of(buffer), address_of(buffer))

    def unbind(self) -> None:
        """See Runner."""
        self._buffer = None

    def steps(self, progress: Progress) -> Steps:
        """See Runner."""
        yield from run(self.operation, progress)

    def close(self) -> None:
        """See Runner."""


def lane_runner(
    context: Context,
    flat: Array,
    op: MPI.Op,
    signature: int,
    between: Callable[[MPI.Intracomm, Array], Lane],
    persistent: bool,
) -> LaneRunner | None:
    """A runner of a node's exact reduction, and of one ``between`` nodes in each lane. Collective.

    ``between`` makes a runner with a native operation for the communicator of a lane and an array such as its values.
    None on all ranks where some node has no room for the values.
    """
    shared, node = context.shared, context.node
    assert shared is not None

    def common(progress: Progress) -> StepsTo[tuple[Any, bool]]:
        """A region of all ranks of the node, and whether it is there to stage the values in."""
        region = shared.region_of(flat) if persistent else None
        place = 0 if region is None else region.where(address_of(flat))
        places = yield from allgather_steps(node.comm, place, progress)
        staged = region is None or places.count(places[0]) < len(places)
        if staged:
            region = yield from shared.new_region(node.comm, flat.nbytes, progress)
        everywhere = yield from allgather_steps(context.comm, region is not None, progress)
        return region if all(everywhere) else None, staged

    region, staged = agreed_job(context, common, "multilane")
    if region is None:
        return None
    lane = None
    if context.lane_comm != MPI.COMM_NULL:
        lane = between(context.lane_comm, flat[slice(*lane_extent(context, flat.size))])
    return LaneRunner(context, region, lane, flat, op, signature, staged)


def lane_extent(context: Context, n: int) -> tuple[int, int]:
    """Of n values those in this rank's lane: the first, and the one after the last."""
    lanes, number = context.topology.lanes, context.node.rank
    if number >= lanes:
        return n, n
    start = extension.LaneAllreduce.chunk_start
    return start(n, lanes, number), start(n, lanes, number + 1)
