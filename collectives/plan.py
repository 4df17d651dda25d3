"""A plan: a collective bound to a buffer, ready to start again and again without allocating anything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from mpi4py import MPI
from typing_extensions import Self

from bitring.arrays import Array, as_array, device_of, flat_view, memory_order, require_numeric
from bitring.collectives.execution.native import ALONE_SECONDS, DECLINED, DONE, REFUSED, may_run_past_engine
from bitring.collectives.execution.runner import OperandRunner, Runner, Task, make_runner
from bitring.collectives.interop.operators import op_name, require_defined, require_op, ufunc_name
from bitring.collectives.interop.steps import Progress, Steps, finish
from bitring.collectives.runtime.agreement import Check, Request, agree, checked, conclude, verdict_of
from bitring.collectives.runtime.context import Context, context_of
from bitring.collectives.runtime.engine import engine
from bitring.collectives.runtime.job import Job
from bitring.collectives.runtime.objects import gather
from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.selection.selection import Choice, check_name, choose
from bitring.errors import uncopyable

HOST = "host memory"

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

    telemetry: Any = None
    """What a compressed plan knows of its last run; None before one, and where sums are exact."""

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
        self._remake: Callable[[MPI.Intracomm], Plan] | None = None
        self.bytes_sent = 0

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
        with self.context.turn(self.what):
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
        self._job = self.context.queue.submit(self.checked_steps, self.what, on_done)

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

    def __call__(self) -> None:
        """Run the collective in the calling thread, in place on the buffer."""
        with self.context.turn(self.what):
            self._submit()
            self.wait()

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


class ExactPlan(Plan):
    """An exact AllReduce of ``flat``, a 1-D array, by ``choice``; ``what``: what it does, where that is not all."""

    def __init__(self, context: Context, flat: Array, op: MPI.Op, choice: Choice, what: str = "") -> None:
        super().__init__(context, what or f"allreduce of {flat.size} {flat.dtype} values by {choice.name}")
        self.algorithm, self.why = choice
        self.flat = flat
        self.op = op
        algorithm = algorithms.get(choice.name)
        self.fusion = algorithm.fusion
        self.fused: Any = None  # with which plans it was last started, and how
        self._runner: Runner | None = None
        self._whole_run: Any = None  # a native operation that is a whole run and finds out itself whether all mean it
        self._past_engine: Any = None  # runs it past the engine, and says what became of that
        task = Task("allreduce", flat, op, number=self.number, signature=self._run.kind)
        self._runner = make_runner(context, choice.name, task)
        self._nbytes = self._runner.nbytes_sent
        self.by_library = algorithm.library
        self._whole_run = self._runner.operation if algorithm.self_checking else None
        if self._whole_run is None and context.roll_call is not None and self._runner.operation is not None:
            self._whole_run = checked(context.roll_call, self._run, self._runner.operation)
        if context.queue.fast_path is not None and may_run_past_engine(self._whole_run):
            self._past_engine = context.queue.fast_path.runs(self._whole_run, ALONE_SECONDS).run

    def __call__(self) -> None:
        """Run the collective in the calling thread, in place on the buffer."""
        run, outcome = self._past_engine, DECLINED
        if run is not None and (self._job is None or (self._told and self._job.done)):
            try:
                outcome = run()
            except BaseException as error:  # an interrupt: others may be in the run
                self.context.queue.cut_short(self.what, error, self)
                raise
            if outcome == DONE:
                self.bytes_sent += self._nbytes
                return
        if outcome == DECLINED:
            super().__call__()
            return
        with self.context.turn(self.what, continues=True):
            if outcome == REFUSED:
                self.bytes_sent += self._nbytes
                return
            try:
                self._job = self.context.queue.submit(self._finish, self.what)
            except BaseException as error:
                self.context.queue.cut_short(self.what, error, self)
                raise
            self.wait()

    @property
    def fusible(self) -> bool:
        """Whether a run may travel with other plans' runs."""
        return self.context.size > 1 and device_of(self.flat) is None and self.fusion is not None

    def operands(self) -> list[tuple[int, int, int, int]]:
        """The arrays that a run reduces, for fusion by operands."""
        return cast(OperandRunner, self._runner).operands

    def count_run(self) -> None:
        """Count a run that was made together with other plans'."""
        self.bytes_sent += self._nbytes

    def _finish(self, progress: Progress) -> Steps:
        """The rest of a native run."""
        yield from finish(self._whole_run, progress)
        if self._whole_run.disagrees:
            yield from conclude(self.context.comm, self._run, verdict_of(self._whole_run.verdict), progress)
        self.bytes_sent += self._nbytes

    def checked_steps(self, progress: Progress) -> Steps:
        """See Plan."""
        if self._whole_run is None:
            yield from super().checked_steps(progress)
        else:
            self._whole_run.begin()
            yield from self._finish(progress)

    def _steps(self, progress: Progress) -> Steps:
        assert self._runner is not None
        yield from self._runner.steps(progress)
        self.bytes_sent += self._nbytes

    def free(self) -> None:
        """See Plan."""
        super().free()
        self._whole_run = self._past_engine = self.fused = None
        if self._runner is not None:
            self._runner.close()


