"""Meetings of a trainer's ranks: a small record of each, exchanged before anything else is, and after it.

The records travel in a plan of their own, one for all trainers of a communicator, so that trainers that were mixed up
meet, too. It is watched as every plan is, on whatever communicator: a rank that is gone, late or elsewhere is named.

Where the others know what a rank's record would say, a number that stands for it is enough: its *place*, which the rank
says at the beginning of a plan's run, as its signature. Where not all say the same, or some have come with their
records, nothing is exchanged, all hear of it, and all go on with their records.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import blake2b

import numpy as np
from mpi4py import MPI

from bitring.collectives.base_plan import Plan
from bitring.collectives.plan import ExactPlan, plan_exact
from bitring.collectives.runtime.agreement import meeting_signature
from bitring.collectives.runtime.context import context_of
from bitring.collectives.runtime.objects import allgather
from bitring.collectives.runtime.ports import ports
from bitring.errors import MismatchError

OPERATIONS = ("step", "synchronize", "save_checkpoint", "load_checkpoint", "broadcast", "state_dict", "load_state_dict")
"""Operations that ranks can be in when they meet; the record holds the index."""

TRAINER, OPERATION, ENDS, STEPS, SETTINGS, WRONG, WEIGHT, TOLD, WAITED = range(9)
"""A record: the trainer's number, the operation and whether it is at its end, the steps made, a hash of the settings,
whether something is wrong, the weight, bits for the others, and how long this rank waited for the last records."""

_PLACE = slice(TRAINER, STEPS + 1)
_ALIKE = slice(TRAINER, SETTINGS + 1)
_WIDTH = WAITED + 1

Records = list[list[float]]
"""Of all ranks, in rank order."""


def hash_of(text: str) -> int:
    """A number of 48 bits, which a record holds exactly."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=6).digest(), "little")


