"""Measurement of the network between nodes, by messages that all nodes send at once. Importing this initialises MPI."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.commands._ranks import meet
from bitring.nodes import node_map

_SAMPLES = 9
_REPEATS = 50  # of the short message
_SHORT, _LONG = 1 << 10, 4 << 20
_NAP_SECONDS = 2e-3


class Wire(NamedTuple):
    """``latency``: seconds per message. ``bandwidth``: bytes per second out of each node and into it. ``wire_work``:
    seconds of a node's processors for a byte that it sends and one that it receives, by a Communicator.
    """

    latency: float
    bandwidth: float
    wire_work: float


def wire(comm: MPI.Intracomm) -> Wire | None:
    """As measured by the first rank of each node, which sends to the next node's; None on one node. Collective."""
    leaders = [ranks[0] for ranks in node_map(comm)]
    if len(leaders) == 1:
        return None
    among: Any = comm.Split(0 if comm.rank in leaders else MPI.UNDEFINED, comm.rank)
    found = np.zeros(3)
    if among != MPI.COMM_NULL:
        latency, long = _seconds(among)
        found[:] = latency, _LONG / max(long - latency, 1e-9), _work(among)
        among.Free()
    meet(comm)
    comm.Allreduce(MPI.IN_PLACE, found, MPI.MAX)
    return Wire(*map(float, found))


def _seconds(comm: MPI.Intracomm) -> tuple[float, float]:
    """Of a short and of a long message, the slowest rank's."""
    out, into = np.zeros(_LONG, np.uint8), np.empty(_LONG, np.uint8)
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size

    def send(nbytes: int, repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            comm.Sendrecv(out[:nbytes], to, recvbuf=into[:nbytes], source=source)
        return (time.perf_counter() - begin) / repeats

    def slowest(nbytes: int, repeats: int) -> float:
        send(nbytes, repeats)
        return float(comm.allreduce(statistics.median(send(nbytes, repeats) for _ in range(_SAMPLES)), MPI.MAX))

    return slowest(_SHORT, _REPEATS), slowest(_LONG, 1)


def _work(comm: MPI.Intracomm) -> float:
    """Seconds of this process's threads for each byte that a Communicator's allgather sends, begun in the background.

    There waiting costs next to nothing, where a caller that waits is always at work. 0 where there is no background.
    """
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return 0.0
    native = Communicator(comm)
    mine, all_ = np.zeros(_LONG // comm.size, np.uint8), np.empty(_LONG // comm.size * comm.size, np.uint8)

    def gather() -> float:
        begin = time.process_time()
        request = native.Iallgather(mine, all_)
        while not request.Test():
            time.sleep(_NAP_SECONDS)
        return (time.process_time() - begin) / ((comm.size - 1) * mine.size)

    gather()
    return statistics.median(gather() for _ in range(_SAMPLES))
