"""The routes of an owner exchange: among all ranks, or between nodes that have summed exactly inside first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from mpi4py import MPI

from bitring.arrays import Array, device_of
from bitring.collectives.execution.multilane import LaneRunner, lane_extent, lane_runner
from bitring.collectives.execution.runner import Task, make_runner
from bitring.collectives.interop.steps import Progress, Steps, run
from bitring.collectives.runtime.context import Context
from bitring.collectives.schedules.query import Query
from bitring.collectives.selection.selection import choose
from bitring.compression.exchange.layout import Extent
from bitring.compression.exchange.owner_exchange import NativeOwnerExchange, OwnerExchange

MakeExchange = Callable[[MPI.Intracomm, Array, int], OwnerExchange]
"""Makes the exchange of a communicator, an array like its values, and the place of the first in the buffer."""


class Route(Protocol):
    """``exchange``, None where this rank has no part in it, is of the values ``extent``, the rank owns ``owned``.

    Both are indexes of the buffer: the first, and the one after the last. A run sends ``nbytes_sent`` bytes beside the
    exchange's.
    """

    exchange: OwnerExchange | None
    extent: Extent
    owned: Extent
    nbytes_sent: int
    operation: Any
    """The native operation that is a run, ``prepare``d before and ``note``d after; None where Python takes part."""

    def prepare(self) -> None:
        """The operation's next run is another one."""
        ...

    def note(self) -> None:
        """The operation has been run."""
        ...

    def steps(self, progress: Progress) -> Steps:
        """One run."""
        ...

    def close(self) -> None:
        """Give back what is MPI's."""
        ...


class FlatRoute:
    """All ranks exchange."""

    nbytes_sent = 0

    def __init__(self, context: Context, flat: Array, make: MakeExchange) -> None:
        self.exchange: OwnerExchange | None = make(context.comm, flat, 0)
        self.exchange.bind(flat)
        self.extent, self.owned = (0, flat.size), self.exchange.owned
        self.operation = self.exchange.operation
        self.prepare, self.note = self.exchange.prepare, self.exchange.note
        self.steps = self.exchange.steps

    def close(self) -> None:
        """See Route."""


class NodeRoute:
    """All ranks are on one node: they sum exactly, there is nothing to encode, and no rank has residuals."""

    def __init__(self, context: Context, flat: Array, number: int, signature: int) -> None:
        self.exchange: OwnerExchange | None = None
        self.extent: Extent = (0, 0)
        self.owned: Extent = (0, 0)
        query = Query(
            collective="allreduce",
            nbytes=flat.nbytes,
            topology=context.topology,
            own=True,
            library=False,
            itemsize=flat.dtype.itemsize,
            host=device_of(flat) is None,
        )
        self.algorithm = choose("auto", query).name
        task = Task("allreduce", flat, MPI.SUM, number=number, signature=signature)
        self._runner = make_runner(context, self.algorithm, task)
        self.nbytes_sent = self._runner.nbytes_sent
        self.operation = self._runner.operation
        self.steps = self._runner.steps

    def prepare(self) -> None:
        """See Route."""

    def note(self) -> None:
        """See Route."""

    def close(self) -> None:
        """See Route."""
        self._runner.close()


class LaneRoute:
    """Nodes sum through shared memory; rank l of each exchanges lane l of the sum with those of the other nodes."""

    def __init__(self, context: Context, runner: LaneRunner, exchange: NativeOwnerExchange | None, n: int) -> None:
        self._runner = runner
        self._native = exchange
        self.exchange: OwnerExchange | None = exchange
        self.extent = lane_extent(context, n)
        first = self.extent[0]
        self.owned = (first, first) if exchange is None else (first + exchange.owned[0], first + exchange.owned[1])
        self.nbytes_sent = runner.nbytes_sent
        self.operation = runner.operation

    def prepare(self) -> None:
        """See Route."""
        if self._native is not None:
            self._native.prepare()

    def note(self) -> None:
        """See Route."""
        if self._native is not None:
            self._native.note()

    def steps(self, progress: Progress) -> Steps:
        """See Route."""
        self.prepare()
        yield from run(self.operation, progress)
        self.note()

    def close(self) -> None:
        """See Route."""


def make_lane_route(context: Context, flat: Array, signature: int, make: MakeExchange) -> LaneRoute | None:
    """Collective. None on all ranks where some node has no room for it."""
    made: list[NativeOwnerExchange] = []

    def between(comm: MPI.Intracomm, like: Array) -> Any:
        exchange = make(comm, like, lane_extent(context, flat.size)[0])
        assert isinstance(exchange, NativeOwnerExchange)
        made.append(exchange)
        return exchange

    runner = lane_runner(context, flat, MPI.SUM, signature, between, persistent=True)
    return None if runner is None else LaneRoute(context, runner, made[0] if made else None, flat.size)


class LeaderRoute:
    """Nodes sum by messages; their leaders, the first ranks, exchange. For what cannot share memory."""

    operation = None

    def __init__(self, context: Context, flat: Array, number: int, make: MakeExchange) -> None:
        self._reduce = make_runner(context.node, "binomial_tree", Task("reduce", flat, number=number))
        self._broadcast = make_runner(context.node, "binomial_tree", Task("broadcast", flat, number=number))
        self.exchange: OwnerExchange | None = None
        self.extent = self.owned = (0, 0)
        if context.leaders != MPI.COMM_NULL:
            self.exchange = make(context.leaders, flat, 0)
            self.exchange.bind(flat)
            self.extent, self.owned = (0, flat.size), self.exchange.owned
        self.nbytes_sent = self._reduce.nbytes_sent + self._broadcast.nbytes_sent

    def prepare(self) -> None:
        """See Route."""

    def note(self) -> None:
        """See Route."""

    def steps(self, progress: Progress) -> Steps:
        """See Route."""
        yield from self._reduce.steps(progress)
        if self.exchange is not None:
            yield from self.exchange.steps(progress)
        yield from self._broadcast.steps(progress)

    def close(self) -> None:
        """See Route."""
        self._reduce.close()
        self._broadcast.close()
