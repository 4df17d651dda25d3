"""Who runs collectives: the caller that waits, or one progress thread beside a training loop.

A job is a generator that does what it can and yields when it has to wait; so any thread can take it a step further.
Jobs of one communicator run in the order they were submitted, which MPI asks to be the same on all ranks; jobs of
different communicators run side by side. A job that nobody waits for is driven by the progress thread, which sleeps
when there is none; below MPI's thread level ``multiple`` there is no such thread and jobs run when they are waited for.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from bitring.arrays import surroundings
from bitring.collectives.interop.steps import Progress, Steps, StepsTo
from bitring.collectives.node.presence import leave
from bitring.collectives.node.shared import LEFT_SECONDS, Shared
from bitring.collectives.runtime import contact
from bitring.collectives.runtime.contact import CARD_NBYTES, Card, Contact, ports
from bitring.collectives.runtime.death import died
from bitring.errors import DeadRankError, PeerError, RefusedError
from bitring.native import native

logger = logging.getLogger("bitring")

T = TypeVar("T")

SILENCE_SECONDS = 60.0
"""A wait without any progress for so long is worth one warning."""

_LOOK_SECONDS = 0.25
"""A wait of this length is worth a look whether the ranks of this node are still there."""

_DRIVE_SECONDS = 0.05
"""A native operation that has not moved for so long gives the engine a chance to look around."""

ADVICE = "all ranks can go on with a new one (comm.Dup()), or begin again from the last checkpoint"

_ANSWER_SECONDS = 2.0
"""So long before it warns, a rank asks the others where they are."""

_FEW = 64
"""So many ranks are watched of those that all exchange messages; of others' ends words tell."""

_LAST_WORDS_SECONDS = 1.0
_GENTLE_SECONDS = 1e-3
_SPINS = 200
_NAP_SECONDS = 20e-6

_POLL_SECONDS = 2e-4
"""A caller that waits inside the MPI library polls more often than this."""

_POLL_REST_SECONDS = 1e-3
"""After so long it is no test of many requests between two pieces of work; and the progress thread rests as long."""


