"""Work of a job as the engine sees it: steps that never block, and their progress.

Work waits for one of the library's requests (``wait_for``) or for a native operation (``run``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from mpi4py import MPI

T = TypeVar("T")

StepsTo = Generator[Any, None, T]
"""Steps that return something."""

Steps = StepsTo[None]
"""A job's work: does what it can, and yields when it has to wait: a native operation that has begun, which the engine
takes to its end without Python, or None. It is resumed when the operation is over, and now and then before."""


class Progress:
    """Progress of a running job, read by the engine: whether it moved, and the peers that it waits for.

    ``exchanging``: messages are under way, so that an error now leaves the communicator unusable. ``ends``: why all
    ranks have agreed that no job may follow this one. ``holds``: what has memory that messages may still arrive in, and
    must stay when the job is cut short. ``patience``: seconds that it may wait whatever the timeout, for work that is
    known to take long on another rank. ``idle``: nothing is expected, so that it may be looked at seldom.
    ``told``: what the other ranks are to hear where this one alone ends it with an error. ``mistake``: this rank's own,
    which it raises when the others do not come because of it. ``outlives``: is told of ranks that are gone, and returns
    whether the job goes on without them; None: it never does.
    """

    def __init__(self) -> None:
        self.moves = 0
        self.patience = 0.0
        self.peers: frozenset[int] = frozenset()
        self.exchanging = False
        self.ends = ""
        self.told = ""
        self.mistake: Exception | None = None
        self.outlives: Callable[[Sequence[int]], bool] | None = None
        self.holds: object = None
        self.idle = False


def wait_for(request: MPI.Request, progress: Progress) -> Steps:
    """Yield until one of the library's requests is complete."""
    while not request.Test():
        yield
    progress.moves += 1


def within(surroundings: Callable[[], AbstractContextManager[object]], steps: Steps) -> Steps:
    """The steps, each in surroundings of its own: threads take turns with a job, and what is set is one thread's."""
    try:
        while True:
            with surroundings():
                try:
                    operation = next(steps)
                except StopIteration:
                    return
            yield operation
    finally:
        steps.close()


def run(operation: Any, progress: Progress) -> Steps:
    """Run a native operation, as a job's steps. Raises MPI.Exception for the MPI library's errors.

    ValueError where an encoder failed.
    """
    operation.begin()
    yield from finish(operation, progress)


def finish(operation: Any, progress: Progress) -> Steps:
    """The rest of a native operation that has begun."""
    progress.exchanging = True
    while not operation.over:
        yield operation
    progress.exchanging = False
    if operation.error:
        progress.exchanging = True
        if operation.reason is not None:
            raise ValueError(operation.reason)
        raise MPI.Exception(operation.error)
