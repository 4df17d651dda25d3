"""The communicator on which JAX's computations exchange: their own, since they run in threads of JAX's."""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Generator

from mpi4py import MPI

from bitring.collectives.communicator import Communicator
from bitring.collectives.runtime.context import context_of, given_comm
from bitring.jax.order import settle


class _Channel(Communicator):
    """It is freed when what was dispatched is done."""

    def Free(self) -> None:  # noqa: N802
        """See Communicator."""
        settle()
        super().Free()


def require_channel(channel: Communicator, function: str) -> None:
    """Raise RuntimeError when it was freed."""
    if channel == MPI.COMM_NULL:
        raise RuntimeError(f"{function}: the communicator that this was compiled for is freed")


def channel_of(comm: MPI.Intracomm | None, function: str) -> Communicator:
    """A duplicate of ``comm``, made once, kept with it, and freed with it. Collective when it is made."""
    base = given_comm(comm, function)
    kept = context_of(base).kept
    if "jax" not in kept:
        kept["jax"] = _Channel(base).Dup()
        context_of(kept["jax"])
        # A rank that has come to its end first waits for what it has dispatched: the others need its part. Functions
        # are called last to first, so this one must come after bitring's own, which a first context registers.
        atexit.unregister(settle)
        atexit.register(settle)
    channel: Communicator = kept["jax"]
    return channel


@contextlib.contextmanager
def heard_by_all(channel: Communicator, function: str) -> Generator[None]:
    """Around what may find this rank's arguments bad: the others, in their next call, must not wait for it."""
    try:
        yield
    except Exception as error:
        settle()  # what is under way comes first
        context = context_of(channel)
        with context.turn(function):
            context.refuse(function, error)
        raise
