"""Who runs collectives: the caller that waits, or one progress thread beside a training loop.

A job is a generator that does what it can and yields when it has to wait; so any thread can take it a step further.
Jobs of one communicator run in the order they were submitted, which MPI asks to be the same on all ranks; jobs of
different communicators run side by side. A job that nobody waits for is driven by the progress thread, which sleeps
when there is none; below MPI's thread level ``multiple`` there is no such thread and jobs run when they are waited for.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI

from bitring.collectives.arrays import surroundings
from bitring.collectives.errors import PeerError, RefusedError
from bitring.collectives.executor import Progress, Steps, StepsTo
from bitring.collectives.extension import native
from bitring.collectives.presence import leave
from bitring.collectives.shared import Shared
from bitring.collectives.transport import NOTE_TAG

logger = logging.getLogger("bitring")

T = TypeVar("T")

SILENCE_SECONDS = 60.0
"""A wait without any progress for so long is worth one warning."""

_LOOK_SECONDS = 0.25
"""A wait of this length is worth a look whether the ranks of this node are still there."""

_DRIVE_SECONDS = 0.05
"""A native operation that has not moved for so long gives the engine a chance to look around."""

ADVICE = "all ranks can go on with a new one (comm.Dup()), or begin again from the last checkpoint"

_FAILED = -(1 << 40)
"""What a rank says that has broken off a job; other notes are jobs' numbers, and ranks that are gone."""

_GRACE_SECONDS = 2.0
_GENTLE_SECONDS = 1e-3
_SPINS = 200
_NAP_SECONDS = 20e-6

_POLL_SECONDS = 2e-4
"""A caller that waits inside the MPI library polls more often than this."""

_POLL_REST_SECONDS = 1e-3
"""After so long it is no test of many requests between two pieces of work; and the progress thread rests as long."""


