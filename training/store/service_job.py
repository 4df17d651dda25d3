"""The job of a rank's service: messages of its own, and waits in the training thread for what they bring."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable

from mpi4py import MPI

from bitring.collectives.interop.steps import Progress, StepsTo, wait_for
from bitring.collectives.node.node_group import LEFT_SECONDS
from bitring.collectives.runtime.context import Context, context_of
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.job import Job
from bitring.collectives.runtime.objects import agreed_job
from bitring.collectives.runtime.rank_numbers import numbers_in
from bitring.training.store.service import Service

_SERVE_SECONDS = 0.05
"""A wait in native code of this length is worth a look; and a Ctrl-C takes effect."""


def private_context(comm: MPI.Intracomm, what: str) -> Context:
    """That of another communicator of the same ranks, for messages of nobody else's. Collective."""
    outer = context_of(comm)
    private = agreed_job(outer, lambda progress: _duplicate(outer, progress), what)
    return Context(private, None, outer.rank, numbers_in(MPI.COMM_WORLD, private))


def _duplicate(context: Context, progress: Progress) -> StepsTo[MPI.Intracomm]:
    private, made = context.comm.Idup()
    yield from wait_for(made, progress)
    private.Set_errhandler(MPI.ERRORS_RETURN)
    return MPI.Intracomm(private)


class ServiceJob:
    """Runs ``service`` in ``context``, a private one, until all ranks have ended; ``what``: whose, for messages."""

    def __init__(self, service: Service, context: Context, what: str) -> None:
        self.waited = 0.0
        """Seconds that the training thread has, in all."""
        self.waited_for: dict[int, float] = defaultdict(float)
        """Rank -> seconds of these waits for it: those that owners said they wait for last, and those without room."""
        self._service = service
        self._context = context
        self._what = what
        self._job = context.queue.submit(service.steps, what, serves=True)
        engine.start_thread()

    @property
    def over(self) -> bool:
        """Whether all ranks have ended, or it has failed."""
        return self._job.done

    def go_on(self, ends: bool = False) -> None:
        """Send what is posted, unless another thread is at it. Raises as ``until`` does.

        ``ends``: that was this rank's last word, by which another thread may have come to the end by now.
        """
        if ends and self._job.done:
            return
        self._raise_if_over()
        if not self._serve(0.0):
            engine.nudge(self._context.queue)

    def until(self, there: Callable[[], bool], call: str) -> None:
        """Wait for something that the service brings. Raises what ended the service, RuntimeError after its end."""
        self._raise_if_over()
        self._service.look()
        if there():
            return
        self._job.what = f"{self._what}.{call}"
        asked, without_room = self._service.awaiting.copy(), self._service.without_room.copy()
        began = time.perf_counter()
        try:
            wait = _Wait(self._job, there)
            while not wait.done and self._serve(_SERVE_SECONDS):
                self._service.look()
            if not wait.done:
                engine.drive(wait)  # type: ignore[arg-type]
        finally:
            seconds = time.perf_counter() - began
            self.waited += seconds
            for rank in self._service.held_by(asked) | without_room:
                self.waited_for[rank] += seconds
            self._service.lack_room(set())
        self._raise_if_over()

    def stay(self, waits: bool) -> None:
        """Wait for the end of all ranks, after this rank's.

        Not ``waits``: the process is to end, and this rank comes to no call any more. After a while, as where a process
        has ended in good order, who waits for it on another communicator than the service's hears of that.
        """
        self._service.leaves = waits
        self._job.what = f"{self._what}.free"
        until = math.inf if waits else time.monotonic() + LEFT_SECONDS

        def look() -> bool:
            nonlocal until
            if time.monotonic() > until:
                until = math.inf
                for queue in list(engine.queues):
                    if queue.contact is not None and not any(each.serves for each in queue.jobs):
                        queue.contact.tell_quit()
            return False

        engine.drive(_Wait(self._job, look))  # type: ignore[arg-type]

    def close(self) -> None:
        """It is over. Raises what ended it before its time."""
        self._context.close()
        if self._job.error is not None:
            raise self._job.error

    def _serve(self, seconds: float) -> bool:
        """See Service.serve; beside the progress thread, which sees to everything else."""
        return engine.stopped is None and self._service.serve(seconds)

    def _raise_if_over(self) -> None:
        if self._job.done:
            raise self._job.error or RuntimeError(f"{self._what}: it has been freed")


class _Wait:
    """A wait for ``there``, or the service's end, as the engine drives one."""

    error = None

    def __init__(self, job: Job, there: Callable[[], bool]) -> None:
        self._job, self._there = job, there

    @property
    def done(self) -> bool:
        """Whether it is over."""
        return self._job.done or self._there()
