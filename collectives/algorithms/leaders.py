"""Leaders: the node's sum through its memory, recursive doubling between the nodes' first ranks, the result by memory.

The values travel in the messages by which ranks find out whether they mean the same (native/nodes_roll_call.h), so a
small AllReduce between nodes has no more messages than the library's. Of N nodes, lg N rounds of whole buffers;
from 16 KiB and 4 nodes on, Rabenseifner's 2 lg N rounds with 2(N−1)/N·n bytes of each node. Pieces of at most 256
KiB, 64 KiB where a node has several ranks, go one after the other. Other collectives send only what is not there yet.
Sums are made in rank order within a node, then by pairs of nodes.
"""

from __future__ import annotations

from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import COLLECTIVES, Algorithm, Estimate, Network, algorithms


class Leaders(Algorithm):
    """For ranks on several nodes, with the native engine."""

    runner = "bitring.collectives.execution.leaders:LeadersRunner"
    self_checking = True

    def chunks(self, size: int) -> int:
        """The whole buffer travels as one."""
        return 1

    @classmethod
    def serves(cls) -> tuple[str, ...]:
        """Every collective."""
        return COLLECTIVES

    @classmethod
    def missing(cls, query: Query) -> str | None:
        """It needs several nodes."""
        missing = super().missing(query)
        if missing is None and not query.host:
            return "the values are on a device"
        if missing is None and not query.topology.native:
            return "the native engine is not in use"
        if missing is None and query.topology.nodes < 2:
            return "all ranks are on one node"
        return missing

    def estimate(self, network: Network, nbytes: int) -> Estimate:
        """The sums on the nodes, and recursive doubling between them."""
        between = network.clock(algorithms.get("recursive_doubling")(), network.topology.nodes, nbytes)
        inside = network.node_seconds(nbytes) if network.topology.lanes > 1 else 0.0
        return Estimate(inside + between)

    def sent(self, size: int) -> float:
        """As recursive doubling among the nodes' first ranks."""
        return float((size - 1).bit_length())
