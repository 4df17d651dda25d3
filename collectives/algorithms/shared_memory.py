"""Shared memory: AllReduce among the ranks of one node that read each other's values where they are.

No messages and no schedule: it is the native engine's (native/shared_allreduce.h). Values up to some tens of KiB are
left in slots that everybody reads, in one exchange. Larger buffers from ``Communicator.empty`` are reduced in place:
rank r reads chunk r of all p buffers and writes the sum to all of them, so that p·n values are read and p·n written by
all ranks together. Other large buffers pass through stages that stay in the cache: another n values copied by each
rank, half of it out and half of it in. Sums are made in rank order. The idea is that of MPI libraries' shared-memory
collectives (Jain et al., 2018, "Framework for scalable intra-node collective operations using shared memory").
"""

from __future__ import annotations

from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import Algorithm, Estimate, Network


class SharedMemory(Algorithm):
    """AllReduce through the node's memory; for ranks on one node, with the native engine."""

    runner = "bitring.collectives.execution.shared_memory:SharedRunner"
    self_checking = True
    fusion = "pieces"

    def chunks(self, size: int) -> int:
        """One for each rank."""
        return size

    @classmethod
    def serves(cls) -> tuple[str, ...]:
        """AllReduce."""
        return ("allreduce",)

    @classmethod
    def missing(cls, query: Query) -> str | None:
        """It needs all ranks on one node."""
        missing = super().missing(query) or query.unshared()
        if missing is None and query.topology.nodes > 1:
            return f"the ranks are on {query.topology.nodes} nodes"
        return missing

    def estimate(self, network: Network, nbytes: int) -> Estimate:
        """The sum on the node."""
        return Estimate(network.node_seconds(nbytes))

    def sent(self, size: int) -> float:
        """As a ring, through memory."""
        return 2 * (size - 1) / size
