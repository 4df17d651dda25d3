"""Before ranks exchange anything, they find out whether they all mean the same thing.

One library AllReduce of a few integers carries a hash of what this rank asks for, whether its arguments are bad, and
whether it needs the library's own call. On any difference a second exchange, in words, lets every rank raise an error
that names the ranks that differ. What is new to one rank may be known to another, so every call does this.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b

import numpy as np
from mpi4py import MPI

from bitring.collectives.errors import MismatchError, PeerError
from bitring.collectives.executor import Progress, Steps

_LIBRARY = 1
_BAD = 2


def _number(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "little")


class Request:
    """What one rank asks for.

    ``function`` is the call's name; ``terms`` what all ranks must give alike, as ordered (name, value) pairs;
    ``library`` whether this rank needs the MPI library's own call; ``error`` what is wrong with its arguments.
    """

    def __init__(
        self,
        function: str,
        terms: dict[str, object] | None = None,
        library: bool = False,
        error: Exception | None = None,
    ) -> None:
        self.function = function
        self.terms: dict[str, object] = terms or {}
        self.library = library
        self.error = error

    def words(self) -> str:
        """The request as the error message shows it."""
        return f"{self.function}({', '.join(f'{k}={v}' for k, v in self.terms.items())})"


def agree(comm: MPI.Intracomm, request: Request, progress: Progress) -> Steps:
    """Raise on all ranks alike unless all ask for the same; sets ``request.library`` if any rank needs it.

    A rank's own argument error is raised on that rank as it is, and as PeerError on the others. Ranks that name
    different functions, or different terms while none needs the library's call, get MismatchError.
    """
    function, terms = _number(request.function), _number(request.words())
    flags = (_LIBRARY if request.library else 0) | (_BAD if request.error else 0)
    mine = np.array([function, ~function, terms, ~terms, flags & _LIBRARY, flags & _BAD], np.int64)
    most = np.empty_like(mine)
    yield from wait_for(comm.Iallreduce(mine, most, MPI.MAX), progress)
    same_function = most[0] == ~most[1]
    same_terms = most[2] == ~most[3]
    request.library = bool(most[4])
    if same_function and not most[5] and (same_terms or request.library):
        return
    progress.moves += 1
    error = "" if request.error is None else f"{type(request.error).__name__}: {request.error}"
    everyone: list[tuple[str, dict[str, str], str]] = comm.allgather(
        (request.function, {k: str(v) for k, v in request.terms.items()}, error)
    )
    if request.error is not None:
        raise request.error
    bad = [(r, text) for r, (_, _, text) in enumerate(everyone) if text]
    if bad and same_function:
        raise PeerError(f"{request.function}: rank {bad[0][0]} could not take part: {bad[0][1]}")
    raise MismatchError(_difference(everyone))


def _difference(everyone: list[tuple[str, dict[str, str], str]]) -> str:
    """Which ranks differ from most, and in what."""
    functions = Counter(function for function, _, _ in everyone)
    usual, _ = functions.most_common(1)[0]
    others = [r for r, (function, _, _) in enumerate(everyone) if function != usual]
    if others:
        return f"ranks called different collectives: {usual}, but rank {others[0]} called {everyone[others[0]][0]}"
    for term in everyone[0][1]:
        values = [terms[term] for _, terms, _ in everyone]
        most, _ = Counter(values).most_common(1)[0]
        differing = [r for r, value in enumerate(values) if value != most]
        if differing:
            ranks = f"rank {differing[0]}" if len(differing) == 1 else f"ranks {differing}"
            agreeing = values.index(most)
            return (
                f"{usual}: ranks disagree on {term}: {ranks} gave {values[differing[0]]}, rank {agreeing} gave {most}"
            )
    return f"{usual}: ranks disagree: {everyone}"


def wait_for(request: MPI.Request, progress: Progress) -> Steps:
    """Yield until one of the library's requests is complete."""
    while not request.Test():
        yield
    progress.moves += 1
