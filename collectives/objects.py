"""Python objects and bytes between all ranks, where bitring itself has something to say to them.

The MPI library's blocking calls would wait for ever for a rank that is gone, and keep Ctrl-C waiting. These are jobs of
the communicator's lane: watched, interruptible, under ``BITRING_TIMEOUT``; and the ranks first agree that they make the
same call. So every communicator is protected alike, MPI.COMM_WORLD as well as a ``bitring.Communicator``.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Generator
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.agreement import Request, agree, wait_for
from bitring.collectives.executor import Progress, Steps
from bitring.collectives.state import state_of

Exchange = Generator[Any, None, list[Any]]
"""Steps that return every rank's object, in rank order."""


def allgather_steps(comm: MPI.Intracomm, value: object, progress: Progress) -> Exchange:
    """Every rank's ``value``, in rank order, as a part of a job on ``comm``, which is private to bitring."""
    mine = np.frombuffer(pickle.dumps(value), np.uint8)
    lengths = np.zeros(comm.Get_size(), np.int64)
    lengths[comm.Get_rank()] = mine.size
    progress.exchanging = True
    yield from wait_for(comm.Iallgather(MPI.IN_PLACE, lengths), progress)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    everyone = np.empty(int(starts[-1]), np.uint8)
    everyone[starts[comm.Get_rank()] : starts[comm.Get_rank() + 1]] = mine
    yield from wait_for(comm.Iallgatherv(MPI.IN_PLACE, [everyone, lengths, starts[:-1], MPI.BYTE]), progress)
    progress.exchanging = False
    return [pickle.loads(everyone[a:b].tobytes()) for a, b in itertools.pairwise(starts)]


def allgather(comm: MPI.Intracomm, value: object, function: str) -> list[Any]:
    """Every rank's ``value``, which pickle can hold, in rank order. Collective; ``function`` is the caller's name.

    Raises on all ranks: MismatchError when another rank is in another call; PeerError when one has died.
    """
    state = state_of(comm)
    if state.size == 1:
        return [value]
    state.prepare(function)
    everyone: list[Any] = []

    def steps(progress: Progress) -> Steps:
        yield from agree(state.comm, state.common, Request(function), progress)
        everyone.extend((yield from allgather_steps(state.comm, value, progress)))

    state.lane.submit(steps, function).wait()
    return everyone


def broadcast(comm: MPI.Intracomm, value: object, function: str, root: int = 0) -> Any:
    """Rank ``root``'s ``value`` on every rank; see ``allgather``."""
    return allgather(comm, value if comm.Get_rank() == root else None, function)[root]
