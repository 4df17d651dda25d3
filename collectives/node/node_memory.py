"""Memory that the ranks of a node share, made by all of them together.

Ranks are on one node when MPI says that they share memory, and a test confirms it: each rank reads in the others'
memory what they wrote there. Names of hosts and numbers of processes do not tell: in containers they may be equal by
chance.
"""

from __future__ import annotations

import logging
import os
import secrets
from typing import Any

from mpi4py import MPI

from bitring.collectives.interop.library_steps import allgather_steps
from bitring.collectives.interop.steps import Progress, StepsTo, wait_for
from bitring.native import extension

logger = logging.getLogger("bitring")

_TOKEN_NBYTES = 16


def share(comm: MPI.Intracomm, nbytes: int, number: int, progress: Progress) -> StepsTo[Any]:
    """A native Region: ``nbytes`` of memory of each rank of ``comm``, zeroed, that all of them have mapped.

    A job's steps on ``comm``, the ranks of a node. ``nbytes`` may differ between ranks. ``number`` tells the node's
    regions apart. Returns None on all ranks when it cannot be had on any; the first of them that has a reason logs it.
    """
    for named in (False, True):
        region, why = yield from _attempt(comm, nbytes, number, named, progress)
        everyone = yield from allgather_steps(comm, why, progress)
        reasons: list[str] = [reason for reason in everyone if reason]
        if not reasons:
            return region
    if comm.Get_rank() == 0:
        logger.warning("no shared memory of %d bytes per rank inside this node: %s", nbytes, reasons[0])
    return None


def _attempt(
    comm: MPI.Intracomm, nbytes: int, number: int, named: bool, progress: Progress
) -> StepsTo[tuple[Any, str]]:
    """The region or None, and on this rank why not. Anonymous memory, or named while it is opened."""
    token = secrets.token_bytes(_TOKEN_NBYTES)
    name = f"bitring-{token.hex()}" if named else ""
    rounded = max(nbytes, _TOKEN_NBYTES)
    mine, why = None, ""
    try:
        mine = extension.Memory.make(rounded, name)
        mine.write(token)
    except OSError as error:
        why = str(error)
    descriptor = -1 if mine is None else mine.descriptor
    everyone = yield from allgather_steps(comm, (os.getpid(), descriptor, rounded, name, token), progress)
    parts: list[Any] = []
    for rank, (pid, descriptor, theirs, path, expected) in enumerate(everyone):
        if rank == comm.Get_rank() or descriptor < 0 or mine is None:
            parts.append(mine)
            continue
        try:
            part = extension.Memory.open(theirs, pid, descriptor, path)
            part.close_descriptor()
            if part.read(_TOKEN_NBYTES) != expected:
                raise OSError(f"rank {rank} of this node writes to another memory")
            parts.append(part)
        except OSError as error:
            why = why or str(error)
    yield from wait_for(comm.Ibarrier(), progress)  # everybody has opened, and read, what it could
    if mine is not None:
        mine.write(bytes(_TOKEN_NBYTES))
        mine.unlink()
        mine.close_descriptor()
    yield from wait_for(comm.Ibarrier(), progress)
    incomplete = why or any(descriptor < 0 for _, descriptor, *_ in everyone)
    return (None if incomplete else extension.Region(comm.Get_rank(), number, parts)), why
