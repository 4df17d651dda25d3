"""Numbers of the same processes in different communicators."""

from __future__ import annotations

from mpi4py import MPI


def numbers_in(other: MPI.Intracomm, comm: MPI.Intracomm) -> list[int]:
    """Numbers of the ranks of ``comm`` in the other; MPI.UNDEFINED, which is negative, for those it does not have."""
    groups = comm.Get_group(), other.Get_group()
    try:
        return list(groups[0].Translate_ranks(None, groups[1]))
    finally:
        for group in groups:
            group.Free()
