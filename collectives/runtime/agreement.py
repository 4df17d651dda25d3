"""Agreement: before ranks exchange anything they compare what each of them asks for.

A hash of what this rank asks for, whether its arguments are bad, and whether it needs the library's own call go from
rank to rank in a roll call (``roll_call``); before there is one, and without the native engine, through one library
AllReduce of a few integers. On any difference a second exchange, in words, lets every rank raise an error that names
the ranks that differ. What is new to one rank may be known to another, so every call does this.
"""

from __future__ import annotations

import functools
import pickle
from collections import Counter
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.steps import Progress, Steps, StepsTo, run, wait_for
from bitring.collectives.runtime.ports import read_news
from bitring.collectives.runtime.tags import WORDS_TAG
from bitring.errors import MismatchError, PeerError, text_of
from bitring.native import extension


def _number(text: str, nbytes: int = 7) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=nbytes).digest(), "little")


_PLAIN = (str, int, np.dtype)
"""Types whose values are equal exactly where their texts are."""


@functools.lru_cache(1024)
def _kind(function: str, terms: tuple[tuple[str, object], ...]) -> int:
    return _number(function, 4) << 32 | _number(str(dict(terms)), 4)


class Request:
    """The request of one rank.

    ``function``: the call's name. ``terms``: settings that must be identical on all ranks, ordered (name, value) pairs.
    ``library``: whether this rank needs the MPI library's own call. ``error``: the mistake in its arguments, if any.
    ``flag``: one bit of each rank; after ``agree`` it is set where any rank had set it.
    ``refused``: the call was not made, since another thread was in one.
    """

    def __init__(
        self,
        function: str,
        terms: dict[str, object] | None = None,
        library: bool = False,
        error: Exception | None = None,
        flag: bool = False,
        refused: bool = False,
    ) -> None:
        self.function = function
        self.terms: dict[str, object] = terms or {}
        self.library = library
        self.error = error
        self.flag = flag
        self.refused = refused

    def words(self) -> str:
        """The request as the error message shows it."""
        return f"{self.function}({', '.join(f'{k}={v}' for k, v in self.terms.items())})"

    @property
    def kind(self) -> int:
        """64 bits of it, but for its count, for the native engine; the upper half is the function's."""
        terms = [
            (name, value if isinstance(value, _PLAIN) else str(value))
            for name, value in self.terms.items()
            if name != "count"
        ]
        return _kind(self.function, tuple(terms))

    @property
    def signature(self) -> int:
        """64 bits of it for the native engine."""
        count = self.terms.get("count", 0)
        assert isinstance(count, int)
        return extension.with_count(self.kind, count)


class Verdict(NamedTuple):
    """A comparison of all ranks' requests: the same or not, and whether any needs the library, has an error, a flag."""

    same: bool
    same_function: bool
    library: bool
    bad: bool
    flag: bool


def verdict_of(native_verdict: Any) -> Verdict:
    """The native engine's verdict."""
    of = native_verdict
    return Verdict(of.same, of.same_function, of.library, of.bad, of.told)


def agree(comm: MPI.Intracomm, roll_call: Any, request: Request, progress: Progress) -> Steps:
    """Raise on all ranks unless all ask for the same; sets ``request.library`` if any rank needs it, and
    ``request.flag`` if any rank has it set.

    ``roll_call``: the native one of all ranks of ``comm``; None for none. A rank's own argument error is raised there
    as it is, and as PeerError on the others. Ranks that name different functions, or different terms while none
    needs the library's call, get MismatchError.
    """
    if roll_call is None:
        check = Check(comm, request)
        yield from wait_for(check.request, progress)
        verdict = check.verdict
    else:
        operation = extension.Agreement(
            roll_call, request.signature, library=request.library, bad=request.error is not None, told=request.flag
        )
        yield from run(operation, progress)
        verdict = verdict_of(operation.verdict)
    yield from conclude(comm, request, verdict, progress)


def checked(roll_call: Any, request: Request, operation: Any) -> Any:
    """A native operation: ``operation``, begun when all ranks have been found to ask for the same as ``request``.

    ``conclude`` raises what its verdict means where it ``disagrees``.
    """
    return extension.Checked(roll_call, request.signature, operation)


