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


_UNTOLD = ("order", "memory")
"""Terms of which a rank whose arguments only the library reads knows nothing: it names those of most."""

_PLAIN = (str, int, np.dtype)
"""Types whose values are equal exactly where their texts are."""


_calls: dict[int, tuple[str, dict[str, str]]] = {}
"""Functions and terms of the requests that this process has made, by signature; of many those made last."""

_KNOWN_CALLS = 1024

MEETING = "a meeting of a trainer's ranks"
"""Name of a run by which they find out whether all are at the same place; see ``meeting_signature``."""

_FUNCTIONS = [
    *("Allreduce", "allreduce", "Iallreduce", "Allreduce_init", "Reduce", "Reduce_scatter_block", "Allgather"),
    *("Iallgather", "Bcast", "Dup", "Clone", "Split", "Split_type", "Create", "empty", "Free"),
    MEETING,
]
"""Functions that another rank may have called, and this one never."""

_MEETING = _number(MEETING, 4) << 32


def meeting_signature(place: int) -> int:
    """The signature of a run in which ranks find out whether all are at ``place``, of whose number 32 bits count."""
    return _MEETING | place & 0xFFFFFFFF


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
        signature: int = extension.with_count(self.kind, count)
        if signature not in _calls:
            if len(_calls) == _KNOWN_CALLS:
                del _calls[next(iter(_calls))]
            _calls[signature] = self.function, {name: str(value) for name, value in self.terms.items()}
        return signature


class Verdict(NamedTuple):
    """A comparison of all ranks' requests: the same or not, and whether any needs the library, has an error, a flag.

    ``earlier``: signatures of the calls that this rank has made since all met, without waiting; known where they are
    not the same. ``stranger``: a rank that does something else, of the signature ``strange``, and does not wait, so
    that not all have heard what this one has heard; negative where all have.
    """

    same: bool
    same_function: bool
    library: bool
    bad: bool
    flag: bool
    earlier: tuple[int, ...] = ()
    stranger: int = -1
    strange: int = 0


def verdict_of(native_verdict: Any) -> Verdict:
    """The native engine's verdict."""
    of = native_verdict
    earlier = tuple(of.earlier) if not of.same else ()
    return Verdict(of.same, of.same_function, of.library, of.bad, of.told, earlier, of.stranger, of.strange)


def agree(comm: MPI.Intracomm, roll_call: Any, request: Request, progress: Progress) -> Steps:
    """Raise on all ranks unless all ask for the same; sets ``request.library`` if any rank needs it, and
    ``request.flag`` if any rank has it set.

    ``roll_call``: the native one of all ranks of ``comm``; None for none. A rank's own argument error is raised there
    as it is, and as PeerError on the others. Ranks that name different functions or different terms get MismatchError.
    Of arguments that only the library reads, those terms count that can be told.
    """
    progress.mistake = request.error
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
    progress.mistake = None


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


def met(verdict: Verdict) -> bool:
    """Whether all ranks have said a ``meeting_signature``, be it the same or not, and all have heard so."""
    return verdict.same_function and not verdict.bad and verdict.stranger < 0


