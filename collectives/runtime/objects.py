"""Python objects exchanged between all ranks by bitring itself.

The MPI library's blocking calls would wait for ever for a rank that is gone, and keep Ctrl-C waiting. These are jobs of
the communicator's queue: watched, interruptible, under ``BITRING_TIMEOUT``; the ranks first agree that they make the
same call. So every communicator is protected, MPI.COMM_WORLD as well as a ``bitring.Communicator``.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from mpi4py import MPI

from bitring.collectives.interop.library_steps import allgather_bytes
from bitring.collectives.interop.steps import Progress, StepsTo
from bitring.collectives.runtime.agreement import Request, agree
from bitring.collectives.runtime.context import Context, context_of

T = TypeVar("T")


def allgather(comm: MPI.Intracomm, value: object, function: str) -> list[Any]:
    """Every rank's ``value``, which pickle can hold, in rank order. Collective; ``function`` is the caller's name.

    Raises on all ranks: MismatchError when another rank is in another call; PeerError when one has died; what pickle
    says of a rank's value there, and PeerError on the others.
    """
    return gather(context_of(comm), value, function)


def broadcast(comm: MPI.Intracomm, value: object, function: str, root: int = 0) -> Any:
    """Rank ``root``'s ``value`` on every rank; see ``allgather``."""
    return allgather(comm, value if comm.Get_rank() == root else None, function)[root]


def gather(context: Context, value: object, function: str) -> list[Any]:
    """``allgather`` on the communicator of ``context``."""
    if context.size == 1:
        return [value]
    pickled, error = b"", None
    try:
        pickled = pickle.dumps(value)
    except Exception as problem:  # whatever it is, the other ranks must not wait for this one
        error = problem
    everyone = agreed_job(context, lambda progress: allgather_bytes(context.comm, pickled, progress), function, error)
    return list(map(pickle.loads, everyone))


def agreed_job(
    context: Context, steps: Callable[[Progress], StepsTo[T]], function: str, error: Exception | None = None
) -> T:
    """Run ``steps`` as a job once all ranks have come to it, and return their result. Collective and blocking.

    ``error``: the reason why this rank cannot take part; raised here, and as PeerError on the others.
    """

    def agreed(progress: Progress) -> StepsTo[T]:
        yield from agree(context.comm, context.roll_call, Request(function, error=error), progress)
        return (yield from steps(progress))

    with context.turn(function):
        context.prepare(function, error)
        return context.queue.call(agreed, function)
