"""What the network between nodes takes, by messages that all nodes send at once. Importing this initialises MPI."""

from __future__ import annotations

import statistics
import time

import numpy as np
from mpi4py import MPI

from bitring.commands._ranks import meet
from bitring.machine import node_map

_SAMPLES = 9
_REPEATS = 50  # of the short message
_SHORT, _LONG = 1 << 10, 4 << 20


def wire(comm: MPI.Intracomm) -> tuple[float, float] | None:
    """Seconds a message, and bytes a second out of each node and into it; None on one node. Collective.

    The first rank of each node sends to the next node's, and receives from the one before.
    """
    leaders = [ranks[0] for ranks in node_map(comm)]
    if len(leaders) == 1:
        return None
    seconds = np.zeros(2)
    if comm.rank in leaders:
        place = leaders.index(comm.rank)
        to, source = leaders[(place + 1) % len(leaders)], leaders[place - 1]
        out, into = np.zeros(_LONG, np.uint8), np.empty(_LONG, np.uint8)

        def send(nbytes: int, repeats: int) -> float:
            begin = time.perf_counter()
            for _ in range(repeats):
                comm.Sendrecv(out[:nbytes], to, recvbuf=into[:nbytes], source=source)
            return (time.perf_counter() - begin) / repeats

        for k, (nbytes, repeats) in enumerate(((_SHORT, _REPEATS), (_LONG, 1))):
            send(nbytes, repeats)
            seconds[k] = statistics.median(send(nbytes, repeats) for _ in range(_SAMPLES))
    meet(comm)
    comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    latency, long = map(float, seconds)
    return latency, _LONG / max(long - latency, 1e-9)