class Meeting:
    """The exchange of records on ``comm``; ``settings`` returns this rank's settings in words. Collective."""

    def __init__(self, comm: MPI.Intracomm, settings: Callable[[], Sequence[str]]) -> None:
        self._comm = comm
        self._context = context_of(comm)
        self._settings = settings
        self._shared = _shared_plan(comm)
        self._plan, self._records = self._shared.plan, self._shared.records
        self._early: tuple[Records | None, BaseException | None] | None = (
            None  # what another trainer's meeting waited for
        )
        self.waited = 0.0
        """Seconds from when this rank's last record left to when it had the others'."""
        self._began = 0.0
        self._record: Sequence[float] = ()
        self._where = ""

    @property
    def broken(self) -> bool:
        """Whether the communicator cannot be used any more."""
        return bool(self._context.queue.broken)

    def cut_short(self, what: str, error: BaseException) -> None:
        """Make the communicator unusable, since others exchange what this rank has given up; they are told."""
        self._context.queue.cut_short(what, error)

    def exchange(
        self, record: Sequence[float], where: str, heard: Callable[[Records], None] = lambda records: None
    ) -> Records:
        """All ranks' records; ``heard`` is called with them first.

        Raises on all ranks: MismatchError unless all are at the same operation and step, with equal settings.
        """
        self.begin(record, where)
        return self.end(heard)

    def at_place(self, plan: Plan, place: int, where: str, before_wait: Callable[[], None] | None = None) -> bool:
        """Run ``plan`` where all ranks say the same ``place``. Returns whether they do; else nothing was exchanged.

        All whose records or places have met have the same answer. ``before_wait``: see ``Plan``. When it raises, call
        ``interrupted``.
        """
        self._come(where)
        plan.sign(meeting_signature(place), where)
        self._began = time.perf_counter()
        try:
            plan(before_wait)
        finally:
            self._came(None)
        return plan.alike

    @property
    def has_more_to_do(self) -> bool:
        """Whether something has to come to its end before ranks can meet."""
        shared = self._shared
        return shared.pending is not None or shared.interrupted is not None or self._plan.started

    def passes_place(self, plan: ExactPlan, place: int, where: str) -> bool:
        """As ``at_place``, as far as the engine is not needed; whether all ranks say the same.

        Else ``at_place`` goes on. Not where it ``has_more_to_do``.
        """
        plan.sign(meeting_signature(place), where)
        self._began = time.perf_counter()
        passes = plan.run_past_engine()
        self._came(None)
        return passes

    def interrupted(self, plan: Plan, then: Callable[[], None]) -> None:
        """A run of ``at_place`` was left. If it goes on, what comes next ends it, and calls ``then`` if all came."""
        if plan.started:
            self._shared.interrupted = plan, then

    def numbers_at_place(
        self, place: int, where: str, number: float, before_wait: Callable[[], None] | None = None
    ) -> list[float]:
        """Every rank's number where all say the same ``place``, else none; see ``at_place``.

        None, too, where it ``comes_too_late``.
        """
        plan, numbers, waited = self._shared.plan_of_numbers, self._shared.numbers, self.waited
        if not plan.can_be_signed:
            return []
        numbers.fill(0.0)
        numbers[self._context.rank] = number
        try:
            alike = self.at_place(plan, place, where, before_wait)
            return numbers.tolist() if alike and not self.comes_too_late() else []
        except BaseException:
            self.interrupted(plan, partial(self.give_up, where))
            raise
        finally:
            self.waited = waited

    def comes_too_late(self) -> bool:
        """Whether another rank has waited for so long that it has given up; what it has sent may have come."""
        contact = self._context.queue.contact
        ports().read()
        return contact is not None and bool(contact.impatient)

    def end_interrupted_place(self, waits: bool) -> None:
        """End a run of ``at_place`` whose wait was interrupted; only if it is over by now, unless ``waits``."""
        if self._shared.interrupted is None:
            return
        plan, then = self._shared.interrupted
        if plan.started and (waits or plan.test()) and plan.started:
            plan.wait()
        if not plan.started:
            self._shared.interrupted = None
            if plan.alike:
                then()

    def begin(self, record: Sequence[float], where: str, beside: bool = False) -> None:
        """Hand in this rank's record; ``beside``: it travels while this rank does something else."""
        self._record, self._where, self._early = record, where, None
        if self._context.size == 1:
            return
        self._come(where)
        self._shared.pending = self
        self._fill(record, where)
        if beside:
            self._plan.start(self._came)

    def end(self, heard: Callable[[Records], None] = lambda records: None) -> Records:
        """The records that were handed in to ``begin``; see ``exchange``."""
        if self._context.size == 1:
            alone = [list(self._record)]
            heard(alone)
            return alone
        if self._early is not None:
            early, self._early = self._early, None
            if early[1] is not None:
                raise early[1]
            records = early[0] or []
            alike = _alike(records, _ALIKE)
        else:
            records, alike = self._run()
        heard(records)
        if alike:
            return records
        if not _alike(records, slice(SETTINGS, SETTINGS + 1)) and _alike(records, slice(TRAINER, TRAINER + 1)):
            raise MismatchError(self._different_settings())
        raise MismatchError(_odd_one_out([tuple(record[_PLACE]) for record in records]))

    def come_to_end(self) -> None:
        """Have the records by now: another trainer's are to be exchanged. What is wrong is raised by ``end``."""
        try:
            self._early = self._run()[0], None
        except Exception as error:
            self._early = None, error

    def _run(self) -> tuple[Records, bool]:
        """The records, and whether all are at the same operation and step, with equal settings."""
        self._shared.pending = None
        if self._plan.started:
            self._plan.wait()
        else:
            self._began = time.perf_counter()
            self._plan()
            self._came(None)
        self._run_again()
        records: Records = self._records.tolist()
        alike = _alike(records, _ALIKE)
        if not alike and not _alike(records, _PLACE):
            # A rank whose wait was interrupted had sent its record all the same. By now it may mean what the others do.
            self._fill(self._record, self._where)
            self._plan()
            self._run_again()
            records = self._records.tolist()
            alike = _alike(records, _ALIKE)
        return records, alike

    def _run_again(self) -> None:
        """Some said a place instead of a record, and have heard by now that others do not."""
        while not self._plan.alike:
            self._plan()

    def _fill(self, record: Sequence[float], where: str) -> None:
        self._records.fill(0.0)
        self._records[self._context.rank] = record
        self._plan.name = where
        self._began = time.perf_counter()

    def _came(self, error: BaseException | None) -> None:
        self.waited = time.perf_counter() - self._began

    def _come(self, where: str) -> None:
        """What came before ends: another trainer's meeting, and what was interrupted."""
        if self.has_more_to_do:
            self._shared.end_of_another(self)
            self._end_interrupted(where)

    def _end_interrupted(self, where: str) -> None:
        """An interrupted wait for records goes on here; it was in vain unless others had come to the same place."""
        self.end_interrupted_place(waits=True)
        if not self._plan.started:
            return
        self._plan.wait()
        if self._plan.alike and _alike(self._records.tolist(), _PLACE):
            self.give_up(where)

    def give_up(self, where: str) -> None:
        """An interrupted wait was for something that the others went on with: raises RuntimeError here, and there."""
        self.cut_short(where, RuntimeError("an interrupt, when the others had begun to exchange"))
        raise RuntimeError(f"{where}: an earlier call was interrupted, and the other ranks went on with it")

    def _different_settings(self) -> str:
        everyone: list[Sequence[str]] = allgather(self._comm, tuple(self._settings()), "DataParallel")
        for words in zip(*everyone, strict=True):
            usual = Counter(words).most_common(1)[0][0]
            odd = next((rank for rank, word in enumerate(words) if word != usual), None)
            if odd is not None:
                return f"DataParallel: ranks differ: rank {odd} has {words[odd]}, rank {words.index(usual)} has {usual}"
        return "DataParallel: ranks have different settings"


