"""The one place that chooses an algorithm.

Every rank computes the same choice from what all ranks have agreed on, so no rank's environment or timing enters it.
"""

from __future__ import annotations

from typing import NamedTuple

from bitring.collectives.schedule import Algorithm, algorithms

RING_FROM_NBYTES = 16 << 20
"""From about here on the portable executor's ring beats the library's own AllReduce. With 2 and with 4 ranks on 2 cores
it has 1.2 and 0.9 times its speed at 16 MiB, 2.8 and 2.9 times at 64 MiB (benchmarks/results/allreduce-portable-*)."""


class Choice(NamedTuple):
    """An algorithm's name, and why it was chosen, in words."""

    name: str
    why: str


class Topology(NamedTuple):
    """Where the ranks of a communicator are; the same on all of them.

    ``lanes``: ranks of the smallest node. ``shared``: the ranks of each node share memory. ``native``: all ranks run
    the native engine. Zero nodes: not known yet.
    """

    size: int
    nodes: int = 0
    lanes: int = 0
    shared: bool = False
    native: bool = False


NATIVE = ("shared_memory", "multilane")
"""Algorithms that only the native engine has, for AllReduce in host memory."""


def choose(
    collective: str,
    asked: str,
    nbytes: int,
    topology: Topology,
    own: bool,
    library: bool,
    host: bool = True,
    blocking: bool = True,
) -> Choice:
    """The algorithm for a collective of ``nbytes`` bytes a rank.

    ``asked`` is a registered name or ``"auto"``; ``own`` whether bitring can serve this combination of operation and
    dtype itself; ``library`` whether the MPI library can, one of which holds; ``host`` whether the values are in host
    memory; ``blocking`` whether the ranks wait for each other now, and may set up what they need. Raises ValueError for
    an unknown name.
    """
    if asked != "auto":
        algorithms.get(asked)
    if asked == "mpi" and library:
        return Choice("mpi", "asked for")
    if not own:
        why = "only the MPI library serves this operation on this dtype"
        return Choice("mpi", why if asked == "auto" else f"{asked} was asked for, but {why}")
    if asked == "mpi":
        return Choice("ring", "mpi was asked for, but bitring does not hand this dtype or memory to the MPI library")
    if asked in NATIVE and collective == "allreduce":
        missing = _missing(asked, collective, topology, host, blocking)
        if missing is None:
            return Choice(asked, "asked for")
        return Choice("ring", f"{asked} was asked for, but {missing}")
    if asked != "auto":
        cls: type[Algorithm] = algorithms.get(asked)
        if collective in cls.collectives():
            return Choice(asked, "asked for")
        if library:
            return Choice("mpi", f"{asked} was asked for, but has no {collective}")
        return Choice(
            "ring",
            f"{asked} was asked for, but has no {collective}, and the MPI library does not serve this dtype or memory",
        )
    if library and topology.size == 1:
        return Choice("mpi", "there is one rank")
    if _missing("shared_memory", collective, topology, host, blocking) is None:
        return Choice("shared_memory", "all ranks share memory")
    if not library:
        return Choice("ring", "the MPI library does not serve this dtype or memory")
    if nbytes < RING_FROM_NBYTES:
        return Choice("mpi", f"{nbytes} bytes are fewer than {RING_FROM_NBYTES}")
    if _missing("multilane", collective, topology, host, blocking) is None:
        return Choice("multilane", f"{topology.lanes} lanes between {topology.nodes} nodes")
    return Choice("ring", f"{nbytes} bytes are at least {RING_FROM_NBYTES}")


def _missing(name: str, collective: str, topology: Topology, host: bool, blocking: bool) -> str | None:
    """What an algorithm of the native engine lacks here; None: nothing."""
    if collective != "allreduce":
        return f"it has no {collective}"
    if not host:
        return "the values are on a device"
    if not topology.native:
        return "the native engine is not in use"
    if not topology.shared:
        return "no ranks share memory"
    if name == "shared_memory" and topology.nodes > 1:
        return f"the ranks are on {topology.nodes} nodes"
    if name == "multilane" and topology.nodes == 1:
        return "all ranks are on one node"
    if name == "multilane" and not blocking:
        return "a nonblocking call cannot set it up"
    return None


def check_name(asked: str) -> None:
    """Raise ValueError, listing the known names, unless ``asked`` is "auto" or a registered algorithm."""
    if asked != "auto":
        algorithms.get(asked)


def segment_values(nbytes: int, itemsize: int) -> int:
    """Values in a segment of the portable executor for a buffer of ``nbytes``.

    Four MiB was the best of 128 KiB to 8 MiB for 64 MiB buffers; below 16 MiB a quarter of the buffer keeps trees
    pipelined. At most 1024 segments a buffer keep a message's tag unique while it is under way.
    """
    return max(1, min(4 << 20, max(nbytes // 4, 64 << 10)) // itemsize, -(-nbytes // 1024) // itemsize)
