"""Seconds of the exact collectives on a cluster, by the schedules that would run there."""

from __future__ import annotations

import copy
import math
from functools import lru_cache

from bitring.collectives.schedules.check import check
from bitring.collectives.schedules.cost import cost
from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import Algorithm, algorithms
from bitring.collectives.schedules.topology import Topology
from bitring.collectives.selection.selection import segment_values
from bitring.training.prediction.cluster import Cluster, Machine

ITEMSIZE = 4  # float32

NOTHING = "no exchange"

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
        q = cluster.ranks_per_node
        self.topology = Topology(cluster.ranks, cluster.nodes, lanes=q, shared=q > 1, native=True)
        self._limit = math.inf
        self._found: dict[tuple[int, bool], tuple[float, str]] = {}

    def exact(self, nbytes: int) -> tuple[float, str]:
        """The best of our algorithms for an AllReduce of ``nbytes``, and its name."""
        return self._best(nbytes, own=True)

    def library(self, nbytes: int) -> tuple[float, str]:
        """The textbook's cost of what MPI libraries do, and by which algorithm."""
        return self._best(nbytes, own=False)

    def sent(self, how: str, size: int) -> float:
        """The times that the busiest of ``size`` ranks sends the buffer, by what ``exact`` or ``library`` named."""
        if size == 1 or how == NOTHING:
            return 0.0
        algorithm = algorithms.get(how.partition(",")[0])
        share = algorithm().sent(size)
        return _least(algorithm, size)[1] if share is None else share

    def node_seconds(self, nbytes: int) -> float:
        """A sum of a node's ranks through the memory they share: each one's values are read once and written once."""
        q = self.cluster.ranks_per_node
        return 2 * self.machine.local_latency + 2 * q * nbytes / self.machine.copy_together if q > 1 else 0.0

    def allgather(self, nbytes: int) -> float:
        """By the ring, with ``nbytes`` of each rank."""
        p = self.cluster.ranks
        return (p - 1) * (self.alpha + nbytes * self.beta)

    def clock(self, algorithm: Algorithm, size: int, nbytes: int) -> float:
        """Seconds of the schedule of an AllReduce of ``nbytes`` among ``size`` ranks, one per node.

        Infinite where they are known, before the slow clocking of ranks that differ, to be no better than the best.
        """
        segment: int | None = None
        if not algorithm.alike:
            messages, share = _least(type(algorithm), size)
            if messages * self.alpha + share * nbytes * self.beta >= self._limit:
                return math.inf
        if algorithm.pipelined:
            segment = ITEMSIZE * segment_values(nbytes, ITEMSIZE)
            if not algorithm.alike:
                segment = max(segment, 2 * size * nbytes // MOST_MESSAGES)
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

    def _best(self, nbytes: int, own: bool) -> tuple[float, str]:
        """Of bitring's ``own`` algorithms, or of the library's: seconds, and by what."""
        if self.cluster.ranks == 1 or not nbytes:
            return 0.0, NOTHING
        found = self._found.get((nbytes, own))
        if found is None:
            query = Query(
                collective="allreduce",
                nbytes=nbytes,
                topology=self.topology,
                own=own,
                library=not own,
                itemsize=ITEMSIZE,
            )
            able = [name for name in algorithms.names() if algorithms.get(name).missing(query) is None]
            found = math.inf, ""
            # The quick ones to clock come first: the others may be out of the question then.
            for name in sorted(able, key=lambda name: (not algorithms.get(name).alike, name)):
                estimate = algorithms.get(name)().estimate(self._below(found[0]), nbytes)
                if estimate is not None and estimate.seconds < found[0]:
                    found = estimate.seconds, estimate.how or name
            self._found[nbytes, own] = found
        return found

    def _below(self, seconds: float) -> Network:
        """This network for one who asks only for what takes less than ``seconds``."""
        network = copy.copy(self)
        network._limit = seconds
        return network


@lru_cache
def _least(algorithm: type[Algorithm], size: int) -> tuple[int, float]:
    """Messages, and the share of the buffer, that the busiest rank has to send."""
    verdict = check(algorithm(), "allreduce", size)
    return max(verdict.messages), max(verdict.sent) / verdict.chunks
