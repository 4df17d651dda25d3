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


def choose(collective: str, asked: str, nbytes: int, size: int, own: bool, library: bool) -> Choice:
    """The algorithm for a collective of ``nbytes`` bytes a rank among ``size`` ranks.

    ``asked`` is a registered name or ``"auto"``; ``own`` whether bitring can serve this combination of operation and
    dtype itself; ``library`` whether the MPI library can. One of them holds. Raises ValueError for an unknown name.
    """
    if asked != "auto":
        cls: type[Algorithm] = algorithms.get(asked)
        if asked == "mpi" and not library:
            return Choice(
                "ring", "mpi was asked for, but bitring does not hand this dtype or memory to the MPI library"
            )
        if asked == "mpi":
            return Choice("mpi", "asked for")
        if not own:
            return Choice("mpi", f"{asked} was asked for, but only the MPI library serves this operation on this dtype")
        if collective in cls.collectives():
            return Choice(asked, "asked for")
        if library:
            return Choice("mpi", f"{asked} was asked for, but has no {collective}")
        return Choice(
            "ring",
            f"{asked} was asked for, but has no {collective}, and the MPI library does not serve this dtype or memory",
        )
    if not own:
        return Choice("mpi", "only the MPI library serves this operation on this dtype")
    if not library:
        return Choice("ring", "the MPI library does not serve this dtype or memory")
    if size == 1:
        return Choice("mpi", "there is one rank")
    if nbytes < RING_FROM_NBYTES:
        return Choice("mpi", f"{nbytes} bytes are fewer than {RING_FROM_NBYTES}")
    return Choice("ring", f"{nbytes} bytes are at least {RING_FROM_NBYTES}")


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
