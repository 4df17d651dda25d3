"""The MPI library's own collectives, under the name ``mpi``.

There is no schedule: the call is handed on. Rounds and bytes are whatever the library chooses.
"""

from __future__ import annotations

import math

from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import COLLECTIVES, Algorithm, Estimate, Network


class Mpi(Algorithm):
    """The library's own call for every collective."""

    runner = "bitring.collectives.execution.library:LibraryRunner"
    library = True

    def chunks(self, size: int) -> int:
        """The buffer is handed over whole."""
        return 1

    @classmethod
    def serves(cls) -> tuple[str, ...]:
        """Every collective."""
        return COLLECTIVES

    @classmethod
    def missing(cls, query: Query) -> str | None:
        """It reduces what every MPI library reduces, in host memory."""
        if not query.library:
            return "bitring does not hand this operation, dtype or memory to the MPI library"
        return None

    def estimate(self, network: Network, nbytes: int) -> Estimate:
        """The textbook's: the best of three algorithms, after a sum on each node where there are several."""
        topology, alpha, beta, gamma = network.topology, network.alpha, network.beta, network.gamma
        among = topology.size if topology.nodes == 1 else topology.nodes
        turns, share = math.ceil(math.log2(among)), (among - 1) / among * nbytes
        ways = {
            "recursive_doubling": turns * (alpha + nbytes * (beta + gamma)),
            "rabenseifner": 2 * turns * alpha + share * (2 * beta + gamma),
            "ring": 2 * (among - 1) * alpha + share * (2 * beta + gamma),
        }
        name = min(ways, key=ways.__getitem__)
        inside = 0.0 if topology.nodes == 1 else network.node_seconds(nbytes)
        return Estimate(ways[name] + inside, f"{name}, textbook")
