"""Requests that MPI itself knows, completed by bitring: they work in ``MPI.Request.Waitall`` beside any others."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Literal

from mpi4py import MPI
from typing_extensions import Self

from bitring.collectives.engine import Job, engine
from bitring.collectives.executor import Progress, Steps
from bitring.collectives.runner import Runner
from bitring.collectives.state import State

Work = Callable[[Progress], Steps]


class GeneralRequest(MPI.Grequest):
    """A generalized request that stands for a job. Wait and Test raise the job's error, Waitall MPI's version of it.

    Below MPI.THREAD_MULTIPLE the job has run when the request is made.
    """

    def __new__(cls, state: State, work: Work, what: str) -> Self:
        """Submit the job."""
        jobs: list[Job] = []
        told: list[bool] = []

        def query(status: MPI.Status) -> None:
            error = jobs[0].error
            if error is not None and not told:
                raise _as_mpi(error)

        self = super().__new__(cls, MPI.Grequest.Start(query))
        jobs.append(state.lane.submit(work, what, on_done=self.Complete))
        self._jobs, self._told = jobs, told
        if not engine.start_thread():
            engine.drive(jobs[0])
        return self

    def __init__(self, state: State, work: Work, what: str) -> None:
        self._jobs: list[Job]
        self._told: list[bool]  # not empty: Wait or Test raises, so MPI need not

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Wait for the job; raises its error."""
        self._told.append(True)
        engine.drive(self._jobs[0])  # the library's wait would spin, and leave its lock to the progress thread rarely
        super().Wait(status)
        self._over(True)
        return True

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Whether the job is over; raises its error."""
        self._told.append(True)
        over = self._over(super().Test(status))
        self._told.clear()
        return over

    def _over(self, over: bool) -> bool:
        error = self._jobs[0].error
        if over and error is not None:
            raise error
        return over


def _as_mpi(error: BaseException) -> MPI.Exception:
    """The error as one that MPI carries to whoever completes the request."""
    if isinstance(error, MPI.Exception):
        return error
    code = MPI.Add_error_code(MPI.ERR_OTHER)
    MPI.Add_error_string(code, f"{type(error).__name__}: {error}"[: MPI.MAX_ERROR_STRING - 1])
    return MPI.Exception(code)


@functools.cache
def _self_comm() -> MPI.Intracomm:
    return MPI.COMM_SELF.Dup()


_tags = itertools.count()


class PersistentRequest(MPI.Prequest):
    """A persistent request that stands for a job: an empty message to itself, received when the job is over."""

    def __new__(cls, state: State, work: Work, what: str, runner: Runner | None) -> Self:
        """``runner`` is closed with the request."""
        tag = next(_tags) % 32768
        self = super().__new__(cls, _self_comm().Recv_init([None, 0, MPI.BYTE], 0, tag))
        self._state, self._work, self._what, self._runner, self._tag = state, work, what, runner, tag
        self._job = None
        return self

    def __init__(self, state: State, work: Work, what: str, runner: Runner | None) -> None:
        self._state: State
        self._work: Work
        self._what: str
        self._runner: Runner | None
        self._tag: int
        self._job: Job | None

    def Start(self) -> None:
        """Begin a run. Raises what went wrong in the last run unless Wait or Test did."""
        self._raise()
        super().Start()
        self._job = self._state.lane.submit(
            self._work, self._what, on_done=lambda: _self_comm().Send([None, 0, MPI.BYTE], 0, self._tag)
        )
        if not engine.start_thread():
            engine.drive(self._job)

    def Wait(self, status: MPI.Status | None = None) -> Literal[True]:
        """Wait for the run; raises what went wrong in it."""
        if self._job is not None:
            engine.drive(self._job)  # see GeneralRequest
        super().Wait(status)
        self._raise()
        return True

    def Test(self, status: MPI.Status | None = None) -> bool:
        """Whether the run is over; raises what went wrong in it."""
        over = super().Test(status)
        if over:
            self._raise()
        return over

    def _raise(self) -> None:
        job, self._job = self._job, None
        if job is not None and job.error is not None:
            raise job.error

    def Free(self) -> None:
        """Free the request and what its runs keep."""
        if self._runner is not None:
            self._runner.close()
        super().Free()
