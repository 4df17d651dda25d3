"""The base of all plans: what starts, waits and asks, and how all ranks find out that they are at the same plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from mpi4py import MPI
from typing_extensions import Self

from bitring.arrays import Array
from bitring.collectives.execution.native import DECLINED, DONE, REFUSED
from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.agreement import Check, Request, agree, conclude
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.job import Job
from bitring.errors import uncopyable

_OVER: Any = object()

RUN = "a run of a plan"
"""Name of a plan's run when ranks agree; of a run of Allreduce_init's request, too."""


class Plan(ABC):
    """Base of all plans. ``start`` and ``wait``, or call it for both; ``test`` asks whether a started run is over.

    Creating a plan is collective and checks that all ranks ask for the same thing. Plans of one communicator are run
    in the order they were started, which must be the same on all ranks. ``free`` (or the end of the plan's life)
    gives its MPI requests back.
    """

    algorithm: str
    """The chosen algorithm's registered name."""

    why: str
    """The reason for the choice."""

    by_library = False
    """Whether a run is a collective of the MPI library's, which another rank's must not meet while they find out."""

    _nbytes = 0
    """Bytes that a run past the engine sends, where it does not count them itself."""

    takes_factors = False
    """Whether parameters may be given as ``bitring.Factors``, by ``take``."""

    def __init__(self, context: Context, what: str) -> None:
        self.context = context
        self.number = context.new_plan()
        self.what = f"{what} (plan {self.number})"
        self._run = Request(RUN, {"plan": self.what})
        self._job: Job | None = None
        self._told = False  # whoever asked for it has been told that the last run is over
        self._freed = False
        self.signed = False
        """Whether runs are those of a meeting; see ``sign``."""
        self.name = self.what
        """Of its runs, in messages."""
        self.alike = True
        """After a run: whether all ranks have said the same. Where the plan is signed, False until its end."""
        self._remake: Callable[[MPI.Intracomm], Plan] | None = None
        self._past_engine: Callable[[], Any] | None = None  # one run, in the thread that calls; what became of it
        self._outcome: Any = None  # of a run past the engine that is not over
        self.bytes_sent = 0

    @property
    def telemetry(self) -> Any:
        """What a compressed plan knows of its last run; None before one, and where sums are exact."""
        return None

    @abstractmethod
    def _steps(self, progress: Progress) -> Steps:
        """One run of the collective, as a job's steps; adds to ``bytes_sent``."""

    def checked_steps(self, progress: Progress) -> Steps:
        """One run; all ranks find out that they are at the same plan, before it or beside it."""
        if self.context.size == 1:
            yield from self._steps(progress)
        elif self.context.roll_call is not None or self.by_library:
            yield from agree(self.context.comm, self.context.roll_call, self._run, progress)
            yield from self._steps(progress)
        else:
            check = Check(self.context.comm, self._run)
            steps, checked, over = self._steps(progress), False, False
            while not (checked and over):
                if not checked and check.request.Test():
                    checked = True
                    progress.moves += 1
                    yield from conclude(self.context.comm, self._run, check.verdict, progress)
                waiting = next(steps, _OVER) if not over else None
                over = over or waiting is _OVER
                if not (checked and over):
                    yield None if over or not checked else waiting

    def start(self, on_done: Callable[[BaseException | None], None] | None = None) -> None:
        """Begin a run. It goes on beside the caller on the progress thread, in place on the buffer.

        ``on_done`` is called when the run is over, with what went wrong or None, in the thread that ends it: the
        progress thread or one that waits. It must be brief and must not call bitring. Such a run may be waited for, but
        need not be. Raises RuntimeError when the last run has not been waited for.
        """
        with self.context.turn(self.name):
            self._submit(on_done)
        engine.start_thread()

    def on(self, comm: MPI.Intracomm) -> Plan:
        """Another plan of the same array, with the same settings, on ``comm``. Collective there; this one stays.

        What this one carries from run to run is not in it: see ``state_dict`` and ``load_state_dict``.
        """
        assert self._remake is not None, "made by plan_allreduce"
        return self._remake(comm)

    def remade_by(self, remake: Callable[[MPI.Intracomm], Plan]) -> Self:
        """This plan; ``remake`` makes one like it on another communicator."""
        self._remake = remake
        return self

    def check_startable(self) -> None:
        """Raise RuntimeError when a run cannot begin now."""
        if self._freed:
            raise RuntimeError(f"{self.what}: start: the plan was freed")
        if self._job is not None and not (self._told and self._job.done):
            raise RuntimeError(f"{self.what}: start: the last run must be waited for first")

    def take_job(self, job: Job) -> None:
        """``job``, under way, is a run of this plan."""
        self._job, self._told = job, False

    def _submit(self, on_done: Callable[[BaseException | None], None] | None = None) -> None:
        try:
            self.check_startable()
        except RuntimeError as error:  # the other ranks must not wait for this one's run
            self.refuse(error)
            raise
        self._told = on_done is not None
        self._job = self.context.queue.submit(self.checked_steps, self.name, on_done)
        self._job.whole = self.signed

    def refuse(self, error: Exception) -> None:
        """Let the other ranks hear, in their run of this plan, why this one cannot begin; in the turn of a call."""
        self.context.refuse(self._run.function, error)

    def wait(self) -> None:
        """Wait for the run that ``start`` began; raises what went wrong in it. Raises RuntimeError without one.

        A run that goes on after a Ctrl-C can be waited for again.
        """
        job = self._job
        if job is None:
            raise RuntimeError(f"{self.what}: wait: nothing was started")
        try:
            job.wait()
        finally:
            if job.done and self._job is job:
                self._job = None

    @property
    def started(self) -> bool:
        """Whether a run was begun that has not been waited for to its end."""
        return self._job is not None

    def test(self) -> bool:
        """Whether the run that ``start`` began is over (then it counts as waited for)."""
        if self._job is None:
            raise RuntimeError(f"{self.what}: test: nothing was started")
        if not self._job.test():
            return False
        self.wait()
        return True

    def __call__(self, before_wait: Callable[[], None] | None = None) -> None:
        """Run the collective in the calling thread, in place on the buffer.

        ``before_wait`` is called where a wait begins that may be long, and that an interrupt is to end.
        """
        if self._outcome is None and self.run_past_engine():
            return
        outcome, self._outcome = self._outcome, None
        with self.context.turn(self.name, continues=outcome != DECLINED):
            if outcome == DECLINED:
                self._submit()
            elif outcome == REFUSED:
                self.alike = True
                self.bytes_sent += self._nbytes
                return
            else:
                self._submit_rest()
            if before_wait is not None:
                before_wait()
            self.wait()

    @property
    def may_pass_engine(self) -> bool:
        """Whether runs may be over in the calling thread, without the engine."""
        return self._past_engine is not None

    def run_past_engine(self) -> bool:
        """Run, if that can be, past the engine. Whether the run is over; else a call goes on with it, or begins one."""
        self._outcome = DECLINED
        self.alike = not self.signed
        past_engine = self._past_engine
        if past_engine is not None and (self._job is None or (self._told and self._job.done)):
            try:
                outcome = past_engine()
            except BaseException as error:  # an interrupt: others may be in the run
                self.context.queue.cut_short(self.name, error, self)
                raise
            if outcome == DONE:
                self._outcome = None
                self.alike = True
                self.bytes_sent += self._nbytes
                return True
            self._outcome = outcome
        return False

    def _submit_rest(self) -> None:
        try:
            self._job = self.context.queue.submit(self._finish, self.name)
            self._job.whole = self.signed
        except BaseException as error:
            self.context.queue.cut_short(self.name, error, self)
            raise

    def _finish(self, progress: Progress) -> Steps:
        """The rest of a run past the engine."""
        raise NotImplementedError

    @property
    def can_be_signed(self) -> bool:
        """Whether ``sign`` may be called; the same on all ranks."""
        return False

    def sign(self, signature: int | None, name: str = "") -> None:
        """Say ``signature``, a ``meeting_signature``, from the next run on, which has this name; None: as other plans.

        Where not all ranks say the same, and all are in runs that are signed, be it of this plan or of others, nothing
        is exchanged or changed, ``alike`` is False on all, and no error is raised.
        """
        self.signed = signature is not None
        self.alike = not self.signed
        self.name = name or self.what

    def mark(self) -> None:
        """From here on ``undo`` takes back what runs change in what the plan carries from run to run."""

    def undo(self) -> None:
        """Give what the plan carries from run to run the values of the last ``mark``; not during a run."""

    def state_dict(self) -> dict[str, Array]:
        """Arrays that the plan carries from run to run; empty for an exact plan."""
        return {}

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Load the arrays that ``state_dict`` returned. Raises TypeError or ValueError for anything else."""
        if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{self.what}: load_state_dict: state must be a dict; got {type(state).__name__}")
        if state:
            raise ValueError(f"{self.what}: load_state_dict: state must be empty; got {sorted(state)}")

    def free(self) -> None:
        """Give MPI's requests back; the plan cannot be used again. Raises RuntimeError during a run."""
        if self._job is not None and not self._job.done:
            raise RuntimeError(f"{self.what}: free: the last run must be waited for first")
        self._freed = True

    def __reduce__(self) -> Any:
        raise uncopyable(self, "make a plan in each process; state_dict() has what it carries from run to run")

    def __del__(self) -> None:
        self._job = None  # a run holds its plan, so none is under way; but the last one may not have been waited for
        if MPI.Is_initialized() and not MPI.Is_finalized():
            self.free()
