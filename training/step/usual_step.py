"""The usual step: the ranks know what the others' records would say, and exchange none.

In most steps a record says what all expect: the next step of this trainer, the settings and weights of the last one,
nothing wrong and nothing to tell. A number stands for all that, the step's place. Ranks say it in the roll call by
which the exchange of the first bucket begins anyway, and another one at the step's end; who has something else to say
comes with its record, and so do all then (see ``meeting``). Nothing is exchanged before all have said the same.

A step needs no end where nothing can go wrong after an exchange in which each rank has waited for all: of one small
bucket between nodes, by messages that a rank sends only when it has read what there is to know of the others. An update
that cannot fail follows. A rank whose wait is interrupted there makes the step later, if the others have.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.plan import ExactPlan
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.interrupts import HeldBack
from bitring.collectives.schedules.schedule import algorithms
from bitring.compression.factors import has_factors
from bitring.training.step.gradient_exchange import GradientExchange
from bitring.training.step.meeting import WEIGHT, Meeting, Records, hash_of
from bitring.training.step.replica import Replica
from bitring.training.step.transaction import Transaction

NO_END_NBYTES = 32 << 10
"""Of gradients at most, where a step has no end: a rank that dies in the exchange itself may leave others of which some
have made the step, as one can that dies in a meeting at the end, so it must be short."""

END_EVERY = 16
"""Steps of which one has an end in any case, where ranks learn how long the others waited."""

_WITHOUT_OTHERS = ("synchronize", "free")
"""Operations in which ranks may not meet."""

_BEGIN, _ONLY, _END = range(3)


class UsualStep:
    """The usual steps of trainer ``number``, one after the other, ``with`` it around each.

    ``make_interrupted`` makes the step whose sums are in the buckets.
    """

    transaction: Transaction

    def __init__(
        self,
        number: int,
        comm: MPI.Intracomm,
        replica: Replica,
        exchange: GradientExchange,
        meeting: Meeting,
        held: HeldBack,
        make_interrupted: Callable[[], None],
    ) -> None:
        self._number = number
        self._rank = comm.Get_rank()
        self._replica = replica
        self._exchange = exchange
        self._meeting = meeting
        self._held = held
        self._make_interrupted = make_interrupted
        self.possible = (
            comm.Get_size() > 1
            and replica.common_mode.wait_free
            and bool(exchange.buckets)
            and (len(exchange.buckets) == 1 or not exchange.overlaps)
            and not replica.optimizer.sends_its_own
        )
        """Whether steps can be usual at all."""
        self._small = (
            context_of(comm).topology.nodes > 1
            and sum(bucket.flat.nbytes for bucket in exchange.buckets) <= NO_END_NBYTES
            and len(exchange.buckets) == 1
            and getattr(type(replica.common_mode).step, "cannot_raise", False)
        )
        bucket = exchange.buckets[0] if exchange.buckets else None
        self.may_hurry = (
            self.possible
            and len(exchange.buckets) == 1
            and bucket is not None
            and bucket.packs
            and len(bucket.shapes) == len(replica.parameters)
            and getattr(type(replica.common_mode).step, "cannot_raise", False)
            and isinstance(exchange.plans[0], ExactPlan)
            and exchange.plans[0].may_pass_engine
        )
        """Whether ``hurry`` may be called at all."""
        self._hurries = False  # the first exchange goes on since ``hurry``
        self._weights: list[float] = []  # of the last records; none: they are not known
        self.total = 0.0
        """The sum of all ranks' weights."""
        self._base: tuple[Any, Any, int] = (None, None, 0)  # of places: for what, for which weights, and the number
        self._step = 0  # the last one that was begun
        self._interrupt: BaseException | None = None  # that came when all ranks had made the step
        self._loads = 0  # of states
        self._made_late = 0
        self.gradients: Mapping[str, Any] | None = None
        """Of the step that is to begin, all of them."""
        self.begun = False
        """Whether the step has begun as usual."""
        self.problem: Exception | None = None
        """What went wrong when the step was to begin."""

    def __enter__(self) -> None:
        self.begun = self._hurries = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupt, self._interrupt = self._interrupt, None
        self.gradients, self.begun = None, False
        if error is not None:
            self._weights = []
        elif interrupt is not None:
            raise interrupt

    def learn(self, records: Records, total: float, step: int) -> None:
        """Ranks have met with these records, and the sum of their weights, to make ``step``."""
        if self.possible:
            self._weights, self.total = [record[WEIGHT] for record in records], total
        self._step = step

    def forget(self) -> None:
        """Another state was loaded: what has been under way is not for it."""
        self._weights = []
        self._loads += 1

    def expects(self, weight: float) -> bool:
        """Whether the others expect this ``weight``; then ``begin`` looks at the gradients' values."""
        weights = self._weights
        return bool(weights) and self.total > 0 and weights[self._rank] == weight

    def hurry(self, gradients: Any, weight: Any, step: int, compare_at: float) -> bool:
        """Begin the step with what most steps need, and no more. Returns whether all ranks have exchanged.

        Else ``begin`` goes on from there, or does it all. ``gradients`` and ``weight`` may be anything still.
        """
        exchange = self._exchange
        names, (bucket,), (plan,) = self._replica.parameters, exchange.buckets, exchange.plans
        if type(weight) not in (float, int) or not weight or not self.expects(weight) or self._meeting.has_more_to_do:
            return False
        if type(gradients) is not dict or len(gradients) != len(names) or not plan.can_be_signed:
            return False
        for name in bucket.shapes:
            if type(gradients.get(name)) is not np.ndarray:
                return False
        if self._replica.update_may_raise or not all(each.flags.writeable for each in names.values()):
            return False
        exchange.timeline.opened()
        began = time.perf_counter()
        try:
            if not bucket.pack(gradients, weight / self.total):
                return False
        except Exception:  # it is found again by ``begin``, and told
            return False
        exchange.timeline.packed(0, began)
        began = time.perf_counter()
        ends = step + 1 >= compare_at or self._has_end(plan, step)
        self.transaction.came = True
        place, where = self._place(_BEGIN if ends else _ONLY, plan.number, step), f"DataParallel.step (step {step})"
        if not self._meeting.passes_place(plan, place, where):
            self._hurries = True
            return False
        if not ends and self._meeting.comes_too_late():
            self._weights = []  # which has records exchanged
            return False
        exchange.timeline.came(0, began, None)
        exchange.timeline.ended()
        self._step = step
        self.begun = self.transaction.met = True
        self.transaction.ends = ends
        return True

    def _gives_factors(self, gradients: Mapping[str, Any]) -> bool:
        """Whether factors may travel, which a plan takes once a run, or a rank says that it has none against it."""
        return self._exchange.takes_factors and (not gradients or has_factors(gradients))

    def begin(self, weight: float, step: int, told: int, compare_at: float) -> bool:
        """Begin the step of ``gradients`` if the others expect this: then the first bucket has been exchanged.

        ``told``: what this rank has to tell. ``compare_at``: after which step replicas are compared. Else ranks must
        exchange records, with the ``problem``.
        """
        self.problem = None
        gradients, self.gradients = self.gradients, None
        if gradients is None:
            return False
        exact, where = self._replica.exact(step), f"DataParallel.step (step {step})"
        plan = self._exchange.first_plan(exact)
        goes_on, self._hurries = self._hurries, False
        try:
            if goes_on:
                self._exchange.open_loaded(exact)
            elif told or not self.expects(weight) or not plan.can_be_signed or self._gives_factors(gradients):
                if not self._exchange.looked_at:
                    self._exchange.look(gradients, where)
                return False
            else:
                self._exchange.load_all(gradients, weight / self.total, exact, where)
            ends = step + 1 >= compare_at or self._has_end(plan, step)
            if not ends:
                self._replica.require_writable(list(self._replica.parameters), where)
        except Exception as error:  # whatever it is, the other ranks must not wait
            self.problem = error
            return False
        self.transaction.came = True
        try:
            place = self._place(_BEGIN if ends else _ONLY, plan.number, step)
            alike = self._meeting.at_place(plan, place, where, self._held.release)
            self._held.again()
        except BaseException as error:
            self._held.again()
            if plan.started:
                with contextlib.suppress(Exception):  # the others hear of that, too, and ``error`` is enough here
                    plan.test()
            self._meeting.interrupted(
                plan, partial(self._meeting.give_up, where) if ends else partial(self._make_late, self._loads)
            )
            if isinstance(error, Exception) or plan.started or not plan.alike:
                raise
            self._has_begun(step, ends)  # for all others it has
            if ends:
                raise
            self._held.again()
            self._interrupt = error
            return True
        if not alike or (not ends and self._meeting.comes_too_late()):
            self._exchange.close()
            return False
        self._has_begun(step, ends)
        if ends and self._held.came:
            self._held.release()
        return True

    def run(self, plan: Any) -> None:
        """Run the plan of another bucket; an interrupt has to wait until it is there, if that is soon."""
        self._held.again()
        plan(self._held.release)

    def interrupt(self) -> BaseException | None:
        """See ``UsualEnd``."""
        try:
            if self._held.came:
                self._held.release()
        except BaseException as error:
            return error
        return None

    def end(self, where: str, waited: float) -> list[float]:
        """See ``UsualEnd``."""
        if not self._weights:
            return []
        place = self._place(_END, 0, self._step)
        numbers = self._meeting.numbers_at_place(place, where, waited, self._wait_at_end)
        if self.begun:
            self._held.again()
        return numbers

    def _wait_at_end(self) -> None:
        """Let a Ctrl-C end the wait, but none that came when this rank had said already that it has come to the end."""
        if not self._held.came:
            self._held.release()

    def _has_begun(self, step: int, ends: bool) -> None:
        self._exchange.first_is_there()
        self._step = step
        self.begun = self.transaction.met = True
        self.transaction.ends = ends

    def _has_end(self, plan: Any, step: int) -> bool:
        return (
            not self._small
            or step % END_EVERY == 0
            or not isinstance(plan, ExactPlan)
            or not algorithms.get(plan.algorithm).self_checking
            or self._replica.update_may_raise
        )

    def end_interrupted(self, operation: str) -> None:
        """Make the step whose wait was interrupted, before another ``operation``, if the others have made it.

        Raises RuntimeError where that is a step, which may be meant for the same.
        """
        made = self._made_late
        self._meeting.end_interrupted_place(waits=operation not in _WITHOUT_OTHERS)
        if operation == "step" and self._made_late != made:
            raise RuntimeError(
                "DataParallel.step: the step that was interrupted is made: all others came to it; begin the next one"
            )

    def _make_late(self, loads: int) -> None:
        if loads == self._loads:
            self._make_interrupted()
            self._made_late += 1

    def _place(self, kind: int, plan: int, step: int) -> int:
        """``kind``: at which part of the step; ``plan``: the number of the first one that is run."""
        settings = self._replica.settings_hash
        known, weights, base = self._base
        if known != settings or weights is not self._weights:
            base = hash_of(repr((settings, self._number, self._weights)))
            self._base = settings, self._weights, base
        return base + 0x9E3779B1 * step + 0x85EBCA6B * plan + 0x6D2B79F5 * kind
