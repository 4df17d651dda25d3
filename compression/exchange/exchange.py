"""Communication for reductions: exact sums inside another plan's run, and an allgather."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpi4py import MPI

from bitring.arrays import Array
from bitring.collectives.interop.steps import Progress, Steps, wait_for
from bitring.collectives.plan import ExactPlan, query_of
from bitring.collectives.runtime.context import Context
from bitring.collectives.selection.selection import choose
from bitring.compression.exchange.once_a_node import once_a_node


class ExactSum(ExactPlan):
    """An exact AllReduce inside another plan's run, whose ranks have agreed already."""

    def steps(self, progress: Progress) -> Steps:
        """One run, in place on the buffer."""
        yield from self._steps(progress)


class Exchange:
    """What a reduction communicates by. Made anew for each plan; ``algorithm`` is of the exact sums."""

    def __init__(self, context: Context, algorithm: str) -> None:
        self.rank, self.size = context.rank, context.size
        self.sums: list[ExactSum] = []
        self._gathered_nbytes = 0
        self._context = context
        self._algorithm = algorithm

    def sum(self, flat: Array) -> ExactSum:
        """An exact sum of ``flat``, 1-D, over all ranks in place. Collective."""
        context = self._context
        choice = choose(self._algorithm, query_of(context, flat, MPI.SUM), context.table)
        self.sums.append(ExactSum(context, flat, MPI.SUM, choice))
        return self.sums[-1]

    def gather(self, room: Array, counts: Sequence[int], progress: Progress) -> Steps:
        """Allgather in place: bytes of every rank, ``counts[r]`` of rank r, one behind the other in ``room``, uint8."""
        starts = [sum(counts[:r]) for r in range(self.size)]
        where = [room, (counts, starts), MPI.BYTE]
        yield from wait_for(self._context.comm.Iallgatherv(MPI.IN_PLACE, where), progress)
        self._gathered_nbytes += (self.size - 1) * counts[self.rank]

    def deal(self, sent: Array, counts: Sequence[int], room: Array, taken: Sequence[int], progress: Progress) -> Steps:
        """Alltoall: bytes of ``sent``, ``counts[r]`` of them to rank r, and ``taken[r]`` from it to ``room``, uint8."""
        here, there = ([sum(each[:r]) for r in range(self.size)] for each in (counts, taken))
        request = self._context.comm.Ialltoallv([sent, (counts, here), MPI.BYTE], [room, (taken, there), MPI.BYTE])
        yield from wait_for(request, progress)
        self._gathered_nbytes += sum(counts) - counts[self.rank]

    def once_a_node(self, compile_kernels: Callable[[], None]) -> None:
        """See ``once_a_node``. Collective."""
        once_a_node(self._context, compile_kernels, "plan_allreduce")

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other ranks so far."""
        return self._gathered_nbytes + sum(each.bytes_sent for each in self.sums)

    @property
    def algorithms(self) -> str:
        """The sums' algorithms, in words."""
        return " and ".join(sorted({each.algorithm for each in self.sums}))
