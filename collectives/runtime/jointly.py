"""Joint work: each rank does it by itself, and it has ended well only when it has on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from mpi4py import MPI

from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.objects import allgather
from bitring.errors import PeerError, text_of

T = TypeVar("T")

Kinds = tuple[type[Exception], ...]
"""Exceptions that all ranks raise alike; of others a rank hears by a PeerError."""


def jointly(comm: MPI.Intracomm, function: str, work: Callable[[], T], alike: Kinds = ()) -> T:
    """Return this rank's result of ``work`` once it has ended well on all. Collective; ``function``: the caller's name.

    When it raises anything on any rank, all raise, as ``raise_everywhere`` does.
    """
    made: list[T] = []
    problem: BaseException | None = None
    try:
        made.append(work())
    except BaseException as error:  # whatever it is, KeyboardInterrupt too: the other ranks must not wait
        problem = error
    raise_everywhere(comm, function, problem, alike)
    return made[0]


def raise_everywhere(comm: MPI.Intracomm, function: str, error: BaseException | None, alike: Kinds = ()) -> None:
    """Raise on all ranks what ``common_error`` returns, unless that is None. Collective."""
    common = common_error(comm, function, error, alike)
    if common is not None:
        raise common


def common_error(
    comm: MPI.Intracomm, function: str, error: BaseException | None, alike: Kinds = ()
) -> BaseException | None:
    """The exception for this rank to raise when any rank has an ``error``; None when none has. Collective.

    A rank raises its own; the others the same kind, with the same text, where it is one of ``alike``, else PeerError,
    which names the rank and the exception. All have heard of it then: even an interrupt leaves the communicator usable.
    """
    everyone = allgather(comm, _described(error, alike), function)
    if any(said is not None for said in everyone):
        context_of(comm).exchanged()  # all raise
    if error is not None:
        return error
    for rank, said in enumerate(everyone):
        if said is not None:
            kind, name, text = said
            return PeerError(f"{function}: rank {rank} raised {name}: {text}") if kind is None else kind(text)
    return None


def _described(problem: BaseException | None, alike: Kinds) -> tuple[type[Exception] | None, str, str] | None:
    """The kind that the other ranks raise, None for PeerError; the exception's name; and its text."""
    if problem is None:
        return None
    # Classes that other ranks know, too.
    known = (kind for kind in type(problem).__mro__ if kind in alike or kind.__module__ == "builtins")
    kind = next((kind for kind in known if issubclass(kind, alike)), None) if alike else None
    return kind, type(problem).__name__, text_of(problem)
