"""The steps of a trainer in a free mode: each rank makes its own, and ranks meet only in the other operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from mpi4py import MPI

from bitring.collectives.runtime.jointly import jointly, raise_everywhere
from bitring.compression.compressor import Compressor
from bitring.compression.factors import dense
from bitring.errors import NonFiniteError
from bitring.training.mode import FreeMode
from bitring.training.step.base_stepper import BaseStepper
from bitring.training.step.checks import checked_gradients, checked_weight, not_finite, text_of
from bitring.training.step.gradient_exchange import GradientExchange
from bitring.training.step.meeting import OPERATIONS, WRONG, Meeting, hash_of
from bitring.training.step.open_step import OpenStep
from bitring.training.step.replica import Replica

T = TypeVar("T")


class FreeStepper(BaseStepper):
    """In the place of a ``Stepper``, on ``comm``, for a replica whose mode is free. Collective to make.

    ``number``: the trainer's, the same on all ranks. ``unused_are_zeros``: a gradient that is missing counts as zeros.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        replica: Replica,
        exchange: GradientExchange,
        number: int,
        compressors: Mapping[str, Compressor | None],
        unused_are_zeros: bool,
    ) -> None:
        super().__init__(comm, replica, exchange)
        self._number = number
        self._unused_are_zeros = unused_are_zeros
        self._meeting = Meeting(comm, self._words)
        self._open: OpenStep | None = None
        self._bad: str | None = None  # what is not finite in the gradients of the step that is open
        self._left = False
        replica.optimizer_state = jointly(comm, "DataParallel", lambda: replica.optimizer.init(replica.parameters))
        assert isinstance(replica.mode, FreeMode)
        self._takes_sparse = replica.mode.takes_sparse
        self.running = replica.mode.start(comm, replica, compressors)

    # Steps: nothing here is collective

    def step(self, gradients: Any, weight: Any) -> None:
        """See ``DataParallel.step``."""
        if self._dropped_open():
            raise TypeError(f"{self.where}: begin and ready have what this step takes; call it without arguments")
        self._begin_step()
        weight = checked_weight(weight, self.where)
        taken = self._taken(gradients, self._replica.parameters, self._unused_are_zeros) if weight else {}
        self._make(taken, weight, not_finite(taken) if taken else None)

    def _begin_step(self) -> None:
        self.operation = "step"
        if self._left:
            raise RuntimeError(f"{self.where}: this rank has left; it can synchronize, save and free")
        self._raise_told()
        self._exchange.timeline.restart(computed=True)
        self.notices.everyone = 0

    def _taken(self, gradients: Any, parameters: Mapping[str, Any], zeros: bool) -> dict[str, Any]:
        """As the mode takes them. Raises TypeError and ValueError."""
        taken = checked_gradients(gradients, parameters, self.where, zeros, self._takes_sparse)
        keep = self.running.factors
        return {name: g if name in keep else dense({name: g})[name] for name, g in taken.items()}

    def _make(self, taken: Mapping[str, Any], weight: float, bad: str | None) -> None:
        """The step; ``bad``: what is not finite in its gradients."""
        self.running.stands = False
        try:
            if bad is None:
                self.running.step(taken, weight)
            else:
                self.running.miss(f"{self.where}: the gradient of {bad} on rank {self.comm.Get_rank()}")
        except BaseException:
            self.steps += self.running.stands
            raise
        self.steps += 1
        self._exchange.timeline.leave()

    def _raise_told(self) -> None:
        told = self.running.told()
        if told is not None:
            raise NonFiniteError(told)

    def begin(self, weight: Any) -> OpenStep:
        """See ``DataParallel.begin``."""
        if self._dropped_open():
            raise RuntimeError(f"{self.where}: begin: the step that began before was not made; step() makes it")
        self.operation = "step"
        mine = checked_weight(weight, f"DataParallel.begin (step {self.steps})")
        self._open = OpenStep(self._exchange, mine, False, self._abandon)
        self._bad = None
        return self._open

    def _abandon(self, opened: OpenStep, error: BaseException) -> None:
        if self._open is opened:
            self._dropped_open()

    def _dropped_open(self) -> bool:
        """Whether a step was open; it is not made, nor is one of which an interrupt has left a part."""
        was_open = self._open is not None
        self.running.forget()
        self._open = None
        return was_open

    def ready(self, name: str, gradient: Any) -> None:
        """See ``DataParallel.ready``."""
        opened = self._open
        if opened is None:
            raise RuntimeError("DataParallel.ready: no step is open; call begin(weight) before the gradients come")
        try:
            opened.take(name, gradient, self._replica.parameters, self.where, self.comm.Get_rank())
            if opened.weight and (gradient is not None or not self._unused_are_zeros):
                self._go_ahead(opened, name)
        except BaseException:
            self._dropped_open()
            raise

    def _go_ahead(self, opened: OpenStep, name: str) -> None:
        """Check a gradient that was handed over, and let it travel."""
        taken = self._taken({name: opened.gradients[name]}, {name: self._replica.parameters[name]}, False)
        opened.gradients |= taken
        bad = not_finite(taken)
        if self._bad is None and bad is None:
            self.running.ahead(taken)
        elif self._bad is None:
            self.running.forget()
            self._bad = bad

    def step_opened(self) -> bool:
        """Make the step that is open, if one is."""
        opened = self._open
        if opened is None:
            return False
        try:
            self._begin_step()
            taken: dict[str, Any] = {}
            if opened.weight:
                taken = self._taken(opened.gradients, self._replica.parameters, self._unused_are_zeros)
            self._open = None
            self._make(taken, opened.weight, self._bad)
        except BaseException:
            self._open = None
            self.running.forget()  # unless it was made, and then there is nothing
            raise
        return True

    def leave(self) -> None:
        """See ``DataParallel.leave``."""
        if not self._left:
            self._dropped_open()
            self._left = True
            self.running.leave()

    @property
    def claims(self) -> bool:
        """See BaseStepper."""
        return self.running.claims

    def claim(self, row: tuple[int, ...]) -> int:
        """See ``DataParallel.claim``."""
        return self.running.claim(row)

    def end(self) -> None:
        """See BaseStepper."""
        self.leave()

    @property
    def bytes_sent(self) -> int:
        """See BaseStepper."""
        return super().bytes_sent + self.running.bytes_sent

    @property
    def clocks(self) -> list[float]:
        """See BaseStepper."""
        return self.running.clocks

    def telemetry(self) -> dict[str, Any]:
        """See BaseStepper."""
        return {**super().telemetry(), **self.running.telemetry()}

    # Where ranks meet: they have made as many steps as each has

    def begin_operation(self, operation: str) -> None:
        """Another operation than the last one. Raises RuntimeError for a step that is open."""
        if self._dropped_open():
            raise RuntimeError(f"DataParallel.{operation}: a step is open since begin; make it by step()")
        self.operation = operation

    def synchronize(self) -> None:
        """See ``DataParallel.synchronize``."""
        self.begin_operation("synchronize")
        self.running.rest()
        if not self.running.outlives:  # else those that are left have met in it, and cannot on their communicator
            self._agree(None)
        self.running.synchronize()
        self._raise_told()

    def meet(self, operation: str, error: Exception | None, afresh: bool = False) -> None:
        """See ``DataParallel.meet``: afterwards the replica has the whole state."""
        self.begin_operation(operation)
        self.running.rest()
        self._agree(error)
        self.running.synchronize()
        self.running.gather()

    def common_state(self) -> dict[str, Any]:
        """See BaseStepper: the mode's is each rank's own."""
        return {kind: tree for kind, tree in super().common_state().items() if kind != "mode"}

    def collect(self, take: Callable[[], T]) -> T:
        """What ``take`` returns of the whole state, which stays as it is until all ranks have taken it. Collective."""
        self.meet("state_dict", None)
        taken = jointly(self.comm, "DataParallel.state_dict", take)
        self._agree(None)
        return taken

    def put_in(self, load: Callable[[], None]) -> None:
        """Call ``load``, which fills the state, while no rank makes steps. Collective."""
        self.meet("load_state_dict", None)
        jointly(self.comm, "DataParallel.load_state_dict", load, (TypeError, ValueError))
        self.running.reload()

    def restore(self, values: Mapping[tuple[str, ...], Any], steps: int) -> None:
        """Fill leaves of the state, by path; ``steps`` have been made. ``reload`` must follow."""
        self._dropped_open()
        self._replica.fill(values)
        self.steps = steps

    def reload(self) -> None:
        """Go on from what was filled in. Collective."""
        self.running.reload()

    def free(self) -> None:
        """See ``DataParallel.free``."""
        self.begin_operation("free")
        self.running.free()

    def _words(self) -> list[str]:
        return [f"the optimizer {type(self._replica.optimizer).__name__}", f"the mode {text_of(self._replica.mode)}"]

    def _agree(self, error: Exception | None) -> None:
        """Meet the other ranks in this operation. Raises on all ranks what one of them has against it."""
        where, told = self.where, self.notices.to_tell()
        settings = hash_of(" ".join(self._words()))
        wrong = error is not None
        record = (self._number, OPERATIONS.index(self.operation), False, 0, settings, wrong, 0.0, told, 0.0)
        records = self._meeting.exchange(record, where, lambda records: self.notices.hear(records, told))
        if any(record[WRONG] for record in records):
            raise_everywhere(self.comm, where, error, alike=(NonFiniteError,))
