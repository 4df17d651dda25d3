"""The MPI library's own collectives as parts of jobs, so that the engine watches every wait in them."""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.steps import Progress, StepsTo, wait_for

T = TypeVar("T")


def allgather_steps(comm: MPI.Intracomm, value: object, progress: Progress) -> StepsTo[list[Any]]:
    """Every rank's ``value``, which pickle can hold, in rank order. ``comm`` is private to bitring."""
    return list(map(pickle.loads, (yield from allgather_bytes(comm, pickle.dumps(value), progress))))


def allgather_bytes(comm: MPI.Intracomm, value: bytes, progress: Progress) -> StepsTo[list[bytes]]:
    """Every rank's bytes, as many as it likes, in rank order. ``comm`` is private to bitring."""
    mine = np.frombuffer(value, np.uint8)
    lengths = np.zeros(comm.Get_size(), np.int64)
    lengths[comm.Get_rank()] = mine.size
    before, progress.exchanging = progress.exchanging, True
    yield from wait_for(comm.Iallgather(MPI.IN_PLACE, lengths), progress)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    everyone = np.empty(int(starts[-1]), np.uint8)
    everyone[starts[comm.Get_rank()] : starts[comm.Get_rank() + 1]] = mine
    yield from wait_for(comm.Iallgatherv(MPI.IN_PLACE, [everyone, lengths, starts[:-1], MPI.BYTE]), progress)
    progress.exchanging = before
    return [everyone[a:b].tobytes() for a, b in itertools.pairwise(starts)]


class NoCommunicatorError(MPI.Exception):
    """The library's error where it makes no communicator, as when too many are in use."""

    def __str__(self) -> str:
        return (
            "the MPI library could not duplicate the communicator; where too many are in use (MPICH has 2046 in all), "
            f"free some: {super().__str__()}"
        )


def beside(call: Callable[[], T], progress: Progress) -> StepsTo[T]:
    """Run ``call``, one of the library's that has no nonblocking form, in a thread of its own; return its result.

    So a rank that dies in it does not keep the others for ever. Below MPI.THREAD_MULTIPLE it is called at once, in this
    thread. The caller makes sure that all ranks are there, since the thread cannot be stopped.
    """
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        return call()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="bitring-library", daemon=True)
    thread.start()
    while thread.is_alive():
        yield
    progress.moves += 1
    if errors:
        raise errors[0]
    return results[0]


def comm_of(ranks: Sequence[int], comm: MPI.Intracomm, tag: int, progress: Progress) -> StepsTo[MPI.Intracomm]:
    """A communicator of these ranks of ``comm``, who all take part; other ranks do not, and may be dead."""

    def make() -> MPI.Intracomm:
        group = comm.Get_group().Incl(ranks)
        try:
            return MPI.Intracomm(comm.Create_group(group, tag))
        finally:
            group.Free()

    return (yield from beside(make, progress))
