"""The one place that chooses an algorithm.

Every rank computes the same choice from what all ranks have agreed on, so no rank's environment or timing enters it.
"""

from __future__ import annotations

from typing import NamedTuple

from bitring.arrays import NUMERIC_DTYPES
from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.schedules.topology import Topology
from bitring.collectives.selection.defaults import ANYWHERE, EMULATED, LIBRARY, NO_LIBRARY, PREFERENCES
from bitring.collectives.selection.table import BUILT_IN, Table

_ITEMSIZES = sorted({dtype.itemsize for dtype in NUMERIC_DTYPES})


class Choice(NamedTuple):
    """An algorithm's name, and why it was chosen, in words."""

    name: str
    why: str


def choose(asked: str, query: Query, table: Table = BUILT_IN) -> Choice:
    """The algorithm for what ``query`` describes.

    ``asked`` is a registered name or ``"auto"``; ``table`` what was measured here. Raises ValueError for an unknown
    name.
    """
    if asked != "auto":
        missing = _missing(asked, query)
        return Choice(asked, "asked for") if missing is None else _instead(asked, missing, query)
    missing = _missing(ANYWHERE, query)
    if missing is not None:
        return Choice(LIBRARY, missing)
    if query.topology.size == 1 and query.library:
        return Choice(LIBRARY, "there is one rank")
    return _measured(query, table) or _default(query)


def _missing(name: str, query: Query) -> str | None:
    return algorithms.get(name).missing(query)


def _instead(asked: str, missing: str, query: Query) -> Choice:
    """The algorithm that stands in for one that cannot run: the library for what that never does, or a ring."""
    why = f"{asked} was asked for, but {missing}"
    never = query.collective not in algorithms.get(asked).serves()
    if not query.own or (never and query.library):
        return Choice(LIBRARY, why)
    return Choice(ANYWHERE, f"{why}, and {NO_LIBRARY}" if never else why)


def _measured(query: Query, table: Table) -> Choice | None:
    """The best of what was measured; None where nothing like it was, or the best cannot run."""
    topology = query.topology
    if query.collective != "allreduce" or not query.host:
        return None
    for measured, where in ((table, "this machine"), (EMULATED, "emulated hosts")):
        rules = measured.nearest(topology.size, topology.nodes, query.itemsize, query.resident, topology.native)
        if rules is not None and _missing(name := rules.algorithm(query.nbytes), query) is None:
            return Choice(name, f"measured on {where} to be the best of {query.nbytes} bytes with {rules.title}")
    return None


def _default(query: Query) -> Choice:
    """The choice by built-in rules, where this machine was not measured."""
    for name, reason in PREFERENCES:
        if _missing(name, query) is None and (why := reason(query)) is not None:
            return Choice(name, f"{why} (built-in default)")
    raise AssertionError(f"no preference for {query}")


def fast_path_limits(topology: Topology, table: Table) -> tuple[int, int]:
    """The first and the last size in bytes of a stretch for which "auto" means a self-checking algorithm.

    On private memory, of an operation and dtype that anybody reduces, whatever the values' size: all ranks of a call
    choose the same, whichever way they come. ``(1, 0)`` where there is none. Other sizes are chosen for one by one.
    """
    stretches = [_self_checking_stretch(topology, table, itemsize) for itemsize in _ITEMSIZES]
    first, last = max(first for first, _ in stretches), min(last for _, last in stretches)
    return (first, last) if first <= last else (1, 0)


def _self_checking_stretch(topology: Topology, table: Table, itemsize: int) -> tuple[int, int]:
    kind = topology.size, topology.nodes, itemsize, False, topology.native
    rules = table.nearest(*kind) or EMULATED.nearest(*kind)
    if rules is None:
        query = Query(collective="allreduce", nbytes=0, topology=topology, own=True, library=True, itemsize=itemsize)
        best: tuple[tuple[int, str], ...] = ((0, _default(query).name),)
    else:
        best = rules.best
    starts = [*(start for start, _ in best), (1 << 62) + 1]
    for k, (start, name) in enumerate(best):
        if algorithms.get(name).self_checking:
            return start, starts[k + 1] - 1
    return 1, 0


def check_name(asked: object, function: str) -> None:
    """Raise TypeError or ValueError, which name ``function``, unless ``asked`` is "auto" or a registered algorithm."""
    if not isinstance(asked, str):
        known = ", ".join(algorithms.names())
        raise TypeError(f"{function}: algorithm must be a name (auto, {known}); got {type(asked).__name__}")
    if asked != "auto":
        try:
            algorithms.get(asked)
        except ValueError as error:
            raise ValueError(f"{function}: {error}") from None


def segment_values(nbytes: int, itemsize: int) -> int:
    """Values in a segment, for a buffer of ``nbytes``.

    512 KiB keep trees and rings pipelined. Between hosts at 1 Gbit/s all from 128 KiB to 2 MiB do as well. MPICH over
    UCX receives messages of 3 MiB and more where they belong, after a word with the sender, and copies shorter ones
    there. That word waits behind what its receiver sends to the same rank, so that two ranks which exchange such
    messages at 1 Gbit/s take turns, and 1.5 times as long. In a ring of four, chunks of 16 MiB in four such messages
    took 0.74 of the processor time, and 1 to 3% longer. Where the processors limit the network, as between emulated
    hosts whose link is not shaped, that copy is why 16 MiB take 0.8 to 1.0 of the speed of the library's own, in
    segments of 128 KiB to 2 MiB alike. At most 1024 segments per buffer keep a message's tag unique while it is under
    way.
    """
    return max(1, (512 << 10) // itemsize, -(-nbytes // 1024) // itemsize)
