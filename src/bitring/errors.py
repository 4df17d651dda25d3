"""The errors that ranks raise together, so that no rank waits for one that has given up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class MismatchError(ValueError):
    """Ranks asked for different things in one collective call; the text names the ranks that differ."""


class PeerError(RuntimeError):
    """Another rank could not take part in a collective call (its arguments were bad, or it failed); names the rank."""


class DeadRankError(PeerError):
    """Another rank's process has died, or has left the job while it was waited for.

    ``ranks``: the ranks of the communicator that are gone, ascending; empty where the MPI library does not say which.
    """

    def __init__(self, text: str, ranks: Iterable[int]) -> None:
        super().__init__(text)
        self.ranks = tuple(sorted(ranks))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.ranks)


class NonFiniteError(FloatingPointError):
    """A gradient holds NaN or Inf on some rank. Raised on all ranks, before anything is changed."""


def uncopyable(thing: object, instead: str) -> TypeError:
    """The error of ``copy`` and ``pickle`` for a thing that stands for this process's place among the ranks."""
    return TypeError(
        f"{type(thing).__name__}: cannot be copied or pickled, as it is tied to this process and its MPI communicator; "
        f"{instead}"
    )


class RefusedError(Exception):
    """Inside a job: the MPI library refuses this rank's arguments; nothing is under way. The job raises the cause."""


def text_of(error: BaseException) -> str:
    """Text of an exception, also one of a user's class whose own text cannot be had or holds no characters."""
    try:
        return str(error).encode(errors="replace").decode()
    except Exception as problem:
        return f"(no text: its __str__ raised {type(problem).__name__})"