class _Shared:
    """The plan of a communicator's records, its buffer, and the meeting that is to run it: of a step that is open.

    ``plan_of_numbers``: of ``numbers``, one of each rank, where they are all that ranks have to say.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        size = context_of(comm).size
        self.records, self.numbers = np.zeros((size, _WIDTH)), np.zeros(size)
        plans = (plan_exact(x, comm, MPI.SUM, "auto", "DataParallel") for x in (self.records, self.numbers))
        self.plan, self.plan_of_numbers = plans
        self.pending: Meeting | None = None
        self.interrupted: tuple[Plan, Callable[[], None]] | None = None
        if self.plan.can_be_signed:
            self.plan.sign(meeting_signature(0))

    def end_of_another(self, meeting: Meeting) -> None:
        """Before ``meeting`` uses the plan: another one that has handed in its record gets the others'."""
        if self.pending is not None and self.pending is not meeting:
            self.pending.come_to_end()


def _shared_plan(comm: MPI.Intracomm) -> _Shared:
    """What trainers of the communicator share. Collective when it is made, for the first trainer."""
    context = context_of(comm)
    if "records" not in context.kept:
        context.kept["records"] = _Shared(comm)
    shared: _Shared = context.kept["records"]
    return shared


def total_weight(weights: Iterable[float], where: str) -> float:
    """The sum of all ranks' weights, one after the other in rank order. Raises ValueError where it is not finite."""
    total = 0.0
    for weight in weights:
        total += weight
    if not math.isfinite(total):
        raise ValueError(f"{where}: the weights of all ranks have no finite sum")
    return total


def _alike(records: Records, part: slice) -> bool:
    first = records[0][part]
    return [record[part] for record in records].count(first) == len(records)


def _odd_one_out(asked: Sequence[tuple[float, ...]]) -> str:
    """Say which rank is doing something else than most."""
    usual = Counter(asked).most_common(1)[0][0]
    odd = next(rank for rank, one in enumerate(asked) if one != usual)
    other = next(rank for rank, one in enumerate(asked) if one == usual)

    def words(rank: int) -> str:
        trainer, operation, ends, steps = map(int, asked[rank])
        at = f"the end of {OPERATIONS[operation]}" if ends else OPERATIONS[operation]
        return f"rank {rank} is at {at}, after {steps} steps of its trainer number {trainer}"

    return f"DataParallel: ranks do not do the same: {words(odd)}; {words(other)}"
