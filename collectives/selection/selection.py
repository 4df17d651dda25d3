"""The one place that chooses an algorithm.

Every rank computes the same choice from what all ranks have agreed on, so no rank's environment or timing enters it.
"""

from __future__ import annotations

from typing import NamedTuple

from bitring.collectives.schedules.schedule import Algorithm, algorithms
from bitring.collectives.selection.table import BUILT_IN, Table
from bitring.collectives.selection.topology import Topology

RING_FROM_NBYTES = 16 << 20
"""From about here on the portable executor's ring beats the library's own AllReduce. With 2 and with 4 ranks on 2 cores
it has 1.2 and 0.9 times its speed at 16 MiB, 2.8 and 2.9 times at 64 MiB (benchmarks/results/allreduce-portable-*)."""

NETWORK_FROM_NBYTES = 2 << 20
"""The same for the native executor between nodes. On 4 hosts at 1 Gbit/s its ring has 0.3 times the library's speed at
64 KiB and 1.1 times at 4 MiB."""


class Choice(NamedTuple):
    """An algorithm's name, and why it was chosen, in words."""

    name: str
    why: str


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
    itemsize: int = 4,
    resident: bool = False,
    table: Table = BUILT_IN,
) -> Choice:
    """The algorithm for a collective of ``nbytes`` bytes a rank.

    ``asked`` is a registered name or ``"auto"``; ``own`` whether bitring can serve this combination of operation and
    dtype itself; ``library`` whether the MPI library can, one of which holds; ``host`` whether the values are in host
    memory; ``blocking`` whether the ranks wait for each other now, and may set up what they need; ``itemsize`` the
    bytes of a value; ``resident`` whether all ranks' buffers are in memory that their nodes share; ``table`` what was
    measured here. Raises ValueError for an unknown name.
    """
    if asked != "auto":
        algorithms.get(asked)
    if asked == "mpi" and library:
        return Choice("mpi", "asked for")
    if not own:
        why = "only the MPI library serves this operation on this dtype"
        return Choice("mpi", why if asked == "auto" else f"{asked} was asked for, but {why}")
    if asked == "mpi":
        return Choice(
            "ring", "mpi was asked for, but bitring does not hand this operation, dtype or memory to the MPI library"
        )
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
            f"{asked} was asked for, but has no {collective}, and the MPI library does not serve this operation, dtype "
            "or memory",
        )
    if library and topology.size == 1:
        return Choice("mpi", "there is one rank")
    if collective == "allreduce" and host:
        rules = table.nearest(topology.size, topology.nodes, itemsize, resident, topology.native)
        if rules is not None:
            name = rules.algorithm(nbytes)
            missing = _missing(name, collective, topology, host, blocking) if name in NATIVE else None
            if missing is None and (library or name != "mpi"):
                return Choice(name, f"measured on this machine to be the best of {nbytes} bytes with {rules.title}")
    name, why = _default(collective, nbytes, topology, library, host, blocking)
    return Choice(name, f"{why} (built-in default)")


def _default(
    collective: str, nbytes: int, topology: Topology, library: bool, host: bool, blocking: bool
) -> tuple[str, str]:
    """What is known without having measured this machine, and why."""
    if _missing("shared_memory", collective, topology, host, blocking) is None:
        return "shared_memory", "all ranks share memory"
    if not library:
        return "ring", "the MPI library does not serve this operation, dtype or memory"
    between = topology.native and topology.nodes > 1 and host
    enough = NETWORK_FROM_NBYTES if between else RING_FROM_NBYTES
    if nbytes < enough:
        return "mpi", f"{nbytes} bytes are fewer than {enough}"
    if _missing("multilane", collective, topology, host, blocking) is None:
        return "multilane", f"{topology.lanes} lanes between {topology.nodes} nodes"
    return "ring", f"{nbytes} bytes are at least {enough}"


def direct_limits(topology: Topology, table: Table) -> tuple[int, int]:
    """The first and the last size in bytes of a stretch for which "auto" means ``shared_memory`` on private memory.

    ``(1, 0)`` where there is none. Other sizes are chosen for one by one.
    """
    rules = table.nearest(topology.size, topology.nodes, 4, False, topology.native)
    if rules is None:
        return 0, 1 << 62
    starts = [*(start for start, _ in rules.best), (1 << 62) + 1]
    for k, (start, name) in enumerate(rules.best):
        if name == "shared_memory":
            return start, starts[k + 1] - 1
    return 1, 0


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


def segment_values(nbytes: int, itemsize: int, chunks: int) -> int:
    """Values in a segment, for a buffer of ``nbytes`` of which a schedule makes ``chunks``.

    A quarter of a chunk keeps trees and rings pipelined. Between hosts at 1 Gbit/s all from 128 KiB to 2 MiB do as
    well, and whole chunks do badly. At most 1024 segments a buffer keep a message's tag unique while it is under way.
    """
    quarter = min(2 << 20, max(nbytes // chunks // 4, 256 << 10))
    return max(1, quarter // itemsize, -(-nbytes // 1024) // itemsize)