def conclude(comm: MPI.Intracomm, request: Request, verdict: Verdict, progress: Progress) -> Steps:
    """End ``agree``: raise by the verdict, which is identical on all ranks unless this one has met a stranger.

    Then it alone raises, the communicator is of no use any more, and the others are told.
    """
    told = [name for name in request.terms if not (request.library and name in _UNTOLD)]
    request.library, request.flag = verdict.library, verdict.flag
    if verdict.same_function and not verdict.bad and verdict.same:
        return
    error = "" if request.error is None else f"{type(request.error).__name__}: {text_of(request.error)}"
    terms = {name: str(request.terms[name]) for name in told}
    mine = _Words(request.function, terms, error, request.refused)
    if verdict.stranger >= 0:
        progress.exchanging, progress.told = True, _strange(comm.Get_rank(), mine, verdict)
        raise request.error or MismatchError(progress.told)
    earlier = [words_of(signature) for signature in verdict.earlier]
    courses = yield from _words_of_all(comm, [*earlier, mine], progress)
    refused = [(r, course[-1].error) for r, course in enumerate(courses) if course[-1].refused]
    if refused:
        progress.ends = f"two threads of rank {refused[0][0]} were in its calls at the same time"
    if request.error is not None:
        raise request.error
    if refused:
        raise MismatchError(f"{request.function}: rank {refused[0][0]} refused its call: {refused[0][1]}")
    calls = dict(enumerate(_first_different(courses)))
    bad = [(r, call.error) for r, call in calls.items() if call.error]
    if bad and len({call.function for call in calls.values()}) == 1:
        raise PeerError(f"{calls[0].function}: rank {bad[0][0]} could not take part: {bad[0][1]}")
    difference = _difference(calls, verdict.library)
    if difference is not None:
        raise MismatchError(difference)


class _Words(NamedTuple):
    """One rank's request as others hear it. ``error``: of its arguments, or empty."""

    function: str
    terms: dict[str, str]
    error: str = ""
    refused: bool = False


def words_of(signature: int) -> _Words:
    """A request by its signature, as far as this process knows it."""
    if signature in _calls:
        return _Words(*_calls[signature])
    names = [*_FUNCTIONS, *(function for function, _ in _calls.values())]
    return _Words(next((name for name in names if _number(name, 4) == signature >> 32), "something else"), {})


def _first_different(courses: list[list[_Words]]) -> list[_Words]:
    """Of the ranks' calls since all met, in order, the first ones that are not the same; the last ones of all are now.

    A rank that has made fewer calls than others waits in its last one.
    """
    for at in range(min(map(len, courses))):
        calls = [course[at] for course in courses]
        if any((call.function, call.terms, call.error) != (calls[0].function, calls[0].terms, "") for call in calls):
            return calls
    return [course[-1] for course in courses]


def _strange(rank: int, mine: _Words, verdict: Verdict) -> str:
    """The difference between this rank's call and that of the stranger it has met."""
    if mine.error:
        return f"{mine.function}: rank {rank} could not take part: {mine.error}"
    if verdict.bad:
        return f"{mine.function}: rank {verdict.stranger} could not take part"
    return difference_of({rank: mine, verdict.stranger: words_of(verdict.strange)})


def difference_of(calls: dict[int, _Words]) -> str:
    """The difference between some ranks' calls, in words."""
    difference = _difference(calls, library=True)
    function = next(iter(calls.values())).function
    return difference or f"{function}: ranks {list(calls)} gave different arguments, or made different calls before it"


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


def _difference(calls: dict[int, _Words], library: bool) -> str | None:
    """Name the ranks whose calls differ from most, and the difference.

    ``library``: what cannot be told of the arguments of some may be the same; None where all else is.
    """
    functions = Counter(call.function for call in calls.values())
    usual, _ = functions.most_common(1)[0]
    others = [rank for rank, call in calls.items() if call.function != usual]
    if others:
        return f"ranks called different collectives: {usual}, but rank {others[0]} called {calls[others[0]].function}"
    for term in dict.fromkeys(term for call in calls.values() for term in call.terms):
        values = {rank: call.terms.get(term, None if library else "none") for rank, call in calls.items()}
        most, _ = Counter(value for value in values.values() if value is not None).most_common(1)[0]
        differing = [rank for rank, value in values.items() if value not in (most, None)]
        if differing:
            ranks = f"rank {differing[0]}" if len(differing) == 1 else f"ranks {differing}"
            agreeing = next(rank for rank, value in values.items() if value == most)
            return (
                f"{usual}: ranks disagree on {term}: {ranks} gave {values[differing[0]]}, rank {agreeing} gave {most}"
            )
    return None if library else f"{usual}: ranks disagree: {calls}"
