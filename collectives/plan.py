"""A plan: a collective bound to a buffer, ready to start again and again without allocating anything."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from mpi4py import MPI

from bitring.arrays import Array, as_array, device_of, flat_view, memory_order, require_numeric
from bitring.collectives.base_plan import Plan
from bitring.collectives.execution.native import ALONE_SECONDS, DONE, may_run_past_engine
from bitring.collectives.execution.runner import OperandRunner, Runner, Task, make_runner
from bitring.collectives.interop.operators import op_name, require_defined, require_op, ufunc_name
from bitring.collectives.interop.steps import Progress, Steps, finish
from bitring.collectives.runtime.agreement import Request, agree, checked, conclude, met, verdict_of
from bitring.collectives.runtime.context import Context, context_of
from bitring.collectives.runtime.objects import gather
from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.selection.selection import Choice, check_name, choose

HOST = "host memory"


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
        task = Task("allreduce", flat, op, number=self.number, signature=self._run.kind)
        self._runner = make_runner(context, choice.name, task)
        self._nbytes = self._runner.nbytes_sent
        self.by_library = algorithm.library
        self._whole_run = self._runner.operation if algorithm.self_checking else None
        if self._whole_run is None and context.roll_call is not None and self._runner.operation is not None:
            self._whole_run = checked(context.roll_call, self._run, self._runner.operation)
        if context.size == 1:
            self._past_engine = lambda: DONE  # whose sum is there
        elif context.queue.fast_path is not None and may_run_past_engine(self._whole_run):
            self._past_engine = context.queue.fast_path.runs(self._whole_run, ALONE_SECONDS).run

    @property
    def can_be_signed(self) -> bool:
        """See Plan."""
        return self._whole_run is not None

    def sign(self, signature: int | None, name: str = "") -> None:
        """See Plan."""
        self.signed = signature is not None
        self.alike = not self.signed
        self.name = name or self.what
        self._whole_run.sign(self._run.kind if signature is None else signature)

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
        """See Plan."""
        yield from finish(self._whole_run, progress)
        if self._whole_run.disagrees:
            verdict = verdict_of(self._whole_run.verdict)
            if self.signed and met(verdict):
                return
            yield from conclude(self.context.comm, self._run, verdict, progress)
        self.alike = True
        self.bytes_sent += self._nbytes

    def checked_steps(self, progress: Progress) -> Steps:
        """See Plan."""
        self.alike = not self.signed
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
