"""One run of a collective: a generator that does what it can and yields when it has to wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mpi4py import MPI

from bitring.arrays import surroundings
from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.interrupts import HeldBack
from bitring.collectives.runtime.watch import Watch, as_death
from bitring.errors import RefusedError

if TYPE_CHECKING:
    from bitring.collectives.runtime.job_queue import JobQueue


class Job:
    """One run of a collective. ``wait`` returns when it is over and raises what it raised."""

    def __init__(
        self,
        queue: JobQueue,
        steps: Callable[[Progress], Steps],
        what: str,
        number: int,
        on_done: Callable[[BaseException | None], None] | None,
        serves: bool = False,
    ) -> None:
        self.queue = queue
        self.serves = serves
        """Whether it answers other ranks, beside whatever this one does, and so outlives a Ctrl-C."""
        self.what = what
        self.number = number
        self.done = False
        self.error: BaseException | None = None
        self._on_done = on_done
        self._begun = False
        self.progress = Progress()
        self._steps = queue.run(steps, what, self.progress)
        self._surroundings = surroundings()
        self._watch = Watch()
        self._left = False  # by its caller, who was interrupted: nobody may hear of its error
        self._awaited: frozenset[int] = frozenset()  # by the operation
        self.operation: Any = None  # a native operation that it waits for
        self.whole = serves
        """Whether a Ctrl-C in its steps leaves it as it is, and has its effect between two of them."""

    def advance(self) -> bool:
        """Advance the job as far as it goes now. Returns whether anything moved. An error ends this job only."""
        if not self.whole:
            return self._guarded()
        with HeldBack():
            return self._guarded()

    def _guarded(self) -> bool:
        try:
            return self._advance()
        except StopIteration:
            self.end(None)
        except RefusedError as error:
            self.end(error.__cause__, refused=True)
        except MPI.Exception as error:
            self.end(as_death(self, error))
        except BaseException as error:
            self.end(error)
            if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise  # the caller may wait for another job
        return True

    def _advance(self) -> bool:
        # Before anything is sent to whoever is gone. That a rank has failed may be in what comes later.
        hears = self.queue.hears_of_death if self._begun else self.queue.hears_of_trouble
        if hears() and self._watch.bereaved(self, 0):
            return True
        self._begun = True
        if self.operation is not None and not self.operation.over:
            self.operation.advance()
        if self._surroundings is None:
            self.operation = next(self._steps)
        else:
            with self._surroundings():
                self.operation = next(self._steps)
        moves = self.progress.moves
        if self.operation is not None:
            moves += self.operation.moves
            awaited = self.operation.awaited
            if awaited >= 0 or self.progress.peers is self._awaited:  # else it is known from elsewhere
                self.progress.peers = self._awaited = frozenset((awaited,) if awaited >= 0 else ())
        elif self.progress.peers is self._awaited:
            self.progress.peers = frozenset()  # whom an operation waited for that is over
        now = time.monotonic()
        if self._watch.has_moved(moves, now):
            return True
        self._watch.mind_silence(self, now)
        return self.done

    def end(self, error: BaseException | None, refused: bool = False) -> None:
        """End the job, by ``error`` or well; with the engine's lock in hand. ``refused``: nothing was exchanged."""
        if self.done:
            return
        self.error = error
        cut_short = (error is not None and not refused) and (
            self.progress.exchanging
            or self._left
            or isinstance(error, (MPI.Exception, MemoryError))
            or not isinstance(error, Exception)
        )
        self.queue.jobs.remove(self)
        if self.serves:
            engine.serve(-1)
        try:
            if self.progress.ends:
                self.queue.ends(self.progress.ends, self)
            elif cut_short:
                self.queue.cut_short(self.what, error, self, self.progress.told)
            self.queue.rest()
        finally:
            self.done = True
        if self._on_done is not None:
            try:
                self._on_done(error)
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
            engine.nudge(self.queue)
        return self.done
