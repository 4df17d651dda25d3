"""Shared memory: AllReduce among the ranks of one node that read each other's values where they are.

No messages and no schedule: it is the native engine's (native/shared_allreduce.h). Values up to some tens of KiB are
left in slots that everybody reads, in one exchange. Larger buffers from ``Communicator.empty`` are reduced in place:
rank r reads chunk r of all p buffers and writes the sum to all of them, so that p·n values are read and p·n written by
all ranks together. Other large buffers pass through stages that stay in the cache: another n values copied by each
rank, half of it out and half of it in. Sums are made in rank order. The idea is that of MPI libraries' shared-memory
collectives (Jain et al., 2018, "Framework for scalable intra-node collective operations using shared memory").
"""

from __future__ import annotations

from bitring.collectives.schedules.schedule import Algorithm


class SharedMemory(Algorithm):
    """AllReduce through the node's memory; for ranks on one node, with the native engine."""

    def chunks(self, size: int) -> int:
        """One for each rank."""
        return size