class Check:
    """The exchange of hashes through the library, under way; ``verdict`` is there when ``request`` is complete."""

    def __init__(self, comm: MPI.Intracomm, request: Request) -> None:
        function, terms = _number(request.function), _number(request.words())
        bad = request.error is not None
        self._most = np.array([function, ~function, terms, ~terms, request.library, bad, request.flag], np.int64)
        # In place: mpi4py's request (4.1.2) keeps a receive buffer alive, but not a send buffer.
        self.request = comm.Iallreduce(MPI.IN_PLACE, self._most, MPI.MAX)

    @property
    def verdict(self) -> Verdict:
        """The verdict of all ranks' hashes."""
        most = self._most
        same, same_function = bool(most[2] == ~most[3]), bool(most[0] == ~most[1])
        return Verdict(same, same_function, bool(most[4]), bool(most[5]), bool(most[6]))


def conclude(comm: MPI.Intracomm, request: Request, verdict: Verdict, progress: Progress) -> Steps:
    """End ``agree``: raise by the verdict, which is identical on all ranks."""
    request.library, request.flag = verdict.library, verdict.flag
    if verdict.same_function and not verdict.bad and (verdict.same or verdict.library):
        return
    error = "" if request.error is None else f"{type(request.error).__name__}: {text_of(request.error)}"
    terms = {name: str(value) for name, value in request.terms.items()}
    everyone = yield from _words_of_all(comm, (request.function, terms, error, request.refused), progress)
    refused = [(r, text) for r, (_, _, text, is_refused) in enumerate(everyone) if is_refused]
    if refused:
        progress.ends = f"two threads of rank {refused[0][0]} were in its calls at the same time"
    if request.error is not None:
        raise request.error
    if refused:
        raise MismatchError(f"{request.function}: rank {refused[0][0]} refused its call: {refused[0][1]}")
    bad = [(r, text) for r, (_, _, text, _) in enumerate(everyone) if text]
    if bad and verdict.same_function:
        raise PeerError(f"{request.function}: rank {bad[0][0]} could not take part: {bad[0][1]}")
    raise MismatchError(_difference(everyone))


def _words_of_all(comm: MPI.Intracomm, words: object, progress: Progress) -> StepsTo[list[Any]]:
    """Every rank's words, in rank order, by messages: a collective of the library may be under way on some ranks.

    So it is where a run of a plan began beside its agreement.
    """
    others = [rank for rank in range(comm.Get_size()) if rank != comm.Get_rank()]
    mine = np.frombuffer(pickle.dumps(words), np.uint8)
    length = np.array([mine.size], np.int64)
    lengths = np.zeros((comm.Get_size(), 1), np.int64)
    everyone: list[Any] = [words] * comm.Get_size()
    before, progress.exchanging, progress.peers = progress.exchanging, True, frozenset(others)
    due = [comm.Irecv(lengths[rank], rank, WORDS_TAG) for rank in others]
    yield from read_news()
    sent = [comm.Isend(x, rank, WORDS_TAG) for rank in others for x in (length, mine)]
    for rank, request in zip(others, due, strict=True):
        yield from wait_for(request, progress)
        theirs = np.empty(int(lengths[rank, 0]), np.uint8)
        yield from wait_for(comm.Irecv(theirs, rank, WORDS_TAG), progress)
        everyone[rank] = pickle.loads(theirs.tobytes())
    for request in sent:
        yield from wait_for(request, progress)
    progress.exchanging = before
    return everyone


def _difference(everyone: list[tuple[str, dict[str, str], str, bool]]) -> str:
    """Name the ranks that differ from most, and the difference."""
    functions = Counter(function for function, *_ in everyone)
    usual, _ = functions.most_common(1)[0]
    others = [r for r, (function, *_) in enumerate(everyone) if function != usual]
    if others:
        return f"ranks called different collectives: {usual}, but rank {others[0]} called {everyone[others[0]][0]}"
    for term in dict.fromkeys(term for _, terms, *_ in everyone for term in terms):
        values = [terms.get(term, "none") for _, terms, *_ in everyone]
        most, _ = Counter(values).most_common(1)[0]
        differing = [r for r, value in enumerate(values) if value != most]
        if differing:
            ranks = f"rank {differing[0]}" if len(differing) == 1 else f"ranks {differing}"
            agreeing = values.index(most)
            return (
                f"{usual}: ranks disagree on {term}: {ranks} gave {values[differing[0]]}, rank {agreeing} gave {most}"
            )
    return f"{usual}: ranks disagree: {everyone}"