class Lane:
    """The jobs of one communicator, in order. ``comm`` is bitring's private duplicate of it.

    ``made``: the request that makes ``comm``, for which the first job waits; None when it is there.
    """

    def __init__(self, comm: MPI.Intracomm, made: MPI.Request | None, rank: int) -> None:
        self.comm = comm
        self._made = made
        self.rank = rank
        self.jobs: deque[Job] = deque()
        self.count = 0  # jobs submitted so far; the same on all ranks
        self.broken: str | None = None
        self.wrecks: list[Job] = []  # cut short: the library may still write to their memory
        self._waiting: dict[int, int] = {}  # the last job that another rank said it waits in
        self._gone: set[int] = set()  # ranks that another rank, or they themselves, said are gone
        self.failed: set[int] = set()  # ranks that said that they have given up in the middle of a job
        self._words: list[Any] = []  # what others may not have been told yet
        self._shared: Shared | None = None
        self.idle = False
        engine.lanes.add(self)

    @property
    def shared(self) -> Shared | None:
        """What the communicator's ranks on this node share."""
        return self._shared

    @shared.setter
    def shared(self, shared: Shared) -> None:
        self._shared = shared
        self.rest()

    def rest(self) -> None:
        """Note whether there is nothing to do, so that a native operation may be run past the engine: ``idle``."""
        self.idle = not (self.jobs or self.broken or self._made is not None or engine.stopped)
        if self._shared is not None:
            self._shared.direct.busy = 0 if self.idle else 1

    def breaks(self, why: str, wreck: Job | None = None) -> None:
        """Refuse every further job."""
        self.broken = self.broken or why
        if wreck is not None:
            self.wrecks.append(wreck)
        self.rest()

    def cut_short(self, what: str, error: BaseException | None, wreck: Job | None = None) -> None:
        """Refuse every further job, since others may still exchange what this rank has given up; and tell them."""
        if not self.broken:
            self.breaks(f"{what} was cut short by {type(error).__name__}", wreck)
            self.failed.add(self.rank)  # for the jobs that are left
            if self._made is None:
                self._tell_failure()
            else:

                def tell(progress: Progress) -> Steps:
                    yield from ()
                    self._tell_failure()

                engine.enqueue(Job(self, tell, what, self.count, None))
                engine.start_thread()

    def _tell_failure(self) -> None:
        with contextlib.suppress(MPI.Exception):  # the library may be what has failed
            self._tell(set(range(self.comm.Get_size())) - {self.rank}, _FAILED)

    def close(self) -> None:
        """The communicator is freed."""
        if self._made is None:
            self.drain_notes()
        # Where ranks tell each other of a failure, words may still be under way: the library may give the next
        # communicator this one's number, and its ranks these words.
        keep = bool(self.broken or self.failed or self._gone or self.jobs or self._made is not None)
        self.breaks("it was freed")
        if self._shared is not None:
            self._shared.direct.close()
            self._shared = None
        if not keep:
            self.comm.Free()

    def call(self, steps: Callable[[Progress], StepsTo[T]], what: str, gentle: bool = False) -> T:
        """What ``steps`` return, run as a job in the calling thread; ``gentle``: it sleeps where it has to wait.

        A caller that is interrupted never comes back to the job, so all ranks hear that it was given up.
        """
        results: list[T] = []

        def whole(progress: Progress) -> Steps:
            results.append((yield from steps(progress)))

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
        if self.broken:
            raise RuntimeError(f"{what}: this communicator is unusable since {self.broken}; {ADVICE}")
        _timeout()  # a bad setting is the caller's error, not the progress thread's
        self.count += 1
        job = Job(self, steps, what, self.count, on_done)
        engine.enqueue(job)
        self.rest()
        return job

    def run(self, steps: Callable[[Progress], Steps], progress: Progress) -> Steps:
        """A job's steps, when the communicator is there."""
        while self._made is not None:
            if self._made.Test():
                self._made = None
                self.comm.Set_errhandler(MPI.ERRORS_RETURN)
                progress.moves += 1
            else:
                yield
        yield from steps(progress)

    def drain_notes(self) -> None:
        """Receive what others said while they waited for this rank."""
        note = np.empty(1, np.int64)
        status = MPI.Status()
        while self.comm.Iprobe(MPI.ANY_SOURCE, NOTE_TAG, status):
            source = status.Get_source()
            self.comm.Recv(note, source, NOTE_TAG)
            if note[0] == _FAILED:
                self.failed.add(source)
            elif note[0] < 0:
                self._gone.add(-1 - int(note[0]))
            else:
                self._waiting[source] = int(note[0])

    def _tell(self, ranks: Collection[int], note: int) -> None:
        # Eight bytes are sent eagerly: done at once, whether or not anybody reads them.
        word = np.array([note], np.int64)
        for rank in ranks:
            request = self.comm.Isend(word, rank, NOTE_TAG)
            if not request.Test():
                request.Free()
                self._words.append(word)

    def tell_gone(self, gone: Collection[int]) -> None:
        """Tell the others that these ranks are gone: they may wait for this one, which will not do its part now."""
        if self._made is None:
            others = [r for r in range(self.comm.Get_size()) if r != self.rank and r not in gone]
            for rank in gone:
                self._tell(others, -1 - rank)

    def gone(self, awaited: Collection[int], seconds: float) -> list[int]:
        """The ranks that a wait of ``seconds`` for the ranks ``awaited`` is in vain for; see ``Shared.gone``."""
        if self._made is not None:
            return []
        self.drain_notes()
        seen = [] if self._shared is None else self._shared.gone(awaited, seconds)
        return sorted({*seen, *self._gone} - {self.rank})

    def absent(self, number: int) -> list[int]:
        """The ranks that have not come to job ``number``: those that wait in it, too, tell each other.

        Empty while there is no communicator to tell it in.
        """
        if self._made is not None:
            return []
        missing = set(range(self.comm.Get_size())) - {self.rank}
        self._tell(missing, number)
        until = time.monotonic() + _GRACE_SECONDS
        while missing and time.monotonic() < until:
            self.drain_notes()
            missing -= {rank for rank, job in self._waiting.items() if job >= number}
            time.sleep(0.01)
        return sorted(missing)


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
        self._progress = Progress()
        self._steps = lane.run(steps, self._progress)
        self._surroundings = surroundings()
        self._seen = (-1, 0.0)  # moves, and when they were first counted
        self._warned = False
        self._left = False  # by its caller, who was interrupted: nobody may hear of its error
        self._look_at = 0.0
        self._awaited: frozenset[int] = frozenset()  # by the operation
        self.operation: Any = None  # a native operation that it waits for

    def advance(self) -> bool:
        """Do what can be done now. Whether anything moved."""
        if self.operation is not None and not self.operation.over:
            self.operation.advance()
        try:
            if self._surroundings is None:
                self.operation = next(self._steps)
            else:
                with self._surroundings():
                    self.operation = next(self._steps)
        except StopIteration:
            self.end(None)
            return True
        except RefusedError as error:
            self.end(error.__cause__, refused=True)
            return True
        except MPI.Exception as error:
            # The library may see that a process died before its lock is given back.
            until = time.monotonic() + _LOOK_SECONDS
            while not self._bereaved(float("inf")) and time.monotonic() < until:
                time.sleep(0.01)
            if not self.done:
                self.end(error)
            return True
        except BaseException as error:
            self.end(error)
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # the caller may wait for another job
            return True
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
        self._mind_silence(now - self._seen[1])
        return False

    def _mind_silence(self, seconds: float) -> None:
        if seconds < _LOOK_SECONDS:
            return
        now = time.monotonic()
        if now > self._look_at:
            self._look_at = now + _LOOK_SECONDS
            if self._bereaved(seconds):
                return
        if seconds < min(SILENCE_SECONDS, _timeout()):
            return
        if not self._warned:
            self._warned = True
            missing = self.lane.absent(self.number)
            if missing:
                who = f"ranks that have not come to it: {missing}"
            elif self._progress.peers:
                who = f"messages due from ranks {sorted(self._progress.peers)}"
            else:
                who = "some rank has not come to it"
            self._complaint = f"rank {self.lane.rank} has waited {seconds:.0f} s in {self.what}; {who}"
            logger.warning("%s", self._complaint)
        if seconds >= _timeout():
            engine.bereaved = True
            self.lane.breaks(f"{self.what} timed out", self)
            self.end(TimeoutError(f"{self._complaint} (BITRING_TIMEOUT={_timeout():g})"))

    def _bereaved(self, seconds: float) -> bool:
        """End with an error when the wait, of ``seconds`` by now, is for ranks that are gone or have failed.

        Whether it is.
        """
        gone = self.lane.gone(self._progress.peers, seconds)
        if not gone and not self.lane.failed:
            return False
        if not gone:
            failed = f"rank {min(self.lane.failed)} has failed in it, or in what came before"
            self.lane.breaks(failed, self)
            self.end(PeerError(f"{self.what}: {failed}; {ADVICE}"))
            return True
        who = f"rank {gone[0]} is" if len(gone) == 1 else f"ranks {gone} are"
        engine.bereaved = True
        self.lane.tell_gone(gone)
        self.lane.breaks(f"{who} gone", self)
        self.end(PeerError(f"{self.what}: {who} gone: the process has ended or left the job"))
        return True

    def end(self, error: BaseException | None, refused: bool = False) -> None:
        """It is over, by ``error`` or well; with the engine's lock in hand. ``refused``: nothing was exchanged."""
        self.error = error
        cut_short = (error is not None and not refused) and (
            self._progress.exchanging
            or self._left
            or isinstance(error, (MPI.Exception, MemoryError))
            or not isinstance(error, Exception)
        )
        if cut_short:
            self.lane.cut_short(self.what, error, self)
        self.lane.jobs.remove(self)
        self.lane.rest()
        self.done = True
        if self._on_done is not None:
            self._on_done()

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
        self._call_back()

    def _call_back(self) -> None:
        """Ask the thread that is inside native operations to look at the engine again."""
        if self._wake_driver is not None:
            self._wake_driver.set()

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
                self._native.drive(operations, self._wake_driver, _DRIVE_SECONDS, gentle)
                moved = True
        return moved

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
        self._call_back()
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
            self._call_back()
        if self._lock.acquire(timeout=_POLL_REST_SECONDS if rest and polling else 0):
            try:
                if self._advance_all():
                    self._idle_polls = 0
            finally:
                self._lock.release()
        if rest:
            self._rested = now
            _rest(self._idle_polls)

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
        with self._wake:
            self.stopped = why
            self._wake.notify_all()
        self._call_back()
        self._close_native_ways()
        leave()
        if self._thread is not None:
            self._thread.join(timeout=5)
        for lane in self._lanes:  # their jobs will not be done
            if not MPI.Is_finalized():
                lane.tell_gone([lane.rank])
        if self.bereaved and not MPI.Is_finalized():
            sys.stdout.flush()
            sys.stderr.flush()
            MPI.COMM_WORLD.Abort(1)

    def disable_in_child(self) -> None:
        """A forked child shares the parent's MPI connections and memory, and must not touch them."""
        lanes = self.lanes
        self.__init__()  # type: ignore[misc]  # locks may be held by threads that the child does not have
        self.lanes = lanes
        self.stopped = "this process was forked after MPI started; use the 'spawn' or 'forkserver' start method"
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
