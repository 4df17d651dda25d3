"""Multi-lane: AllReduce across nodes, with as many parallel exchanges as the smallest node has ranks.

With N nodes and L lanes: reduce-scatter inside each node through shared memory, so that local rank l < L holds the
node's sum of chunk l; a ring among the l-th ranks of all nodes for each l at once; allgather inside each node. Each
node sends 2(N−1)/N·n bytes in 2(N−1) messages a lane, whatever its number of ranks, which need not be the same on all
nodes. Träff and Hunold, 2020, "Decomposing MPI collectives for exploiting multi-lane communication".
"""

from __future__ import annotations

from typing import ClassVar

from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import Algorithm, Estimate, Network, algorithms


class Multilane(Algorithm):
    """AllReduce for ranks on several nodes, with the native engine."""

    runner = "bitring.collectives.execution.multilane:make_multilane"
    fusion = None
    sets_up = True

    between: ClassVar[str] = "ring"
    """The algorithm between the nodes."""

    def chunks(self, size: int) -> int:
        """One for each rank, at most."""
        return size

    @classmethod
    def serves(cls) -> tuple[str, ...]:
        """AllReduce."""
        return ("allreduce",)

    @classmethod
    def missing(cls, query: Query) -> str | None:
        """It needs several nodes, some of several ranks, and a setting up that all ranks take part in."""
        missing = super().missing(query) or query.unshared()
        if missing is not None:
            return missing
        if query.topology.nodes == 1:
            return "all ranks are on one node"
        if not query.blocking:
            return "a nonblocking call cannot set it up"
        return None

    def estimate(self, network: Network, nbytes: int) -> Estimate:
        """The sums on the nodes; the lanes together carry the buffer between nodes as one rank per node would."""
        between = network.clock(algorithms.get(self.between)(), network.topology.nodes, nbytes)
        return Estimate(network.node_seconds(nbytes) + between)

    def sent(self, size: int) -> float | None:
        """As a ring among the nodes."""
        return algorithms.get(self.between)().sent(size)
