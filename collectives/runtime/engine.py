"""The engine, which runs collectives in the caller that waits, or on one progress thread beside a training loop.

A job is a generator that does what it can and yields when it has to wait; so any thread can take it a step further.
Jobs of one communicator run in the order they were submitted, which MPI asks to be the same on all ranks; jobs of
different communicators run side by side. A job that nobody waits for is driven by the progress thread, which sleeps
when there is none; below MPI's thread level ``multiple`` there is no such thread and jobs run when they are waited for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar

from mpi4py import MPI

from bitring.collectives.runtime.ports import at_death, heed_deaths, ports
from bitring.native import extension, native

if TYPE_CHECKING:
    from bitring.collectives.runtime.job import Job
    from bitring.collectives.runtime.job_queue import JobQueue

T = TypeVar("T")

logger = logging.getLogger("bitring")

_DRIVE_SECONDS = 0.05
"""A native operation that has not moved for so long gives the engine a chance to look around."""

_IDLE_DRIVE_SECONDS = 0.25
"""And for so long where nothing is expected: to look around takes the interpreter from whoever computes."""

_SPINS = 200
_NAP_SECONDS = 20e-6

_IDLE_TURNS = 50
_IDLE_NAP_SECONDS = 1e-3
"""The progress thread looks so seldom, after so many turns, at jobs that expect nothing."""

_LONG_IDLE_TURNS = 1000
_LONG_IDLE_NAP_SECONDS = 2e-3
"""And so seldom after so many: a look takes about 50 µs of a core."""

_POLL_SECONDS = 2e-4
"""A caller that waits inside the MPI library polls more often than this."""

_POLL_REST_SECONDS = 1e-3
"""After so long it is no test of many requests between two pieces of work; and the progress thread rests as long."""


@functools.cache
def _say_no_thread() -> None:
    logger.warning("MPI's thread level is below multiple: what is started runs when it is waited for")


class Engine:
    """The process's jobs, and the thread that drives those nobody waits for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held while any job advances
        self._wake = threading.Condition()
        self._queues: list[JobQueue] = []  # those with jobs
        self._drivers = 0
        self._polled = 0.0  # when a caller inside the MPI library last asked
        self._polled_since = 0.0  # since when it asks without a break
        self._idle_polls = 0  # how often in a row in vain
        self._rested = 0.0  # when that caller last gave way
        self._thread: threading.Thread | None = None
        self.stopped: str | None = None
        self.queues: weakref.WeakSet[JobQueue] = weakref.WeakSet()
        self.bereaved = False  # a rank is gone, or silent: the MPI library's own end would wait for it
        self.outlives = (
            False  # this process goes on without a rank that is gone; and cannot end as the library wants it
        )
        self._serving = 0  # jobs that answer other ranks
        self._native: Any = native()
        self._wake_driver: Any = None if native() is None else extension.Wake()

    def check(self, what: str) -> None:
        """Raise RuntimeError when this process must not communicate any more."""
        if self.stopped:
            raise RuntimeError(f"{what}: {self.stopped}")

    def enqueue(self, job: Job) -> None:
        """Put the job at the end of its queue."""
        self.check(job.what)
        with self._wake:
            job.queue.jobs.append(job)
            if job.queue not in self._queues:
                self._queues.append(job.queue)
        self.call_back()

    def call_back(self) -> None:
        """Ask the thread that is inside native operations to look at the engine again."""
        if self._wake_driver is not None:
            self._wake_driver.set()

    def hear(self) -> None:
        """Read words that have come, in a thread that drives no job, and have the one that drives a job act on them."""
        ports().read()
        self.call_back()

    def give_up(self, queue: JobQueue, number: int, what: str, error: BaseException) -> None:
        """End the queue's jobs after ``number``, of a caller who was interrupted."""
        with self._stopped():
            for job in [each for each in queue.jobs if each.number > number]:
                job.end(error)
            queue.cut_short(what, error)

    def start_thread(self) -> bool:
        """Start the progress thread, if it does not run. Returns whether there is one: it needs MPI.THREAD_MULTIPLE."""
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            _say_no_thread()
            return False
        with self._wake:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="bitring-progress", daemon=True)
                self._thread.start()
            self._wake.notify_all()
        return True

    def serve(self, more: int) -> None:
        """So many jobs more, or less, answer other ranks."""
        self._serving += more
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            self.rest()

    def rest(self) -> None:
        """Let every communicator note anew whether anything may be run past the engine."""
        for queue in list(self.queues):
            queue.rest()

    @property
    def serves_in_waits(self) -> bool:
        """Whether jobs that answer other ranks are advanced by callers alone, who must then wait in the engine."""
        return self._serving > 0 and MPI.Query_thread() < MPI.THREAD_MULTIPLE

    def _turn(self, gentle: bool) -> bool:
        """Advance the first job of every communicator. Returns whether anything moved.

        Where all jobs wait for native operations, this advances them until one is over, or for as long as any moves.
        ``gentle``: without keeping a core busy that a training loop may want.
        """
        with self._lock:
            if self._wake_driver is not None:
                self._wake_driver.clear()
                if gentle and (self._drivers or self._polling()):
                    return True  # a caller waits for the lock, and will be quicker
            moved = self._advance_all()  # heeds deaths, also for what follows
            operations = [queue.jobs[0].operation for queue in list(self._queues) if queue.jobs]
            if operations and self._native is not None and all(each is not None for each in operations):
                moved = True
                seconds = _IDLE_DRIVE_SECONDS if gentle and self._idle() else _DRIVE_SECONDS
                try:
                    self._native.drive(operations, self._wake_driver, seconds, gentle)
                except Exception as error:  # whose fault it is cannot be told
                    for job in [queue.jobs[0] for queue in list(self._queues) if queue.jobs]:
                        job.end(error)
        return moved

    def undisturbed(self, call: Callable[[], T]) -> T:
        """Call while no job advances."""
        with self._stopped():
            return call()

    @contextlib.contextmanager
    def _stopped(self) -> Generator[None]:
        """The lock, which the progress thread may keep for long while it is inside native operations."""
        with self._wake:
            self._drivers += 1
        self.call_back()
        try:
            with self._lock:
                yield
        finally:
            with self._wake:
                self._drivers -= 1
                self._wake.notify_all()

    def drop(self, queue: JobQueue) -> None:
        """End what is left of a queue that is closed: it would keep all others from native operations for ever."""
        with self._stopped():
            for job in list(queue.jobs):
                queue.wrecks.append(job)
                job.end(RuntimeError(f"{job.what}: the communicator was freed"), refused=True)
            self._advance(queue)

    def _advance(self, queue: JobQueue) -> bool:
        """Advance the queue's first job, with the lock in hand. Returns whether anything moved."""
        moved = bool(queue.jobs) and queue.jobs[0].advance()
        if not queue.jobs:
            with self._wake:
                if not queue.jobs and queue in self._queues:
                    self._queues.remove(queue)
        return moved

    def _advance_all(self) -> bool:
        heed_deaths()
        moved = False
        for queue in list(self._queues):
            moved |= self._advance(queue)
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

    def nudge(self, queue: JobQueue) -> None:
        """Advance the queue's first job unless another thread is at it."""
        if self._lock.acquire(blocking=False):
            try:
                heed_deaths()
                self._advance(queue)
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
        """Name the job that this process waits in, for a rank of a communicator without one; None when in none."""
        for queue in list(self._queues):
            if queue.jobs:
                return 0, f"{queue.jobs[0].what} of another communicator"
        return None

    def _polling(self) -> bool:
        now = time.monotonic()
        return now - self._polled < _POLL_SECONDS and now - self._polled_since > _POLL_REST_SECONDS

    def _serve(self) -> None:
        idle = 0
        while True:
            with self._wake:
                while not self.stopped and (self._drivers or not self._queues):
                    self._wake.wait()
                    idle = 0
                if self.stopped:
                    return
                if self._polling():
                    self._wake.wait(_POLL_REST_SECONDS)
                    continue
            idle = 0 if self._turn(gentle=True) else idle + 1
            if idle > _IDLE_TURNS and self._expects_nothing():
                with self._wake:
                    if not (self._drivers or self.stopped):
                        self._wake.wait(_IDLE_NAP_SECONDS if idle < _LONG_IDLE_TURNS else _LONG_IDLE_NAP_SECONDS)
            else:
                _rest(idle)

    def _expects_nothing(self) -> bool:
        """Whether all jobs under way are idle."""
        with self._lock:
            return self._idle()

    def _idle(self) -> bool:
        """The same, with the lock in hand."""
        return all(queue.jobs[0].progress.idle for queue in list(self._queues) if queue.jobs)

    def halt(self, why: str) -> None:
        """Stop running jobs; later ones raise ``why``."""
        with self._wake:
            self.stopped = why
            self._wake.notify_all()
        self.call_back()

    def join(self) -> list[JobQueue]:
        """Wait for the progress thread's end, when halted. Returns the queues whose jobs will not be done."""
        if self._thread is not None:
            self._thread.join(timeout=5)
        return self._queues

    def renew(self, why: str) -> None:
        """In a forked child: locks may be held by threads that the child does not have. Later jobs raise ``why``."""
        queues = self.queues
        self.__init__()  # type: ignore[misc]
        self.queues = queues
        self.stopped = why


def _rest(idle: int) -> None:
    """Give way while there is nothing to do: other ranks may need this core to send what is waited for."""
    if idle > _SPINS:
        time.sleep(_NAP_SECONDS)
    elif idle > 20:
        os.sched_yield()


engine = Engine()
at_death.append(engine.rest)
