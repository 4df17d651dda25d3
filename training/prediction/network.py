"""Seconds of the exact collectives on a cluster, by the schedules that would run there."""

from __future__ import annotations

import math
from functools import lru_cache

from bitring.collectives.schedules.check import check
from bitring.collectives.schedules.cost import cost
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.selection.selection import segment_values
from bitring.training.prediction.cluster import Cluster, Machine

ITEMSIZE = 4  # float32

NOTHING, TEXTBOOK = "no exchange", ", textbook"

MOST_MESSAGES = 1 << 13
"""A schedule whose ranks differ is clocked message by message: its segments are no finer than about so many."""


class Network:
    """Seconds of the exact collectives on a cluster."""

    def __init__(self, cluster: Cluster, machine: Machine) -> None:
        self.cluster, self.machine = cluster, machine
        self.inside = cluster.nodes == 1
        # Inside a node a message is a copy in and a copy out of memory that all its ranks use at once.
        self.alpha = machine.local_latency if self.inside else cluster.latency
        local = 4 * cluster.ranks_per_node / machine.copy_together
        self.beta = local if self.inside else 1 / (cluster.bandwidth * machine.wire)
        self.gamma = 1 / machine.add
        self._exact: dict[tuple[int, int], tuple[float, str]] = {}

    def exact(self, nbytes: int) -> tuple[float, str]:
        """The best of our algorithms for an AllReduce of ``nbytes``, and its name."""
        p, nodes = self.cluster.ranks, self.cluster.nodes
        if p == 1 or not nbytes:
            return 0.0, NOTHING
        if self.inside:
            return self.node_seconds(nbytes), "shared_memory"
        if p == nodes:
            return self._flat(nodes, nbytes)
        # The lanes together carry the buffer between nodes as one rank per node would, if by the ring.
        return self.node_seconds(nbytes) + self._seconds("ring", nodes, nbytes), "multilane"

    def library(self, nbytes: int) -> tuple[float, str]:
        """The textbook's cost of what MPI libraries do: the best of three algorithms, after a sum on each node."""
        p, nodes = self.cluster.ranks, self.cluster.nodes
        among = p if self.inside else nodes
        if p == 1 or not nbytes:
            return 0.0, NOTHING
        alpha, beta, gamma, turns = self.alpha, self.beta, self.gamma, math.ceil(math.log2(among))
        share = (among - 1) / among * nbytes
        ways = {
            "recursive_doubling": turns * (alpha + nbytes * (beta + gamma)),
            "rabenseifner": 2 * turns * alpha + share * (2 * beta + gamma),
            "ring": 2 * (among - 1) * alpha + share * (2 * beta + gamma),
        }
        name = min(ways, key=ways.__getitem__)
        inside = 0.0 if self.inside or p == nodes else self.node_seconds(nbytes)
        return ways[name] + inside, f"{name}{TEXTBOOK}"

    def sent(self, how: str, size: int) -> float:
        """The times that the busiest of ``size`` ranks sends the buffer, by what ``exact`` or ``library`` named."""
        name = how.removesuffix(TEXTBOOK)
        if size == 1 or name in ("ring", "shared_memory", "multilane"):
            return 2 * (size - 1) / size
        return 0.0 if name == NOTHING else _least(name, size)[1]

    def node_seconds(self, nbytes: int) -> float:
        """A sum of a node's ranks through the memory they share: each one's values are read once and written once."""
        q = self.cluster.ranks_per_node
        return 2 * self.machine.local_latency + 2 * q * nbytes / self.machine.copy_together if q > 1 else 0.0

    def allgather(self, nbytes: int) -> float:
        """By the ring, with ``nbytes`` of each rank."""
        p = self.cluster.ranks
        return (p - 1) * (self.alpha + nbytes * self.beta)

    def _flat(self, size: int, nbytes: int) -> tuple[float, str]:
        found = self._exact.get((size, nbytes))
        if found is None:
            best, chosen = math.inf, ""
            # The quick ones to clock come first: the others may be out of the question then.
            for name in sorted(_candidates(), key=lambda name: (name not in _QUICK, name)):
                if name not in _QUICK:
                    messages, share = _least(name, size)
                    if messages * self.alpha + share * nbytes * self.beta >= best:
                        continue
                seconds = self._seconds(name, size, nbytes)
                if seconds < best:
                    best, chosen = seconds, name
            found = self._exact[size, nbytes] = best, chosen
        return found

    def _seconds(self, name: str, size: int, nbytes: int) -> float:
        algorithm = algorithms.get(name)()
        segment: int | None = ITEMSIZE * segment_values(nbytes, ITEMSIZE, algorithm.chunks(size))
        if name == "rabenseifner":
            segment = None  # its rounds wait for whole messages anyway
        elif name not in _QUICK:
            segment = max(segment or 1, 2 * size * nbytes // MOST_MESSAGES)
        return cost(
            algorithm,
            "allreduce",
            size,
            nbytes,
            alpha=self.alpha,
            beta=self.beta,
            gamma=self.gamma,
            segment_nbytes=segment,
        )


_QUICK = ("ring", "recursive_doubling", "rabenseifner")
"""All their ranks do the same, at least where their number is a power of two."""


def _candidates() -> list[str]:
    return [name for name in algorithms.names() if "allreduce" in algorithms.get(name).collectives()]


@lru_cache
def _least(name: str, size: int) -> tuple[int, float]:
    """Messages, and the share of the buffer, that the busiest rank has to send."""
    verdict = check(algorithms.get(name)(), "allreduce", size)
    return max(verdict.messages), max(verdict.sent) / verdict.chunks