class Lane:
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
        self.wrecks: list[Job] = []  # cut short: the library may still write to their memory
        self.contact: Contact | None = None  # past the MPI library; made by the first job
        self._meeting: tuple[MPI.Request, Any] | None = None  # while it is made
        self._shared: Shared | None = None
        self._occupier = 0  # the thread that is in a call that goes by the engine
        self._ended = False  # all ranks have agreed that what comes now must not run
        self.last_word: Job | None = None  # by which the others are to learn that this rank ends the communicator
        self._kept_to: tuple[bool, int] | None = None  # what ``rest`` noted last
        self._resting = threading.Lock()
        engine.lanes.add(self)

    @property
    def shared(self) -> Shared | None:
        """What the communicator's ranks on this node share."""
        return self._shared

    @shared.setter
    def shared(self, shared: Shared) -> None:
        self._shared = shared
        self._kept_to = None
        self.rest()

    @property
    def direct(self) -> Any:
        """The native way past the engine; None where there is none."""
        return None if self._shared is None else self._shared.direct

    def rest(self) -> None:
        """Note whether there is nothing to do, so that a native operation may be run past the engine, and by whom."""
        if self._shared is None:
            return
        with self._resting:
            now = bool(self.jobs or self.broken or self._made is not None or engine.stopped), self._occupier
            if now != self._kept_to:
                self._kept_to = now
                self._shared.direct.keep_to(*now)

    def occupy(self, thread: int) -> None:
        """Note which thread is in a call, 0 for none: until its end no other may run anything past the engine."""
        self._occupier = thread
        self.rest()

    def check(self, what: str) -> None:
        """Raise RuntimeError when no further job may be submitted, DeadRankError where that is for a death."""
        if self.broken:
            text = f"{what}: this communicator is unusable since {self.broken}"
            raise RuntimeError(f"{text}; {ADVICE}") if self.dead is None else DeadRankError(text, self.dead)

    def breaks(self, why: str, wreck: Job | None = None) -> None:
        """Refuse every further job."""
        self.broken = self.broken or why
        if wreck is not None:
            self.wrecks.append(wreck)
        self.rest()

    def loses(self, gone: Sequence[int], wreck: Job | None = None) -> None:
        """Refuse every further job, since ranks are gone; and tell the others, who may wait for this one."""
        engine.bereaved = True
        self.dead = list(gone)
        self.breaks(f"{_are(gone)} gone", wreck)
        if self.contact is not None:
            self.contact.tell_gone(gone)

    def ends(self, why: str, last: Job) -> None:
        """Refuse every further job and those that have not begun, as all ranks do after the same one, ``last``."""
        self._ended = True
        self.breaks(why, last)

    def cut_short(self, what: str, error: BaseException | None, wreck: Job | None = None) -> None:
        """Refuse every further job, since others may still exchange what this rank has given up; and tell them."""
        if not self.broken:
            self.breaks(f"{what} was cut short by {type(error).__name__}", wreck)
            if self.contact is not None:
                self.contact.tell_failed()
            elif self._made is not None or self.comm.Get_size() > 1:

                def tell(progress: Progress) -> Steps:
                    yield from ()
                    if self.contact is not None:
                        self.contact.tell_failed()

                engine.enqueue(Job(self, tell, what, self.count, None))
                engine.start_thread()

    def close(self) -> None:
        """The communicator is freed. Silent where it is broken."""
        # What others still exchange may be under way: the library may give the next communicator this one's number.
        engine.hear()
        keep = bool(self.broken or self.jobs or self._made is not None) or self.hears_of_trouble()
        self.breaks("it was freed")
        engine.drop(self)
        if self.contact is not None:
            self.contact.close()
        if self._shared is not None:
            self._shared.direct.close()
            self._shared = None
        if not keep:
            self.comm.Free()

    def call(
        self, steps: Callable[[Progress], StepsTo[T]], what: str, gentle: bool = False, continues: bool = False
    ) -> T:
        """What ``steps`` return, run as a job in the calling thread; ``gentle``: it sleeps where it has to wait.

        ``continues``: it is the rest of what the last job began, which some ranks may have done in that one. A caller
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

    def submit(self, steps: Callable[[Progress], Steps], what: str, on_done: Callable[[], None] | None = None) -> Job:
        """Queue a job; it begins when the progress thread or a waiting caller comes to it.

        ``on_done`` is called at its end, in the thread that drove it there.
        """
        self.check(what)
        _timeout()  # a bad setting is the caller's error, not the progress thread's
        self.count += 1
        job = Job(self, steps, what, self.count, on_done)
        engine.enqueue(job)
        self.rest()
        return job

    def run(self, steps: Callable[[Progress], Steps], what: str, progress: Progress) -> Steps:
        """A job's steps, when the communicator is there, and the ranks know where to reach each other."""
        while self._made is not None:
            if self._made.Test():
                self._made = None
                self.comm.Set_errhandler(MPI.ERRORS_RETURN)
                progress.moves += 1
            else:
                yield
        if self.contact is None and self.comm.Get_size() > 1:
            yield from self._meet(progress)
        if self._ended:
            self.check(what)
        yield from steps(progress)

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
        self.contact = Contact(self.rank, [Card.unpack(card.tobytes()) for card in cards], self._places, self._where)

    def meets(self, comm: MPI.Intracomm) -> None:
        """The ranks of ``comm``, who are among the lane's, exchange messages: they watch each other where they are few.

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
        """The ranks that a wait of ``seconds`` for the ranks ``awaited`` (none: not known) is in vain for.

        One that died is missed at once. One that left the job in good order may have done its part before.
        """
        gone = set() if self._shared is None else set(self._shared.gone(awaited, seconds))
        if self.contact is not None:
            self.contact.watch(awaited)
            gone |= self.contact.dead | self.contact.quitters
            if seconds > LEFT_SECONDS:
                gone |= self.contact.left
        else:
            gone |= set(ports().gone(self._places, left=seconds > LEFT_SECONDS))
        return sorted(gone)

    @property
    def failed(self) -> set[int]:
        """The ranks that have given up in the middle of a job; this one among them, for the jobs that are left."""
        return set() if self.contact is None else self.contact.failed

    def hears_of_death(self) -> bool:
        """Whether a rank is said to be gone, by what had come a moment ago."""
        if len(self._places) == 1:
            return False
        ports().read_lately()
        if self.contact is None:
            return bool(ports().gone(self._places, left=False))
        return bool(self.contact.dead)

    def hears_of_trouble(self) -> bool:
        """Whether a rank is said to be gone, or to have failed."""
        return self.hears_of_death() or bool(self.failed)

    def ask(self, job: Job) -> None:
        """Ask the others where they are; this rank waits in the job."""
        if self.contact is not None:
            self.contact.ask(job.number, f"an earlier {job.what}")

    def missing(self, number: int) -> str:
        """The ranks that have not come to job ``number``, and where they are, in words. Empty: none is known."""
        silent, elsewhere = ([], {}) if self.contact is None else self.contact.silent(number)
        said = [f"ranks that have not come to it: {silent}"] if silent else []
        return "; ".join(said + [f"rank {rank} waits in {where}" for rank, where in elsewhere.items()])


class Job:
    """One run of a collective. ``wait`` returns when it is over and raises what it raised."""

    def __init__(
        self,
        lane: Lane,
        steps: Callable[[Progress], Steps],
        what: str,
        number: int,
        on_done: Callable[[], None] | None,
    ) -> None:
        self.lane = lane
        self.what = what
        self.number = number
        self.done = False
        self.error: BaseException | None = None
        self._on_done = on_done
        self._begun = False
        self._progress = Progress()
        self._steps = lane.run(steps, what, self._progress)
        self._surroundings = surroundings()
        self._seen = (-1, 0.0)  # moves, and when they were first counted
        self._left = False  # by its caller, who was interrupted: nobody may hear of its error
        self._warned = 0.0  # when
        self._asked = 0.0  # when
        self._look_at = 0.0
        self._awaited: frozenset[int] = frozenset()  # by the operation
        self.operation: Any = None  # a native operation that it waits for

    def advance(self) -> bool:
        """Do what can be done now. Whether anything moved. What goes wrong here ends this job, and no other."""
        try:
            return self._advance()
        except StopIteration:
            self.end(None)
        except RefusedError as error:
            self.end(error.__cause__, refused=True)
        except MPI.Exception as error:
            self.end(self._as_death(error))
        except BaseException as error:
            self.end(error)
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # the caller may wait for another job
        return True

    def _advance(self) -> bool:
        # Before anything is sent to whoever is gone. That a rank has failed may be in what comes later.
        hears = self.lane.hears_of_death if self._begun else self.lane.hears_of_trouble
        if hears() and self._bereaved(0):
            return True
        self._begun = True
        if self.operation is not None and not self.operation.over:
            self.operation.advance()
        if self._surroundings is None:
            self.operation = next(self._steps)
        else:
            with self._surroundings():
                self.operation = next(self._steps)
        moves = self._progress.moves
        if self.operation is not None:
            moves += self.operation.moves
            awaited = self.operation.awaited
            self._progress.peers = self._awaited = frozenset((awaited,) if awaited >= 0 else ())
        elif self._progress.peers is self._awaited:
            self._progress.peers = frozenset()  # whom an operation waited for that is over
        now = time.monotonic()
        if moves != self._seen[0]:
            self._seen = (moves, now)
            return True
        self._mind_silence(now)
        return self.done

    def _as_death(self, error: MPI.Exception) -> BaseException:
        """The library's error; a DeadRankError when a rank has died."""
        # The library may see that a process died before its lock is given back, or its port is closed.
        until = time.monotonic() + _LOOK_SECONDS
        while not (seen := self.lane.gone(self._progress.peers, float("inf"))) and time.monotonic() < until:
            time.sleep(0.01)
            ports().read()
        gone = seen or died(error, self.lane.comm)
        return error if gone is None else self._death(gone)

    def _death(self, gone: Sequence[int]) -> DeadRankError:
        self.lane.loses(gone, self)
        return DeadRankError(f"{self.what}: {gone_in_words(gone)}", gone)

    def _mind_silence(self, now: float) -> None:
        seconds = now - self._seen[1]
        if seconds < _LOOK_SECONDS:
            return
        if now > self._look_at:
            self._look_at = now + _LOOK_SECONDS
            ports().read()
            if self._bereaved(seconds):
                return
        limit = _timeout() if self._warned else min(SILENCE_SECONDS, _timeout())
        if seconds >= limit - min(_ANSWER_SECONDS, limit / 2) and self._asked <= max(self._seen[1], self._warned):
            self._asked = now
            self.lane.ask(self)
        if seconds < limit:
            return
        ports().read()
        who = self.lane.missing(self.number)
        if not who and self._progress.peers:
            who = f"messages due from ranks {sorted(self._progress.peers)}"
        complaint = f"rank {self.lane.rank} has waited {seconds:.0f} s in {self.what}; "
        complaint += who or "some rank has not come to it"
        if not self._warned:
            self._warned = now
            logger.warning("%s", complaint)
        if seconds >= _timeout():
            engine.bereaved = True
            self.lane.breaks(f"{self.what} timed out", self)
            self.end(TimeoutError(f"{complaint} (BITRING_TIMEOUT={_timeout():g})"))

    def _bereaved(self, seconds: float) -> bool:
        """End with an error when the wait, of ``seconds`` by now, is for ranks that are gone or have failed.

        Whether it is.
        """
        gone = self.lane.gone(self._progress.peers, seconds)
        if gone and self is self.lane.last_word and not self.lane.gone((), 0.0):
            self.lane.breaks(self.what, self)
            self.end(None)  # they have left in good order, and need not hear it
        elif gone:
            self.end(self._death(gone))
        elif self.lane.failed:
            failed = f"rank {min(self.lane.failed)} has failed in it, or in what came before"
            self.lane.breaks(failed, self)
            self.end(PeerError(f"{self.what}: {failed}; {ADVICE}"))
        return self.done

    def end(self, error: BaseException | None, refused: bool = False) -> None:
        """It is over, by ``error`` or well; with the engine's lock in hand. ``refused``: nothing was exchanged."""
        if self.done:
            return
        self.error = error
        cut_short = (error is not None and not refused) and (
            self._progress.exchanging
            or self._left
            or isinstance(error, (MPI.Exception, MemoryError))
            or not isinstance(error, Exception)
        )
        self.lane.jobs.remove(self)
        try:
            if self._progress.ends:
                self.lane.ends(self._progress.ends, self)
            elif cut_short:
                self.lane.cut_short(self.what, error, self)
            self.lane.rest()
        finally:
            self.done = True
        if self._on_done is not None:
            try:
                self._on_done()
            except Exception as failure:
                self.error = self.error or failure

    def wait(self) -> None:
        """Drive the communicator's jobs until this one is over; raises its error. It goes on after an interrupt."""
        if not self.done:
            self._left = False
            try:
                engine.drive(self)
            except BaseException:
                self._left = True
                raise
        if self.error is not None:
            raise self.error

    def test(self) -> bool:
        """Whether it is over. Never waits, but takes the job further when nobody else does."""
        if not self.done:
            engine.nudge(self.lane)
        return self.done