def checked_flat(x: Any, function: str) -> tuple[Array, dict[str, object]]:
    """``x`` as the 1-D writable array that a plan works on in place, and its ``array_terms``."""
    array = as_array(x, function, "x")
    require_numeric(array.dtype, function, "x")
    flat = flat_view(array, function, "x", writable=True)
    return flat, array_terms(array)


def array_terms(x: Array) -> dict[str, object]:
    """The properties of an array, reduced value by value, that must be identical on all ranks."""
    return {
        "dtype": x.dtype,
        "count": x.size,
        "shape": tuple(x.shape),
        "order": memory_order(x),
        "memory": memory_name(x),
    }


def run_agreement(context: Context, request: Request, gentle: bool = False, patience: float = 0.0) -> None:
    """Agree with all ranks, in the calling thread and in order with the communicator's jobs; ``gentle``: asleep.

    ``patience``: see ``Progress``.
    """
    if context.size == 1:
        if request.error is not None:
            raise request.error
        return
    context.prepare(request.function, request.error)

    def steps(progress: Progress) -> Steps:
        progress.patience = patience
        yield from agree(context.comm, context.roll_call, request, progress)

    context.queue.call(steps, request.function, gentle)


def plan_exact(x: Any, comm: MPI.Intracomm, op: MPI.Op, algorithm: str, function: str = "plan_allreduce") -> ExactPlan:
    """A plan for the exact AllReduce of ``x`` in place; see ``bitring.plan_allreduce``. Collective."""
    context = context_of(comm)
    flat: Array = np.empty(0, np.float32)
    request = Request(function)
    try:
        flat, terms = checked_flat(x, function)
        check_name(algorithm, function)
        require_op(op, function)
        request.terms = {**terms, "op": op_name(op), "algorithm": algorithm}
        if op_name(op) == "user":
            raise ValueError(f"{function}: op must be a predefined operation; got one made by MPI.Op.Create")
        require_defined(op, flat.dtype, function)
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        request.error = error
    with context.turn(function):
        run_agreement(context, request)
        plan = ExactPlan(context, flat, op, choose(algorithm, query_of(context, flat, op), context.table))
        return plan.remade_by(lambda other: plan_exact(x, other, op, algorithm, function))


def query_of(context: Context, flat: Array, op: MPI.Op) -> Query:
    """The query by which an algorithm is chosen for the AllReduce of ``flat``. Collective: see ``resident``."""
    return Query(
        collective="allreduce",
        nbytes=flat.nbytes,
        topology=context.topology,
        own=ufunc_name(op, flat.dtype) is not None,
        library=library_reduces(flat, op),
        itemsize=flat.dtype.itemsize,
        host=device_of(flat) is None,
        resident=resident(context, flat),
    )


def library_reduces(flat: Array, op: MPI.Op) -> bool:
    """Whether every MPI library reduces such arrays, with the same bits on all ranks.

    Not the 16-bit floats, nor what is in device memory. Nor is MAX or MIN of floats for the library: which of a number
    and NaN is the larger depends on who compares them in which order, and libraries let every rank do it by itself.
    """
    if device_of(flat) is not None or flat.dtype.kind not in "iufcb" or flat.dtype == np.float16:
        return False
    return flat.dtype.kind != "f" or op_name(op) not in ("MAX", "MIN")


def resident(context: Context, flat: Array) -> bool:
    """Whether all ranks' buffers are in memory that their nodes share. Collective where there is such memory."""
    if context.shared is None or device_of(flat) is not None:
        return False
    return all(gather(context, context.shared.region_of(flat) is not None, "plan_allreduce"))


def memory_name(flat: Array) -> str:
    """The memory that an array is in, as messages name it."""
    return HOST if device_of(flat) is None else "device memory"


def explain(plan: Plan) -> str:
    """Explain in one line which algorithm was chosen for a plan, and why. Raises TypeError for anything but a plan."""
    if not isinstance(plan, Plan):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"explain: plan must be what plan_allreduce returns; got {type(plan).__name__}")
    return f"{plan.algorithm}: {plan.why}"
