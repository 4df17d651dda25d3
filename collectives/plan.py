"""A plan: a collective bound to a buffer, ready to start again and again without allocating anything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.agreement import Request, agree, wait_for
from bitring.collectives.arrays import Array, as_array, device_of, flat_view
from bitring.collectives.buffers import is_numeric
from bitring.collectives.engine import Job, engine
from bitring.collectives.executor import Progress, Steps, execute
from bitring.collectives.operators import op_name, ufunc_name
from bitring.collectives.program import compile_program
from bitring.collectives.schedule import algorithms, rounds
from bitring.collectives.selection import Choice, check_name, choose, segment_values
from bitring.collectives.state import State, state_of
from bitring.collectives.transport import Transport, make_transport


class Plan(ABC):
    """Base of all plans. ``start`` and ``wait``, or call it for both; ``test`` asks whether a started run is over.

    Creating a plan is collective and checks that all ranks ask for the same thing. Plans of one communicator are run
    in the order they were started, which must be the same on all ranks. ``free`` (or the end of the plan's life)
    gives its MPI requests back.
    """

    algorithm: str
    """The chosen algorithm's registered name."""

    why: str
    """Why it was chosen."""

    def __init__(self, state: State, what: str) -> None:
        self._state = state
        self._what = f"{what} (plan {state.plans + 1})"
        self._channel = state.new_channel()
        self._job: Job | None = None
        self._freed = False
        self.bytes_sent = 0

    @abstractmethod
    def _steps(self, progress: Progress) -> Steps:
        """One run of the collective, as a job's steps; adds to ``bytes_sent``."""

    def start(self) -> None:
        """Begin a run. It goes on beside the caller on the progress thread, in place on the buffer.

        Raises RuntimeError when the last run has not been waited for.
        """
        self._submit()
        engine.start_thread()

    def _submit(self) -> None:
        if self._freed:
            raise RuntimeError(f"{self._what}: start: the plan was freed")
        if self._job is not None:
            raise RuntimeError(f"{self._what}: start: the last run must be waited for first")
        self._job = self._state.lane.submit(self._steps, self._what)

    def wait(self) -> None:
        """Wait for the run that ``start`` began; raises what went wrong in it. Raises RuntimeError without one."""
        if self._job is None:
            raise RuntimeError(f"{self._what}: wait: nothing was started")
        job, self._job = self._job, None
        job.wait()

    def test(self) -> bool:
        """Whether the run that ``start`` began is over (then it counts as waited for)."""
        if self._job is None:
            raise RuntimeError(f"{self._what}: test: nothing was started")
        if not self._job.test():
            return False
        self.wait()
        return True

    def __call__(self) -> None:
        """Run the collective in the calling thread, in place on the buffer."""
        self._submit()
        self.wait()

    def state_dict(self) -> dict[str, Array]:
        """What the plan carries from run to run; nothing for an exact one."""
        return {}

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Take over what ``state_dict`` returned. Raises ValueError for anything else."""
        if state:
            raise ValueError(f"{self._what}: load_state_dict: state must be empty; got {sorted(state)}")

    def free(self) -> None:
        """Give MPI's requests back; the plan cannot be used again. Raises RuntimeError during a run."""
        if self._job is not None and not self._job.done:
            raise RuntimeError(f"{self._what}: free: the last run must be waited for first")
        self._freed = True

    def __del__(self) -> None:
        self._job = None  # a run holds its plan, so none is under way; but the last one may not have been waited for
        if MPI.Is_initialized() and not MPI.Is_finalized():
            self.free()


class ExactPlan(Plan):
    """An exact AllReduce of ``flat``, a 1-D array, by ``choice``."""

    def __init__(self, state: State, flat: Array, op: MPI.Op, choice: Choice) -> None:
        super().__init__(state, f"allreduce of {flat.size} {flat.dtype} values by {choice.name}")
        self.algorithm, self.why = choice
        self._flat = flat
        self._op = op
        self._transport: Transport | None = None
        if choice.name == "mpi":
            self._nbytes = 2 * flat.nbytes * (state.size - 1) // state.size
        else:
            self._transport = transport_for(
                state, "allreduce", choice.name, flat, op, 0, self._channel, persistent=True
            )
            self._nbytes = self._transport.program.values_sent * flat.dtype.itemsize

    def _steps(self, progress: Progress) -> Steps:
        if self._transport is not None:
            yield from execute(self._transport, progress)
        elif self._state.size > 1:
            yield from wait_for(self._state.comm.Iallreduce(MPI.IN_PLACE, self._flat, self._op), progress)
        self.bytes_sent += self._nbytes

    def free(self) -> None:
        """See Plan."""
        super().free()
        if self._transport is not None:
            self._transport.close()


def transport_for(
    state: State, collective: str, algorithm: str, flat: Array, op: MPI.Op, root: int, channel: int, persistent: bool
) -> Transport:
    """A transport for ``algorithm``'s schedule on ``flat``."""
    made = algorithms.get(algorithm)()
    segment = segment_values(flat.nbytes, flat.dtype.itemsize)
    schedule = rounds(made, collective, state.rank, state.size, root)
    program = compile_program(schedule, made.chunks(state.size), flat.size, segment)
    return make_transport(state.comm, program, flat, ufunc_name(op, flat.dtype), channel, persistent)


def checked_flat(x: Any, function: str) -> Array:
    """``x`` as the 1-D writable array that a plan works on in place."""
    flat = flat_view(as_array(x, function, "x"), function, "x", writable=True)
    if not is_numeric(flat.dtype):
        raise TypeError(f"{function}: x must have a numeric dtype; got {flat.dtype}")
    return flat


def run_agreement(state: State, request: Request) -> None:
    """Agree with all ranks, in the calling thread and in order with the communicator's jobs."""
    if state.size == 1:
        if request.error is not None:
            raise request.error
        return
    state.lane.submit(lambda progress: agree(state.comm, request, progress), request.function).wait()


def plan_exact(x: Any, comm: MPI.Intracomm, op: MPI.Op, algorithm: str, function: str = "plan_allreduce") -> ExactPlan:
    """A plan for the exact AllReduce of ``x`` in place; see ``bitring.plan_allreduce``. Collective."""
    state = state_of(comm)
    flat: Array = np.empty(0, np.float32)
    request = Request(function)
    try:
        flat = checked_flat(x, function)
        check_name(algorithm)
        request.terms = {
            "dtype": flat.dtype,
            "count": flat.size,
            "op": op_name(op),
            "algorithm": algorithm,
            "memory": memory_name(flat),
        }
        if op_name(op) == "user":
            raise ValueError(f"{function}: op must be a predefined operation; got one made by MPI.Op.Create")
        if not (ufunc_name(op, flat.dtype) or library_reduces(flat)):
            raise TypeError(f"{function}: {op_name(op)} is not defined for {memory_name(flat)} of {flat.dtype}")
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        request.error = error
    run_agreement(state, request)
    choice = choose(
        "allreduce",
        algorithm,
        flat.nbytes,
        state.size,
        own=ufunc_name(op, flat.dtype) is not None,
        library=library_reduces(flat),
    )
    return ExactPlan(state, flat, op, choice)


def library_reduces(flat: Array) -> bool:
    """Whether every MPI library reduces such arrays: not the 16-bit floats, nor what is in device memory."""
    return device_of(flat) is None and flat.dtype.kind in "iufcb" and flat.dtype != np.float16


def memory_name(flat: Array) -> str:
    """Where an array lives, as messages say it."""
    return "host memory" if device_of(flat) is None else "device memory"


def explain(plan: Plan) -> str:
    """What was chosen for a plan, and why, in one line."""
    return f"{plan.algorithm}: {plan.why}"