def gone_in_words(ranks: Sequence[int]) -> str:
    """That these ranks are gone, and what that may mean."""
    return f"{_are(ranks)} gone: the process has ended or left the job"


def numbers_in(other: MPI.Intracomm, comm: MPI.Intracomm) -> list[int]:
    """What the ranks of ``comm`` are called in the other; MPI.UNDEFINED, a negative number, where it has them not."""
    groups = comm.Get_group(), other.Get_group()
    try:
        return list(groups[0].Translate_ranks(None, groups[1]))
    finally:
        for group in groups:
            group.Free()


def _are(ranks: Sequence[int]) -> str:
    if not ranks:
        return "a rank is"
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {list(ranks)} are"


@functools.cache
def _timeout() -> float:
    """Seconds without progress after which a wait is an error; infinite unless BITRING_TIMEOUT is set."""
    text = os.environ.get("BITRING_TIMEOUT", "")
    try:
        return float(text) if text else float("inf")
    except ValueError:
        raise ValueError(f"BITRING_TIMEOUT must be a number of seconds; got {text!r}") from None


@functools.cache
def _say_no_thread() -> None:
    logger.warning("MPI's thread level is below multiple: what is started runs when it is waited for")


class Engine:
    """The process's jobs, and the thread that drives those nobody waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while any job advances
        self._wake = threading.Condition()
        self._lanes: list[Lane] = []  # those with jobs
        self._drivers = 0
        self._polled = 0.0  # when a caller inside the MPI library last asked
        self._polled_since = 0.0  # since when it asks without a break
        self._idle_polls = 0  # how often in a row in vain
        self._rested = 0.0  # when that caller last gave way
        self._thread: threading.Thread | None = None
        self.stopped: str | None = None
        self.lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self.bereaved = False  # a rank is gone, or silent: the MPI library's own end would wait for it
        module = native()
        self._native = module
        self._wake_driver: Any = None if module is None else module.Wake()

    def check(self, what: str) -> None:
        """Raise RuntimeError when this process must not communicate any more."""
        if self.stopped:
            raise RuntimeError(f"{what}: {self.stopped}")

    def enqueue(self, job: Job) -> None:
        """Put the job at the end of its lane."""
        self.check(job.what)
        with self._wake:
            job.lane.jobs.append(job)
            if job.lane not in self._lanes:
                self._lanes.append(job.lane)
        self.call_back()

    def call_back(self) -> None:
        """Ask the thread that is inside native operations to look at the engine again."""
        if self._wake_driver is not None:
            self._wake_driver.set()

    def hear(self) -> None:
        """Read what has come, in a thread that drives no job: the one that does is to look at it."""
        ports().read()
        self.call_back()

    def give_up(self, lane: Lane, number: int, what: str, error: BaseException) -> None:
        """End the lane's jobs after ``number``, of a caller who was interrupted."""
        with self._lock:
            for job in [each for each in lane.jobs if each.number > number]:
                job.end(error)
            lane.cut_short(what, error)

    def start_thread(self) -> bool:
        """See that started jobs run without anybody waiting. Whether they do: it needs MPI.THREAD_MULTIPLE."""
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            _say_no_thread()
            return False
        with self._wake:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="bitring-progress", daemon=True)
                self._thread.start()
            self._wake.notify_all()
        return True

    def _turn(self, gentle: bool) -> bool:
        """Advance the first job of every communicator. Whether anything moved.

        Where all that is left to do is native operations', this goes on with them until one is over, or for as long as
        any moves. ``gentle``: without keeping a core busy that a training loop may want.
        """
        with self._lock:
            if self._wake_driver is not None:
                self._wake_driver.clear()
                if gentle and (self._drivers or self._polling()):
                    return True  # a caller waits for the lock, and will be quicker
            moved = self._advance_all()
            operations = [lane.jobs[0].operation for lane in list(self._lanes) if lane.jobs]
            if operations and self._native is not None and all(each is not None for each in operations):
                moved = True
                try:
                    self._native.drive(operations, self._wake_driver, _DRIVE_SECONDS, gentle)
                except Exception as error:  # whose fault it is cannot be told
                    for job in [lane.jobs[0] for lane in list(self._lanes) if lane.jobs]:
                        job.end(error)
        return moved

    def drop(self, lane: Lane) -> None:
        """End what is left of a lane that is closed: it would keep all others from native operations for ever."""
        with self._lock:
            for job in list(lane.jobs):
                lane.wrecks.append(job)
                job.end(RuntimeError(f"{job.what}: the communicator was freed"), refused=True)
            self._advance(lane)

    def _advance(self, lane: Lane) -> bool:
        """Advance the lane's first job, with the lock in hand. Whether anything moved."""
        moved = bool(lane.jobs) and lane.jobs[0].advance()
        if not lane.jobs:
            with self._wake:
                if not lane.jobs and lane in self._lanes:
                    self._lanes.remove(lane)
        return moved

    def _advance_all(self) -> bool:
        moved = False
        for lane in list(self._lanes):
            moved |= self._advance(lane)
        return moved

    def drive(self, job: Job) -> None:
        """Run jobs in the calling thread until ``job`` is over."""
        with self._wake:
            self._drivers += 1
        self.call_back()
        try:
            idle = 0
            while not job.done:
                idle = 0 if self._turn(gentle=False) else idle + 1
                _rest(idle)
        except KeyboardInterrupt as error:
            if job.error is not error:
                raise
        finally:
            with self._wake:
                self._drivers -= 1
                self._wake.notify_all()

    def nudge(self, lane: Lane) -> None:
        """Advance the lane's first job unless another thread is at it."""
        if self._lock.acquire(blocking=False):
            try:
                self._advance(lane)
            finally:
                self._lock.release()

    def poll(self) -> None:
        """Take the jobs further for a caller inside the MPI library, which calls this over and over while it waits.

        Once it has done so for a while, the progress thread leaves them to the caller: it would have to wait for the
        library's lock.
        """
        now = time.monotonic()
        if now - self._polled > _POLL_SECONDS:
            self._polled_since, self._idle_polls = now, 0
        self._polled = now
        self._idle_polls += 1
        rest = self._idle_polls > 20 and now - self._rested > _POLL_SECONDS / 4  # there may be many requests to poll
        polling = self._polling()
        if polling:
            self.call_back()
        if self._lock.acquire(timeout=_POLL_REST_SECONDS if rest and polling else 0):
            try:
                if self._advance_all():
                    self._idle_polls = 0
            finally:
                self._lock.release()
        if rest:
            self._rested = now
            _rest(self._idle_polls)

    def waits_in(self) -> tuple[int, str] | None:
        """What this process waits in, for a rank of a communicator that has no job; None when in nothing."""
        for lane in list(self._lanes):
            if lane.jobs:
                return 0, f"{lane.jobs[0].what} of another communicator"
        return None

    def _polling(self) -> bool:
        now = time.monotonic()
        return now - self._polled < _POLL_SECONDS and now - self._polled_since > _POLL_REST_SECONDS

    def _serve(self) -> None:
        idle = 0
        while True:
            with self._wake:
                while not self.stopped and (self._drivers or not self._lanes):
                    self._wake.wait()
                    idle = 0
                if self.stopped:
                    return
                if self._polling():
                    self._wake.wait(_POLL_REST_SECONDS)
                    continue
            idle = 0 if self._turn(gentle=True) else idle + 1
            _rest(idle)

    def stop(self, why: str) -> None:
        """End the progress thread; later jobs raise ``why``."""
        self._say_last_words()
        with self._wake:
            self.stopped = why
            self._wake.notify_all()
        self.call_back()
        self._close_native_ways()
        leave()
        if self._thread is not None:
            self._thread.join(timeout=5)
        for lane in self._lanes:  # their jobs will not be done
            if lane.contact is not None:
                lane.contact.tell_quit()
        contact.leave()
        if self.bereaved and not MPI.Is_finalized():
            sys.stdout.flush()
            sys.stderr.flush()
            MPI.COMM_WORLD.Abort(1)

    def _say_last_words(self) -> None:
        """Let the others hear what nobody here waits for, for a moment."""
        until = time.monotonic() + _LAST_WORDS_SECONDS
        for lane in list(self.lanes):
            while lane.last_word is not None and not lane.last_word.done and time.monotonic() < until:
                time.sleep(1e-3)

    def disable_in_child(self) -> None:
        """A forked child shares the parent's MPI connections and memory, and must not touch them."""
        lanes = self.lanes
        self.__init__()  # type: ignore[misc]  # locks may be held by threads that the child does not have
        self.lanes = lanes
        self.stopped = (
            "this process was forked after MPI started; use the 'spawn' or 'forkserver' start method, and import "
            "mpi4py inside main(), under if __name__ == '__main__': workers import the script, too, and must not start "
            "MPI"
        )
        self._close_native_ways()

    def _close_native_ways(self) -> None:
        """What runs past the engine otherwise comes to it, and hears that it is stopped."""
        for lane in self.lanes:
            lane.rest()


def _rest(idle: int) -> None:
    """Give way while there is nothing to do: other ranks may need this core to send what is waited for."""
    if idle > _SPINS:
        time.sleep(_NAP_SECONDS)
    elif idle > 20:
        os.sched_yield()


engine = Engine()
atexit.register(engine.stop, "the interpreter is exiting")
os.register_at_fork(after_in_child=engine.disable_in_child)
