"""The steps of a trainer, each all or nothing; and what a mode asks of its trainer in them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from mpi4py import MPI

from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.interrupts import HeldBack
from bitring.collectives.runtime.jointly import jointly, raise_everywhere
from bitring.compression.factors import dense
from bitring.errors import NonFiniteError
from bitring.training.step.base_stepper import BaseStepper
from bitring.training.step.checks import checked_weight
from bitring.training.step.gradient_exchange import GradientExchange
from bitring.training.step.later import Later
from bitring.training.step.meeting import OPERATIONS, WEIGHT, WRONG, Meeting, Records, total_weight
from bitring.training.step.open_step import OpenStep
from bitring.training.step.replica import Replica
from bitring.training.step.transaction import Transaction
from bitring.training.step.undo import Numbers
from bitring.training.step.usual_step import UsualStep


class Stepper(BaseStepper):
    """The :class:`bitring.training.mode.Trainer` of ``replica`` on ``comm``. Collective to make.

    ``number``: the trainer's, the same on all ranks.
    ``unused_are_zeros``: a gradient that is missing counts as zeros.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        replica: Replica,
        exchange: GradientExchange,
        number: int,
        unused_are_zeros: bool,
    ) -> None:
        super().__init__(comm, replica, exchange)
        self._context = context_of(comm)
        self._number = number
        self._unused_are_zeros = unused_are_zeros
        self._meeting = Meeting(comm, replica.words)
        self._held = HeldBack()  # in a step, until ranks meet
        self._usual = UsualStep(number, comm, replica, exchange, self._meeting, self._held, self._make_interrupted)
        self._transaction = self._usual.transaction = Transaction(
            comm, self._meeting, exchange, self.waits, self._usual
        )
        self._open: OpenStep | None = None
        self._problem: Exception | None = None
        self._updates: dict[str, Any] = {}  # gradients that the optimizer is to see at the step's end
        self._later: Later | None = None  # what is to be exchanged when the step is made
        self._under_way: Later | None = None
        replica.optimizer_state = jointly(comm, "DataParallel", lambda: replica.optimizer.init(replica.parameters))
        replica.mode_state = jointly(comm, "DataParallel", lambda: replica.common_mode.init(self))
        self._numbers = Numbers(replica.mode_state)
        self.mode_has_changed()

    def mode_has_changed(self) -> None:
        """See BaseStepper."""
        self._changes = self._replica.arrays_that_change(self._exchange.buckets)

    def step(self, gradients: Any, weight: Any) -> None:
        """See ``DataParallel.step``."""
        if self._open is not None:
            self._abandon_for(
                TypeError(f"{self.where}: begin and ready have what this step takes; call it without arguments")
            )
        timeline = self._exchange.timeline
        timeline.restart(computed=True)
        self.begin_operation("step")
        with self._usual, self._held:
            self.notices.everyone = 0
            if self._usual.may_hurry and self._step_in_a_hurry(gradients, weight):
                timeline.leave()
                return
            where, problem = self.where, self._problem
            taken: dict[str, Any] = {}
            self._exchange.looked_at = True  # at none
            try:
                weight = checked_weight(weight, where)
                if weight:
                    later = self._problem is None and self._usual.expects(weight)
                    taken = self._exchange.checked(gradients, where, self._unused_are_zeros, later)
            except Exception as error:  # whatever it is, the other ranks must not wait
                self._problem = self._problem or error
                weight = 0.0
            self._usual.gradients = taken
            try:
                self.transact(partial(self._run_mode, taken, weight), steps=1)
            except Exception as error:
                self._usual.gradients = None
                if self._transaction.came:
                    self._problem = self._problem and problem  # what was found in this step is over, but not what waits
                    raise
                self._problem = self._problem or error  # the others know nothing of it, and hear of it when they meet
                self.transact(partial(self._run_mode, {}, 0.0), steps=1)
        timeline.leave()

    def _step_in_a_hurry(self, gradients: Any, weight: Any) -> bool:
        """Make the step, where it is like most; whether it is made. Else nothing was done that ``transact`` minds."""
        if self._problem is not None or self.notices.to_tell():
            return False
        self._transaction.open(self._numbers)
        try:
            if not self._usual.hurry(gradients, weight, self.steps, self.compare_at):
                return False
            self.notices.hear([], 0)
            self._updates.update(self._exchange.buckets[0].views)
        except BaseException as error:
            self._close(error)
            raise
        self._close(None)
        return True

    def _run_mode(self, gradients: Mapping[str, Any], weight: float) -> None:
        self._replica.common_mode.step(self, self._replica.mode_state, gradients, weight)

    def transact(self, body: Callable[[], None], steps: int = 0) -> None:
        """Run ``body``, then the updates left to the step's end, all or nothing; then count ``steps``."""
        try:
            whole = partial(self._held.except_for_errors, body)
            self._transaction.run(whole, self._numbers, self._end_record, self.where)
            self._make(steps)
        finally:
            self._updates.clear()
            self._later = None

    def _make(self, steps: int) -> None:
        """All ranks know that all have come to the end: make the updates, and begin what goes on between steps."""
        if not self._updates and self._later is None:
            self.steps += steps
            return
        with self._held.anyway():
            if self._later is None and not self._compares_after(steps):
                self._context.exchanged()
            if self._updates:
                began = time.perf_counter()
                self._replica.update_quietly(self._updates)
                self._exchange.timeline.applied(began)
            self.steps += steps
            if self._later is not None:
                self._under_way = self._later
                self._later.begin(self._exchange, self._replica.exact(self.steps - 1))

    def _make_interrupted(self) -> None:
        """Make the step that all others have made when this rank's wait for them had been interrupted."""
        for bucket in self._exchange.buckets:
            self._updates.update(bucket.views)
        try:
            self._make(1)
        finally:
            self._updates.clear()

    def _compares_after(self, steps: int) -> bool:
        """Whether the replicas are compared when so many steps more have been made."""
        return self._transaction.met and self.steps + steps >= self.compare_at

    @property
    def compares_now(self) -> bool:
        """See BaseStepper."""
        return self._compares_after(0)

    def begin(self, weight: Any) -> OpenStep:
        """See ``DataParallel.begin``."""
        if self._open is not None:
            self._abandon_for(
                RuntimeError(f"{self.where}: begin: the step that began before was not made; step() makes it")
            )
        self._exchange.timeline.restart(computed=False)
        self.begin_operation("step")
        self.notices.everyone = 0
        mine = 0.0
        try:
            mine = checked_weight(weight, f"DataParallel.begin (step {self.steps})")
        except Exception as error:  # whatever it is, the other ranks must not wait
            self._problem = self._problem or error
        travels = self._replica.common_mode.wait_free
        opened = OpenStep(self._exchange, mine, travels, self._abandon)
        if travels:
            self._transaction.open(self._numbers)
            self._told = self.notices.to_tell()
            self._transaction.came = True
            self._meeting.begin(
                self._record(self._problem is not None, mine, self._told), self.where, beside=self._exchange.overlaps
            )
        self._open = opened
        self._exchange.timeline.leave()
        return opened

    def ready(self, name: str, gradient: Any) -> None:
        """See ``DataParallel.ready``."""
        opened = self._open
        if opened is None:
            raise RuntimeError("DataParallel.ready: no step is open; call begin(weight) before the gradients come")
        self._exchange.timeline.enter()
        try:
            opened.take(name, gradient, self._replica.parameters, self.where, self.rank)
            if opened.travels:
                opened.advance(self._total)
        except BaseException as error:
            self._abandon(opened, error)
            raise
        self._exchange.timeline.leave()

    def step_opened(self) -> bool:
        """Make the step that is open, if one is."""
        opened = self._open
        if opened is None:
            return False
        if not opened.travels:
            self._open = None
            self.step(opened.gradients, opened.weight)
            return True
        self._exchange.timeline.enter()
        try:
            opened.complete(self._replica.parameters, self.where, self._unused_are_zeros)
            opened.advance(self._total)
            self._run_mode(opened.gradients, opened.weight)
        except BaseException as error:
            self._abandon(opened, error)
            raise
        self._close(None)
        self._exchange.timeline.leave()
        return True

    def _total(self) -> float:
        """The sum of all ranks' weights in the open step."""
        opened = self._open
        assert opened is not None
        if opened.total is None:
            opened.heard = True
            total = self._agreed(self._meeting.end(lambda records: self.notices.hear(records, self._told)))
            if total:
                self._exchange.open(self._replica.exact(self.steps))
            opened.total = total
        return opened.total

    def _abandon(self, opened: OpenStep, error: BaseException) -> None:
        """End the step on all ranks, if it is open still: raises ``error`` here."""
        if self._open is not opened:
            return
        if not opened.travels:
            self._open = None
            self._miss(error)
            return
        if not opened.heard:
            with contextlib.suppress(Exception):  # then the others have heard that, too, and ``error`` is enough here
                self._total()
        self._close(error)

    def _miss(self, error: BaseException) -> None:
        """Take part in the step that this rank cannot make, without samples: the others hear of it when ranks meet."""
        said = error if isinstance(error, Exception) else RuntimeError(f"{self.where}: {type(error).__name__}")
        self._problem = self._problem or said
        with contextlib.suppress(Exception):  # where ranks met they have heard, and ``error`` is enough here
            self.transact(partial(self._run_mode, {}, 0.0), steps=1)

    def _abandon_for(self, error: Exception) -> None:
        assert self._open is not None
        self._abandon(self._open, error)
        raise error

    def _close(self, failure: BaseException | None) -> None:
        self._open = None
        try:
            self._transaction.close(failure, self._numbers, self._end_record, self.where)
            self._make(1)
        finally:
            failure = None  # its traceback holds this frame
            self._updates.clear()

    def begin_operation(self, operation: str) -> None:
        """See BaseStepper. What was under way between the two operations is over."""
        if self._open is not None:
            self._abandon_for(RuntimeError(f"DataParallel.{operation}: a step is open since begin; make it by step()"))
        self.operation = operation
        self._usual.end_interrupted(operation)
        self.settle()

    def settle(self) -> None:
        """Wait for what is exchanged between two steps, and put the sums where the mode wants them."""
        if self._under_way is not None:
            self._under_way.come(self._exchange)
        self._under_way = None

    def synchronize(self) -> None:
        """See ``DataParallel.synchronize``."""
        self.begin_operation("synchronize")
        self.transact(lambda: self._replica.common_mode.synchronize(self, self._replica.mode_state))

    def meet(self, operation: str, error: Exception | None, afresh: bool = False) -> None:
        """See ``DataParallel.meet``."""
        self.begin_operation(operation)
        self._problem = error if afresh else self._problem or error
        self.agree(0.0)

    def restore(self, values: Mapping[tuple[str, ...], Any], steps: int) -> None:
        """Fill leaves of the state, by path; ``steps`` have been made."""
        if self._open is not None:
            self._abandon_for(RuntimeError("DataParallel.load_state_dict: a step is open since begin; step() makes it"))
        with contextlib.suppress(Exception):  # what went wrong between the steps is over with this state
            self.settle()
        self._under_way = None
        self._usual.forget()
        self._replica.fill(values)
        self.steps = steps
        self._problem = None

    # What modes call; see bitring.training.mode.Trainer

    def agree(self, weight: float, check: Mapping[str, Any] | None = None) -> float:
        """See :class:`bitring.training.mode.Trainer`."""
        if self._open is not None:
            return self._total()
        where, usual = self.where, self._usual
        if self._problem is None and usual.possible:
            if usual.begin(weight, self.steps, self.notices.to_tell(), self.compare_at):
                self.notices.hear([], 0)
                return usual.total
            self._problem = usual.problem
        if check is not None and self._problem is None:
            bad = self._exchange.not_finite(check)
            if bad is not None:
                self._problem = NonFiniteError(f"{where}: the parameter {bad} on rank {self.rank}; training diverged")
        told = self.notices.to_tell()
        if self._context.size > 1:
            self._held.release()
        self._transaction.came = True
        return self._agreed(
            self._meeting.exchange(
                self._record(self._problem is not None, weight, told),
                where,
                lambda records: self.notices.hear(records, told),
            )
        )

    def _agreed(self, records: Records) -> float:
        if any(record[WRONG] for record in records):
            problem, self._problem = self._problem, None
            raise_everywhere(self.comm, self.where, problem, alike=(NonFiniteError,))
        total = total_weight((record[WEIGHT] for record in records), self.where)
        self._transaction.met = True
        if self.operation == "step":
            self._usual.learn(records, total, self.steps)
        if self._replica.common_mode.writes and self._replica.mode_state:
            self._save()
        return total

    def _record(self, wrong: bool, weight: float = 0.0, told: int = 0, ends: bool = False) -> tuple[float, ...]:
        operation, settings = OPERATIONS.index(self.operation), self._replica.settings_hash
        waited = self._transaction.waited + self._meeting.waited
        return self._number, operation, ends, self.steps, settings, wrong, weight, told, waited

    def _end_record(self, failed: bool) -> tuple[float, ...]:
        return self._record(failed, ends=True)

    def exchange(
        self, arrays: Mapping[str, Any], scale: float, minus: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """See :class:`bitring.training.mode.Trainer`."""
        writes = self._replica.common_mode.writes or self._replica.update_may_raise
        if self._open is not None or self._usual.begun:
            if writes:
                self._save()
            return self._exchange.results(self._usual.run if self._usual.begun else None)
        exact = self._replica.exact(self.steps)
        return self._exchange.run(arrays, scale, minus, exact, self._save if writes else lambda: None)

    def exchange_later(self, arrays: Mapping[str, Any], scale: float, into: Mapping[str, Any]) -> None:
        """See :class:`bitring.training.mode.Trainer`."""
        self._later = Later(arrays, scale, into)

    def update(self, gradients: Mapping[str, Any], at_end: bool = False) -> None:
        """See :class:`bitring.training.mode.Trainer`."""
        arrays = dense(gradients)
        if at_end and not self._replica.update_may_raise:
            self._replica.require_writable(list(arrays), self.where)
            self._updates.update(arrays)
            return
        self._save()
        began = time.perf_counter()
        self._replica.update(arrays)
        self._exchange.timeline.applied(began)

    def restart_optimizer(self) -> None:
        """See :class:`bitring.training.mode.Trainer`."""
        self._replica.optimizer.restart(self._replica.optimizer_state)

    def _save(self) -> None:
        """Copy what this step may change from here on, so that it can be restored."""
        for key, arrays in self._changes:
            self._transaction.undo.save(key, arrays)
