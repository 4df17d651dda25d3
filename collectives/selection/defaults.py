"""The built-in default, as data: which algorithm is taken where this machine was not measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bitring.collectives.schedules.query import Query
from bitring.collectives.selection.table import Rules, Table

RING_FROM_NBYTES = 16 << 20
"""From about here on the portable executor's ring beats the library's own AllReduce. With 2 and with 4 ranks on 2 cores
it has 1.2 and 0.9 times its speed at 16 MiB, 2.8 and 2.9 times at 64 MiB (benchmarks/results/allreduce-portable-*)."""

NETWORK_FROM_NBYTES = 2 << 20
"""The same for the native executor between nodes, for calls that cannot have the best that was measured."""

LITTLE_NBYTES = 64 << 10
"""Up to here the number of rounds decides the cost, not the bytes."""


def _between(ranks: int, nodes: int, *best: tuple[int, str]) -> Rules:
    return Rules("any", ranks, nodes, 4, False, True, best)


EMULATED = Table(
    (
        _between(2, 2, (0, "leaders"), (512 << 10, "ring")),
        _between(4, 4, (0, "leaders"), (512 << 10, "ring")),
        _between(4, 2, (0, "leaders"), (256 << 10, "multilane")),
    )
)
"""The best algorithms between nodes where this machine was not measured: those of one run on emulated hosts
(benchmarks/hosts.py) at 1 Gbit/s, on 2 and 4 hosts of one rank and 2 of two. ``bitring tune`` measures a cluster."""

LIBRARY = "mpi"
"""The algorithm for collectives that bitring does not have, and for one rank alone."""

ANYWHERE = "ring"
"""The algorithm that stands in for one that cannot run: it runs whatever bitring serves, anywhere."""

NO_LIBRARY = "the MPI library does not serve this operation, dtype or memory"


class Preference(NamedTuple):
    """``algorithm`` is the one, unless it cannot run there, if ``why`` says why; None: the next ones are better."""

    algorithm: str
    why: Callable[[Query], str | None]


def _enough(query: Query) -> int:
    """The bytes from which the library's own AllReduce is no longer the best."""
    between = query.topology.native and query.topology.nodes > 1 and query.host
    return NETWORK_FROM_NBYTES if between else RING_FROM_NBYTES


LEADERS_NBYTES = 64 << 10
"""Up to here the agreement that comes before a schedule would be a good part of the cost between nodes."""

FEW_NODES = 4
FEW_NODES_NBYTES = 1 << 20
"""Between so few nodes a broadcast, or a reduction to one rank, is one of two rounds, and up to here the leaders' takes
about as long as the library's: on emulated hosts at 1 Gbit/s it had 0.9 to 1.0 times its speed at 256 KiB and 1.0 to
1.2 at 1 MiB."""

SHARED_BLOCKS_NBYTES = 4 << 20
"""With several ranks a node, leaders send each block once to a node, up to here twice as fast as the library does."""


def _little_between(query: Query) -> str | None:
    most = LEADERS_NBYTES
    if query.collective in ("broadcast", "reduce") and query.topology.nodes <= FEW_NODES:
        most = FEW_NODES_NBYTES
    elif query.collective in ("allgather", "reduce_scatter") and query.topology.lanes > 1:
        most = SHARED_BLOCKS_NBYTES
    little = query.nbytes <= most
    return f"{query.nbytes} bytes travel in the messages by which ranks agree" if little else None


def _one_node(query: Query) -> str:
    return "all ranks share memory"


def _no_library_for_little(query: Query) -> str | None:
    little = not query.library and query.nbytes <= LITTLE_NBYTES
    return f"{NO_LIBRARY}, and of {query.nbytes} bytes the fewest rounds are the quickest" if little else None


def _no_library(query: Query) -> str | None:
    return None if query.library else NO_LIBRARY


def _few(query: Query) -> str | None:
    enough = _enough(query)
    return f"{query.nbytes} bytes are fewer than {enough}" if query.nbytes < enough else None


def _many(query: Query) -> str:
    return f"{query.nbytes} bytes are at least {_enough(query)}"


def _lanes(query: Query) -> str:
    return f"{query.topology.lanes} lanes between {query.topology.nodes} nodes"


PREFERENCES = (
    Preference("shared_memory", _one_node),
    Preference("leaders", _little_between),
    Preference("recursive_doubling", _no_library_for_little),
    Preference("binomial_tree", _no_library_for_little),
    Preference("ring", _no_library),
    Preference("mpi", _few),
    Preference("multilane", _lanes),
    Preference("ring", _many),
)
"""The first that can run, and has a why, is taken. At any size or at none: an algorithm whose runs check themselves."""
