"""Deaths that the MPI library reports, where it reports any (Open MPI with ``--with-ft ulfm``)."""

from __future__ import annotations

import functools

from mpi4py import MPI

_MPICH = {101: "Process failed", 102: "Request pending due to failure", 103: "Communication object revoked"}
"""MPICH's own error classes, which mpi4py does not know when it was built for MPI's standard binary interface."""


@functools.cache
def _classes() -> frozenset[int]:
    """The error classes that stand for a death."""
    if MPI.ERR_PROC_FAILED != MPI.ERR_UNKNOWN:  # which mpi4py gives for what is not there
        return frozenset({MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED})
    if not MPI.Get_library_version().startswith("MPICH"):
        return frozenset()
    return frozenset(number for number, text in _MPICH.items() if MPI.Get_error_string(number) == text)


def died(error: MPI.Exception, comm: MPI.Intracomm) -> list[int] | None:
    """The ranks of ``comm`` that have died, when that is what the library's error says; None for any other error.

    Empty where the library does not tell which.
    """
    if error.Get_error_class() not in _classes():
        return None
    try:
        failed = comm.Get_failed()
        ranks = failed.Translate_ranks(None, comm.Get_group())
    except (MPI.Exception, NotImplementedError):
        return []
    return sorted(rank for rank in ranks if rank != MPI.UNDEFINED)
