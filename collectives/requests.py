"""Requests that MPI itself knows, completed by bitring: they work in ``MPI.Request.Waitall`` beside any others."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable
from typing import Literal

from mpi4py import MPI
from typing_extensions import Self

from bitring.collectives.base_plan import RUN, Plan
from bitring.collectives.interop.polled_request import Callbacks, as_mpi, start
from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.engine import engine

Work = Callable[[Progress], Steps]


class _Run:
    """A job, and the generalized request that is complete when it is over, or when waiting for it was interrupted.

    Below MPI.THREAD_MULTIPLE the job has run when this is made.
    """

    def __init__(self, context: Context, work: Work, what: str) -> None:
        self.request = start(Callbacks(self._query, engine.poll, self._wait, self._interrupted))
        self._incomplete = [self.request]
        self._interrupt: BaseException | None = None
        self._told = False  # somebody has heard, or is about to hear, what went wrong
        try:
            self._job = context.queue.submit(work, what, on_done=lambda error: self._complete())
        except BaseException:
            self.request.Complete()
            self.request.Free()
            raise
        if not engine.start_thread():
            engine.drive(self._job)

    @property
    def over(self) -> bool:
        """Whether the job is; one whose wait was interrupted goes on."""
        return self._job.done

    @property
    def _error(self) -> BaseException | None:
        return self._interrupt or self._job.error

    def _query(self) -> None:
        if self._error is not None and not self._told:
            self._told = True
            raise as_mpi(self._error)

    def _wait(self) -> None:
        while not self._job.done:
            engine.poll()
            MPI.COMM_SELF.Iprobe()  # the library's own requests in the same Waitall need its progress, too

    def _interrupted(self, interrupt: BaseException) -> None:
        self._interrupt = interrupt
        self._complete()

    def _complete(self) -> None:
        with contextlib.suppress(IndexError):
            self._incomplete.pop().Complete()

    def wait(self, library: Callable[[], object]) -> None:
        """Wait for the job, then as the library does; raises the job's error."""
        engine.drive(self._job)  # the library's own wait may leave its lock to the progress thread too rarely
        self.test(library)

    def test(self, library: Callable[[], object]) -> bool:
        """Ask the library whether the job is over; raises the job's error."""
        told, self._told = self._told, True
        over = False
        try:
            over = bool(library())
        finally:
            if not over:
                self._told = told
        if over and self._error is not None and (not told or not isinstance(self._error, Exception)):
            raise self._error  # an interrupt over and over: to the library a request that was waited for is over
        return over


class GeneralRequest(MPI.Grequest):
    """A generalized request that stands for a job. Wait and Test raise the job's error, Waitall MPI's version of it."""

    def __new__(cls, context: Context, work: Work, what: str) -> Self:
        """Submit the job."""
        run = _Run(context, work, what)
        self = super().__new__(cls, run.request)
        self._run = run
        return self

    def __init__(self, context: Context, work: Work, what: str) -> None:
        self._run: _Run

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Wait for the job; raises its error."""
        self._run.wait(lambda: super(GeneralRequest, self).Wait(status))
        return True

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Whether the job is over; raises its error."""
        return self._run.test(lambda: super(GeneralRequest, self).Test(status))


class PersistentRequest(MPI.Prequest):
    """A persistent request that stands for a job: while it is active, its handle is that of a generalized request.

    Inactive it is MPI.REQUEST_NULL: Waitall takes it as it takes any inactive request, and Startall refuses it.
    """

    def __new__(cls, context: Context, work: Work, what: str, plan: Plan | None = None) -> Self:
        """``plan``, of which a run is one of the request's, is freed with it."""
        self = super().__new__(cls)
        self._context, self._work, self._what, self._plan = context, work, what, plan
        self._run = None
        self._freed = False
        return self

    def __init__(self, context: Context, work: Work, what: str, plan: Plan | None = None) -> None:
        self._context: Context
        self._work: Work
        self._what: str
        self._plan: Plan | None
        self._run: _Run | None  # the last one
        self._freed: bool

    def _check_inactive(self, what: str) -> None:
        if self._freed:
            raise RuntimeError(f"{what} of a freed request of {self._what}")
        if self != MPI.REQUEST_NULL or (self._run is not None and not self._run.over):
            raise RuntimeError(f"{what} of an active request of {self._what}: Wait or Test for its run first")

    def Start(self) -> None:
        """Begin a run. Raises RuntimeError while the last one is active; the other ranks' runs raise PeerError then."""
        with self._context.turn(f"Start of a request of {self._what}"):
            try:
                self._check_inactive("Start")
            except RuntimeError as error:
                self._context.refuse(RUN, error)
                raise
            self._run = _Run(self._context, self._work, self._what)
        ctypes.memmove(MPI._addressof(self), MPI._addressof(self._run.request), MPI._sizeof(MPI.Request))

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Wait for the run; raises what went wrong in it."""
        if self._run is None:
            return super().Wait(status)
        self._run.wait(lambda: super(PersistentRequest, self).Wait(status))
        return True

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Whether the run is over; raises what went wrong in it."""
        if self._run is None:
            return super().Test(status)
        return self._run.test(lambda: super(PersistentRequest, self).Test(status))

    def Free(self) -> None:
        """Free what the runs keep. Raises RuntimeError while one is active."""
        self._check_inactive("Free")
        self._freed = True
        if self._plan is not None:
            self._plan.free()
