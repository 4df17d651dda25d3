"""The jobs of one communicator: they run one after the other, in the order in which they were submitted.

MPI asks that this order be the same on all ranks. Jobs of different communicators run side by side.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from bitring.collectives.interop.library_steps import NoCommunicatorError
from bitring.collectives.interop.steps import Progress, Steps, StepsTo
from bitring.collectives.node.node_group import LEFT_SECONDS, NodeGroup
from bitring.collectives.runtime.agreement import difference_of, words_of
from bitring.collectives.runtime.card import CARD_NBYTES, Card
from bitring.collectives.runtime.contact import Contact
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.job import Job
from bitring.collectives.runtime.keeping import never_free
from bitring.collectives.runtime.ports import ports
from bitring.collectives.runtime.rank_numbers import numbers_in
from bitring.collectives.runtime.watch import ADVICE, are, timeout
from bitring.errors import DeadRankError, MismatchError

T = TypeVar("T")

_FEW = 64
"""So many ranks are watched of those that all exchange messages; of others' ends words tell."""

_DUPLICATE_SECONDS = 10.0

_GENTLE_SECONDS = 1e-3


class JobQueue:
    """The jobs of one communicator, in order. ``comm`` is bitring's private duplicate of it.

    ``made``: the request that makes ``comm``, for which the first job waits; None when it is there. ``places``: the
    ranks' numbers in MPI.COMM_WORLD.
    """

    def __init__(self, comm: MPI.Intracomm, made: MPI.Request | None, rank: int, places: Sequence[int]) -> None:
        self.comm = comm
        self._places = places
        self._made = made
        self.rank = rank
        self.jobs: deque[Job] = deque()
        self.count = 0  # jobs submitted so far; the same on all ranks
        self.broken: str | None = None
        self.dead: list[int] | None = None  # ranks that are gone, where it is broken because of that
        self._outlived: set[int] = set()  # ranks that are gone, without which jobs go on
        self.wrecks: list[object] = []  # what was cut short: the library may still write to their memory
        self.contact: Contact | None = None  # past the MPI library; made by the first job
        self._meeting: tuple[MPI.Request, Any] | None = None  # while it is made
        self.shared: NodeGroup | None = None
        """The group of the communicator's ranks on this node."""
        self.place: Callable[[], tuple[int, list[int], bool]] | None = None
        """Where calls may be made one way: how often all ranks have met, this rank's calls since then, and whether the
        last one is under way and waits for all."""
        self._untold = ""  # an error of all ranks that this one's caller has not heard of
        self._fast_path: Any = None
        self._occupier = 0  # the thread that is in a call that goes by the engine
        self._ended = False  # all ranks have agreed that what comes now must not run
        self.last_word: Job | None = None  # by which the others are to learn that this rank ends the communicator
        self._kept_to: tuple[bool, int] | None = None  # what ``rest`` noted last
        self._resting = threading.Lock()
        engine.queues.add(self)

    @property
    def fast_path(self) -> Any:
        """The native way past the engine; None where there is none."""
        return self._fast_path

    @fast_path.setter
    def fast_path(self, fast_path: Any) -> None:
        self._fast_path = fast_path
        self._kept_to = None
        self.rest()

    def rest(self) -> None:
        """Note whether there is nothing to do, so that a native operation may be run past the engine, and by whom."""
        if self._fast_path is None:
            return
        with self._resting:
            busy = bool(self.jobs or self.broken or self._made is not None or engine.stopped or self._knows_of_death())
            now = busy or engine.serves_in_waits, self._occupier
            if now != self._kept_to:
                self._kept_to = now
                self._fast_path.keep_to(*now)

    def occupy(self, thread: int) -> None:
        """Note which thread is in a call, 0 for none: until its end no other may run anything past the engine."""
        self._occupier = thread
        self.rest()

    def check(self, what: str) -> None:
        """Raise RuntimeError when no further job may be submitted, DeadRankError where that is for a death.

        MismatchError, once, where ranks' calls before have differed and this one has made another in the meantime.
        """
        if self.hears_of_difference():
            text, self._untold = self._untold, ""
            if text:
                raise MismatchError(f"{text}; found when this rank had gone on to {what}, which was not made")
        if self.broken:
            text = f"{what}: this communicator is unusable since {self.broken}"
            raise RuntimeError(f"{text}; {ADVICE}") if self.dead is None else DeadRankError(text, self.dead)

    def breaks(self, why: str, wreck: object = None) -> None:
        """Refuse every further job."""
        self.broken = self.broken or why
        if wreck is not None:
            self.wrecks.append(wreck)
        self.rest()

    def loses(self, gone: Sequence[int], wreck: object = None, goes_on: bool = False) -> None:
        """Refuse every further job, since ranks are gone, unless it ``goes_on``; and tell others, who may not know."""
        if goes_on:
            engine.outlives = True
            self._outlived |= set(gone)
            self.rest()
        else:
            engine.bereaved = True
            self.dead = list(gone)
            self.breaks(f"{are(gone)} gone", wreck)
        if self.contact is not None:
            self.contact.tell_gone(gone)

    def ends(self, why: str, last: Job) -> None:
        """Refuse every further job and those that have not begun, as all ranks do after the same one, ``last``."""
        self._ended = True
        self.breaks(why, last)

    def cut_short(self, what: str, error: BaseException | None, wreck: object = None, told: str = "") -> None:
        """Refuse every further job, since others may still exchange what this rank has given up; and tell them.

        ``wreck`` holds the memory of what was given up, and is kept. ``told``: the error that the others are to raise.
        """
        if told:
            self._untold = ""  # the caller hears of it now
        if not self.broken:
            self.breaks(f"{what} was cut short by {type(error).__name__}", wreck)
            if self.contact is not None:
                self.contact.tell_failed(self._at_place(told) if told else "")
            elif self._made is not None or self.comm.Get_size() > 1:

                def tell(progress: Progress) -> Steps:
                    yield from ()
                    if self.contact is not None:
                        self.contact.tell_failed()

                engine.enqueue(Job(self, tell, what, self.count, None))
                engine.start_thread()

    def close(self) -> None:
        """End the queue of a communicator that is freed. Silent where it is broken."""
        # What others still exchange may be under way: the library may give the next communicator this one's number.
        engine.hear()
        keep = bool(self.broken or self.jobs or self._made is not None) or self.hears_of_trouble()
        self.breaks("it was freed")
        engine.drop(self)
        if self.contact is not None:
            self.contact.close()
        if self._fast_path is not None:
            if keep:
                never_free(self._fast_path.operation)
            self._fast_path.close()
        if keep:
            never_free(self.wrecks)
        self.shared = self._fast_path = None
        if not keep:
            self.comm.Free()

    def call(
        self, steps: Callable[[Progress], StepsTo[T]], what: str, gentle: bool = False, continues: bool = False
    ) -> T:
        """Run ``steps`` as a job in the calling thread and return their result; ``gentle``: sleep while waiting.

        ``continues``: the job is the rest of the last one, in which some ranks may have done all. A caller
        that is interrupted never comes back to the job, so all ranks hear that it was given up.
        """
        results: list[T] = []

        def whole(progress: Progress) -> Steps:
            results.append((yield from steps(progress)))

        self.count -= continues
        before, job = self.count, None
        try:
            job = self.submit(whole, what)
            while gentle and not job.test():
                time.sleep(_GENTLE_SECONDS)
            job.wait()
        except BaseException as error:
            if not isinstance(error, Exception) and self.count > before and not (job is not None and job.done):
                engine.give_up(self, before, what, error)
            raise
        return results[0]

    def submit(
        self,
        steps: Callable[[Progress], Steps],
        what: str,
        on_done: Callable[[BaseException | None], None] | None = None,
        serves: bool = False,
    ) -> Job:
        """Queue a job; it begins when the progress thread or a waiting caller comes to it.

        ``on_done`` is called at its end with what went wrong, None for nothing, in the thread that drove it there.
        ``serves``: it goes on for long, answering other ranks, in every wait of this process; its queue is its own.
        """
        self.check(what)
        timeout()  # a bad setting is the caller's error, not the progress thread's
        self.count += 1
        job = Job(self, steps, what, self.count, on_done, serves)
        if serves:
            engine.serve(1)
        engine.enqueue(job)
        self.rest()
        return job

    def run(self, steps: Callable[[Progress], Steps], what: str, progress: Progress) -> Steps:
        """A job's steps, when the communicator is there, and the ranks know where to reach each other."""
        while self._made is not None:
            if self._is_there():
                progress.moves += 1
            else:
                yield
        if self.contact is None and self.comm.Get_size() > 1:
            yield from self._meet(progress)
        if self._ended:
            self.check(what)
        yield from steps(progress)

    def _is_there(self) -> bool:
        if self._made is not None and self._is_made():
            self._made = None
            self.comm.Set_errhandler(MPI.ERRORS_RETURN)
        return self._made is None

    def before_free(self) -> None:
        """Wait until the private duplicate is there, for which all ranks have asked when all free the communicator.

        The library may put off the end of a communicator that is being duplicated to where jobs ask for the duplicate,
        in the middle of them, or lose it. Ranks that never ask are not waited for any longer than that.
        """
        until = time.monotonic() + _DUPLICATE_SECONDS
        while self._made is not None and not self.broken and time.monotonic() < until:
            if not engine.undisturbed(self._is_there):
                time.sleep(_GENTLE_SECONDS)

    def _is_made(self) -> bool:
        """Whether the private duplicate has been made. Where none can be made, the library tells all ranks."""
        assert self._made is not None
        try:
            return bool(self._made.Test())
        except MPI.Exception as error:
            self.breaks("the MPI library could not duplicate it")  # what it has left of one is not to be used
            raise NoCommunicatorError(error.Get_error_code()) from error

    def _meet(self, progress: Progress) -> Steps:
        if self._meeting is None:  # else by a job that was given up
            cards = np.zeros((self.comm.Get_size(), CARD_NBYTES), np.uint8)
            cards[self.rank] = np.frombuffer(ports().card().pack(), np.uint8)
            self._meeting = self.comm.Iallgather(MPI.IN_PLACE, cards), cards
        request, cards = self._meeting
        while not request.Test():
            yield
        self._meeting = None
        progress.moves += 1
        unpacked = [Card.unpack(card.tobytes()) for card in cards]
        self.contact = Contact(self.rank, unpacked, self._places, self._where, self._compare, self.hears_of_difference)

    def meets(self, comm: MPI.Intracomm) -> None:
        """The ranks of ``comm``, among the queue's, exchange messages: they watch each other where they are few.

        Those at a distance of a power of two do so anyway.
        """
        if self.contact is not None and comm.Get_size() <= _FEW:
            self.contact.meet(numbers_in(self.comm, comm))

    def _where(self) -> tuple[int, str] | None:
        """The job that this rank waits in, and its name; number 0 for another communicator's. None when in none."""
        if self.jobs:
            return self.jobs[0].number, f"an earlier {self.jobs[0].what}"
        return engine.waits_in()

    def gone(self, awaited: Collection[int], seconds: float) -> list[int]:
        """The ranks that are gone, of a wait of ``seconds`` for the ranks ``awaited`` (none: not known).

        One that died is missed at once. One that left in good order may have done its part: unless it is awaited long.
        """
        gone = set() if self.shared is None else set(self.shared.gone(awaited, seconds))
        if self.contact is not None:
            self.contact.watch(awaited)
            gone |= self.contact.dead | self.contact.quitters
            if seconds > LEFT_SECONDS:
                gone |= self.contact.left.intersection(awaited) if awaited else self.contact.left
        else:
            gone |= set(ports().gone(self._places, left=seconds > LEFT_SECONDS))
        return sorted(gone - self._outlived)

    def inquire(self) -> None:
        """Let the others know which call this rank waits in, where some may have made another and gone on."""
        if self.place is None or self.contact is None or self.broken:
            return
        meetings, calls, meets = self.place()
        if calls:
            self.contact.inquire(f"{meetings} {len(calls)} {calls[-1]} {meets:d}")

    def _compare(self, rank: int, text: str) -> None:
        """Another rank waits in the call that ``text`` tells of: this one may have made, or be in, another.

        Where both wait for all, they find out in that.
        """
        if self.place is None or self.contact is None or self.broken:
            return
        meetings, number, signature, meets = map(int, text.split())
        own_meetings, calls, meets_too = self.place()
        if own_meetings != meetings or len(calls) < number or (meets and meets_too and len(calls) == number):
            return
        if calls[number - 1] != signature:
            own = words_of(calls[number - 1])
            text = difference_of({self.rank: own, rank: words_of(signature)})
            self.contact.tell_failed(f"{meetings} {number} {text}")
            self.hears_of_difference()

    def _at_place(self, told: str) -> str:
        """``told`` behind the place of the call that has just failed here: how often all had met, and its number."""
        if self.place is None:
            return f"0 1 {told}"
        meetings, calls, _ = self.place()
        return f"{meetings} {len(calls) + 1} {told}"

    def hears_of_difference(self) -> bool:
        """Whether this rank has come to a call that is said not to be the same on all; no other one is made then."""
        text = self._difference()
        if text and not self.broken:
            self._untold = text
            self.breaks(text)
        return bool(text)

    def difference(self) -> str:
        """The difference between ranks' calls that some have said there is, for the caller; empty for none."""
        self._untold = ""
        return self._difference()

    def _difference(self) -> str:
        if self.contact is None or self.place is None or not self.contact.difference:
            return ""
        meetings, number, text = self.contact.difference.split(" ", 2)
        own_meetings, calls, _ = self.place()
        # What ranks that are ahead have found is not to be heard before this one has come there.
        return text if (own_meetings, len(calls)) >= (int(meetings), int(number)) else ""

    @property
    def failed(self) -> set[int]:
        """The ranks that have given up in the middle of a job; this one among them, for the jobs that are left."""
        return set() if self.contact is None else self.contact.failed

    def hears_of_death(self) -> bool:
        """Whether a rank is said to be gone, by what had come a moment ago."""
        if len(self._places) > 1:
            ports().read_lately()
        return self._knows_of_death()

    def _knows_of_death(self) -> bool:
        if self.contact is not None:
            return bool(self.contact.dead - self._outlived)
        return len(self._places) > 1 and bool(ports().gone(self._places, left=False))

    def hears_of_trouble(self) -> bool:
        """Whether a rank is said to be gone, or to have failed."""
        if len(self._places) == 1:
            return False
        ports().read()
        return self.hears_of_death() or bool(self.failed) or bool(self._difference())

    def ask(self, job: Job) -> None:
        """Ask the others where they are; this rank waits in the job."""
        if self.contact is not None:
            self.contact.ask(job.number, f"an earlier {job.what}")

    def missing(self, number: int) -> str:
        """The ranks that have not come to job ``number``, and where they are, in words. Empty: none is known."""
        silent, elsewhere = ([], {}) if self.contact is None else self.contact.silent(number)
        said = [f"ranks that have not come to it: {silent}"] if silent else []
        return "; ".join(said + [f"rank {rank} waits in {where}" for rank, where in elsewhere.items()])
