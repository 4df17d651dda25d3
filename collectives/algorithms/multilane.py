"""Multi-lane: AllReduce across nodes, with as many parallel exchanges as the smallest node has ranks.

With N nodes and L lanes: reduce-scatter inside each node through shared memory, so that local rank l < L holds the
node's sum of chunk l; a ring among the l-th ranks of all nodes for each l at once; allgather inside each node. Each
node sends 2(N−1)/N·n bytes in 2(N−1) messages a lane, whatever its number of ranks, which need not be the same on all
nodes. Träff and Hunold, 2020, "Decomposing MPI collectives for exploiting multi-lane communication".
"""

from __future__ import annotations

from bitring.collectives.schedules.schedule import Algorithm


class Multilane(Algorithm):
    """AllReduce for ranks on several nodes, with the native engine."""

    def chunks(self, size: int) -> int:
        """One for each rank, at most."""
        return size
