"""One step of an averager: opened before back-propagation, ended on all ranks alike, with all done or nothing."""

from __future__ import annotations

import math
from types import TracebackType
from typing import TYPE_CHECKING, Any

from bitring.collectives.runtime.jointly import common_error, raise_everywhere
from bitring.errors import NonFiniteError
from bitring.torch.early_updates import closed, opened
from bitring.torch.gradients import Before
from bitring.torch.meeting import ABSENT, WEIGHT, WRONG, Records
from bitring.torch.sparse import full_row, gathered
from bitring.torch.tensors import all_finite
from bitring.training.step.checks import checked_weight
from bitring.training.step.meeting import hash_of, total_weight

if TYPE_CHECKING:
    from bitring.torch.averager import GradientAverager

_INTERRUPTED_SECONDS = 2.0
"""An interrupted rank takes part in the rest of a step for so long; then it leaves the communicator unusable."""


class Step:
    """A step of ``averager``, for ``with``; ``call`` is what errors name.

    ``may_overlap``: back-propagation goes on inside, so that gradients may travel beside it, where the averager wants
    it. Ranks meet at its beginning, where the weights become known, and at its end.
    """

    def __init__(self, averager: GradientAverager, weight: float, call: str, may_overlap: bool) -> None:
        self._averager = averager
        self._given = weight
        self._may_overlap = may_overlap
        self._where = f"GradientAverager.{call} (step {averager.steps})"
        self.weight = 0.0
        self._total: float | None = None  # the sum of all ranks' weights, once it is known
        self._over = False  # whether all ranks know that nothing comes of it
        self._absent: list[str] = []  # names of the parameters without gradient
        self._hashes: tuple[float, ...] = ()

    def __enter__(self) -> GradientAverager:
        a = self._averager
        if a.step is not None:
            raise RuntimeError(f"{self._where}: called inside another step: blocks cannot be nested")
        a.refresh()
        problem: Exception | None = None
        try:
            self.weight = checked_weight(self._given, self._where)
        except Exception as error:  # the other ranks must not wait
            problem = error
        self._factor = float(a.scaler.get_scale()) if a.scaler is not None and a.exchange.compressed else 1.0
        self._before = Before(
            a.targets, None if self._may_overlap else [g for b in a.exchange.buckets for g in b.gradients()]
        )
        self._left = [a.passes] * len(a.names)
        self._missing = [len(bucket.names) for bucket in a.exchange.buckets]
        a.exchange.begin()
        if a.buffers:
            a.buffers.begin()
        a.step = self
        a.listen()
        opened(self)
        self._came = self._may_overlap and a.overlaps  # whether the others count on this rank, from now on
        if self._came:
            a.meeting.post(self._record(), self._where)
        if problem is not None:
            self.end(problem)
            raise problem
        return a

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)

    def _record(self, wrong: bool = False, ends: bool = False, absent: float = 0.0) -> tuple[float, ...]:
        a = self._averager
        return ends, a.steps, a.settings, self._factor, wrong, self.weight, absent

    def arrived(self, number: int, bucket: int) -> None:
        """The gradient of a parameter is complete: its bucket may be, and is sent in its turn; -1: it is in none.

        Raises RuntimeError when backward() has filled the gradient more often than it should.
        """
        left = self._left[number] - 1
        if left < 0:
            name = self._averager.names[number]
            raise RuntimeError(
                f"{self._where}: backward() has filled the gradient of {name!r} once more than a step has room for; "
                "put all backward() of a step but the last into no_sync()"
            )
        self._left[number] = left
        if left or not self._came or bucket < 0:
            return
        missing, exchange = self._missing, self._averager.exchange
        missing[bucket] -= 1
        while exchange.begun < len(missing) and missing[exchange.begun] == 0:
            self._load(start=True)

    def before_update(self, optimizer: Any) -> None:
        """See OpenStep."""
        mine = set(map(id, self._averager.targets))
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            raise RuntimeError(
                f"{self._where}: {type(optimizer).__name__}.step() was called inside the step, whose gradients are not "
                "the mean over all ranks yet; call it after the block"
            )

    # What all ranks do, in this order

    def _learn(self) -> float:
        """The sum of all ranks' weights. Raises, on all ranks, when one of them cannot go on."""
        if self._total is None:
            a = self._averager
            try:
                self._total = self._weights(a.meeting.collect() if a.meeting.posted else self._met())
            except Exception:
                self._over = True
                raise
        return self._total

    def _met(self) -> Records:
        self._came = True
        return self._averager.meeting.exchange(self._record(), self._where)

    def _weights(self, records: Records) -> float:
        if any(record[WRONG] for record in records):
            raise_everywhere(self._averager.comm, self._where, None, alike=(NonFiniteError,))
        return total_weight((record[WEIGHT] for record in records), self._where)

    def _load(self, start: bool) -> None:
        """Send the next bucket."""
        a = self._averager
        total = self._learn()
        parameters = a.in_buckets[a.exchange.begun]
        scale = self.weight / total / self._factor if total else 0.0
        a.exchange.load([p.grad for p in parameters], scale, start)

    def _finish(self) -> None:
        """Exchange what is left, and wait for all."""
        a = self._averager
        total = self._learn()
        gradients = [p.grad for p in a.parameters.values()] if self.weight else [None] * len(a.names)
        self._absent = [n for n, g in zip(a.names, gradients, strict=True) if g is None]
        if self.weight and self._absent and a.options.unused == "error":
            raise ValueError(
                f"{self._where}: the gradient of {self._absent[0]!r} is None: the parameter had no part in the loss; "
                "unused='zeros' counts such gradients as zeros"
            )
        if a.exchange.compressed and self.weight:  # rows that are gathered are checked here, buckets in their exchange
            for name in a.gathered:
                gradient = a.parameters[name].grad
                if gradient is not None and not all_finite([gradient]):
                    raise NonFiniteError(f"{self._where}: the gradient of {name!r} holds NaN or Inf")
        if not total:  # but for buckets that were sent already
            a.exchange.finish()
            return
        while a.exchange.begun < len(a.exchange.buckets):
            self._load(a.overlaps)
        failure: Exception | None = None
        try:
            a.exchange.finish()
        except Exception as error:
            failure = error
        if a.buffers and not a.meeting.broken:
            a.buffers.exchange(a.module, self.weight / total)
        if failure is not None:
            raise failure

    def _take_part(self, seconds: float) -> bool:
        """Do with zeros what the others wait for; whether that was over within ``seconds``."""
        a = self._averager
        if self._total is None:
            if not math.isinf(seconds):
                return False
            try:
                self._learn()
            except Exception:
                return True
        if not self._total:
            return True
        return a.exchange.take_part(seconds) and (not a.buffers or a.buffers.take_part(seconds))

    def _is_over(self) -> bool:
        return self._over or self._averager.meeting.broken

    def _agree(self, failure: BaseException | None) -> BaseException | None:
        """Meet the other ranks at the step's end: the exception for this one to raise, if any rank has failed."""
        a = self._averager
        if self._is_over():
            return failure
        if failure is not None and not self._came:  # nobody has exchanged anything, and nobody will
            a.meeting.exchange(self._record(wrong=True), self._where)
            return common_error(a.comm, self._where, failure, alike=(NonFiniteError,))
        if failure is not None:
            interrupted = not isinstance(failure, Exception)
            if not self._take_part(_INTERRUPTED_SECONDS if interrupted else math.inf):
                a.meeting.cut_short(self._where, failure)
            if self._is_over():
                return failure
        absent = float(hash_of("\n".join(self._absent))) if self._absent else 0.0
        records = a.meeting.exchange(self._record(failure is not None, ends=True, absent=absent), self._where)
        if any(record[WRONG] for record in records):
            mine = self._named(failure) if isinstance(failure, NonFiniteError) else failure
            return common_error(a.comm, self._where, mine, alike=(NonFiniteError,)) or failure
        self._hashes = tuple(record[ABSENT] for record in records)
        return None

    def _named(self, error: NonFiniteError) -> NonFiniteError | None:
        """The error with the name of a parameter of this rank; None where it has none, and another rank has."""
        a = self._averager
        for name, p in a.parameters.items():
            if self.weight and p.grad is not None and not all_finite([p.grad]):
                rank = a.comm.Get_rank()
                return NonFiniteError(f"{self._where}: the gradient of {name!r} on rank {rank} holds NaN or Inf")
        return None

    def end(self, failure: BaseException | None) -> None:
        """End the step, by ``failure`` or well.

        Raises on all ranks what has gone wrong on any, except ``failure`` itself, with all as it was before.
        """
        a = self._averager
        outcome = failure
        try:
            for statistics in a.statistics:
                try:
                    statistics.end_step(outcome)
                except BaseException as error:
                    outcome = outcome or error
            if outcome is None:
                try:
                    self._finish()
                except BaseException as error:
                    outcome = error
            outcome = self._agree(outcome)
            if outcome is None:
                self._attach()
                return
            a.exchange.undo()
            self._before.give_back()
            if isinstance(outcome, NonFiniteError) and a.scaler is not None and failure is None:
                self._overflow()
            elif outcome is not failure:
                raise outcome
        finally:
            closed(self)
            a.step = None
            a.listen()
            failure = outcome = None  # whose traceback holds this frame

    def _attach(self) -> None:
        """Make the gradients views of what has come."""
        a = self._averager
        total = self._total
        if not total:
            for target in a.targets:
                target.grad = None
            a.count(0.0)
            return
        nowhere = a.absent_everywhere(self._absent, self._hashes)
        rows = [
            gathered(a.comm, a.target(name), a.parameters[name].grad if self.weight else None, self.weight / total)
            for name in a.gathered
        ]
        a.count(self.weight / total)
        for number, (bucket, parameters) in enumerate(zip(a.exchange.buckets, a.in_buckets, strict=True)):
            if self._factor != 1.0:
                bucket.tensor.mul_(self._factor)
            for p, target, view in zip(parameters, a.targets_in[number], bucket.gradients(), strict=True):
                if target.grad is not view:
                    target.grad = view
                if target is not p:
                    p.grad = None
        for name in nowhere:
            a.target(name).grad = None
        for name, gradient in zip(a.gathered, rows, strict=True):
            a.parameters[name].grad = None
            a.target(name).grad = gradient
        if a.buffers:
            a.buffers.store(a.module)

    def _overflow(self) -> None:
        """Let all scalers see that gradients have overflowed."""
        a = self._averager
        a.count(0.0)
        for bucket in a.exchange.buckets:
            bucket.tensor.fill_(math.inf)
            for name, view in zip(bucket.names, bucket.gradients(), strict=True):
                a.target(name).grad = view
        for name in a.gathered:
            a.target(name).grad = full_row(a.target(name), math.inf)
