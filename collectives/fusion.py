"""``bitring.start``: plans started together; those that are small travel as one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from bitring.collectives.base_plan import RUN, Plan
from bitring.collectives.interop.steps import Progress, Steps, finish
from bitring.collectives.plan import ExactPlan
from bitring.collectives.runtime.agreement import Request, conclude, verdict_of
from bitring.collectives.runtime.engine import engine
from bitring.collectives.selection.selection import Choice
from bitring.native import extension

FUSED_NBYTES = 64 << 10
"""Plans of so many bytes together are fused: up to there most of a message's cost does not depend on its size."""


def start(plans: Sequence[Plan]) -> None:
    """Start ``plans`` in the order given, which must be the same on all ranks; each is waited for as ever.

    Neighbours of one communicator that are exact, in host memory, and together small share one exchange: through
    shared memory whatever their dtypes and operations, by messages if these are alike. Raises TypeError for anything
    but plans, and RuntimeError as ``Plan.start`` does, before any is started; on the other ranks the runs end with
    PeerError then.
    """
    if not isinstance(plans, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"start: plans must be a sequence of plans; got {type(plans).__name__}")
    plans = list(plans)
    error = _mistake(plans)
    groups = _groups([plan for plan in dict.fromkeys(plans) if isinstance(plan, Plan)])
    with ExitStack() as calls:
        for context in dict.fromkeys(group[0].context for group in groups):
            calls.enter_context(context.turn("start"))
        for group in groups:
            if error is not None:  # the other ranks must not wait for this one's runs
                group[0].refuse(error)
            else:
                _start(group)
    if error is not None:
        raise error
    engine.start_thread()


def _mistake(plans: Sequence[Any]) -> Exception | None:
    """The error by which ``plans`` cannot be started together."""
    for i, plan in enumerate(plans):
        if not isinstance(plan, Plan):
            return TypeError(f"start: plans must be plans, as plan_allreduce returns; got {type(plan).__name__}")
        try:
            plan.check_startable()
        except RuntimeError as error:
            return error
        if plan in plans[:i]:
            return RuntimeError(f"start: {plan} was given twice")
    return None


def _groups(plans: Sequence[Plan]) -> list[list[Plan]]:
    """The plans in order, those together that travel as one."""
    groups: list[list[Plan]] = []
    for plan in plans:
        if groups and _fits(groups[-1], plan):
            groups[-1].append(plan)
        else:
            groups.append([plan])
    return groups


def _fits(group: Sequence[Any], plan: Plan) -> bool:
    """Whether ``plan`` may travel with ``group``."""
    first = group[0]
    if not (isinstance(plan, ExactPlan) and isinstance(first, ExactPlan) and plan.fusible and first.fusible):
        return False
    total = plan.flat.nbytes + sum(each.flat.nbytes for each in group)
    if total > FUSED_NBYTES or first.context is not plan.context or first.algorithm != plan.algorithm:
        return False
    return _KINDS[plan.fusion].fit(first, plan, total)


def _start(group: list[Any]) -> None:
    if len(group) == 1:
        group[0].start()
    else:
        key = tuple(plan.number for plan in group)
        fused = group[0].fused
        if fused is None or fused.key != key:
            group[0].fused = fused = _KINDS[group[0].fusion](key, group)
        job = group[0].context.queue.submit(fused.steps, fused.what)
        for plan in group:
            plan.take_job(job)


class _Fusion(ABC):
    """Plans that travel as one. The first of them keeps it for the next time."""

    def __init__(self, key: tuple[int, ...], plans: list[ExactPlan]) -> None:
        self.key = key
        self.plans = plans
        self.context = plans[0].context
        self.what = " + ".join(plan.what for plan in plans)

    @staticmethod
    @abstractmethod
    def fit(first: ExactPlan, plan: ExactPlan, nbytes: int) -> bool:
        """Whether ``plan`` may travel with ``first``, when all together have ``nbytes`` bytes."""

    @abstractmethod
    def steps(self, progress: Progress) -> Steps:
        """One run."""

    def count(self) -> None:
        for plan in self.plans:
            plan.count_run()


class SharedFusion(_Fusion):
    """Through shared memory: all pieces in one arrival."""

    def __init__(self, key: tuple[int, ...], plans: list[ExactPlan]) -> None:
        super().__init__(key, plans)
        self._request = Request(RUN, {"plan": self.what})
        shared = self.context.common
        assert shared is not None
        operands = [operand for plan in plans for operand in plan.operands()]
        self._operation = extension.SharedAllreduce(shared.node, self._request.kind, operands, None)

    @staticmethod
    def fit(first: ExactPlan, plan: ExactPlan, nbytes: int) -> bool:
        """See _Fusion."""
        return bool(nbytes <= extension.SharedAllreduce.small(plan.context.size))

    def steps(self, progress: Progress) -> Steps:
        """See _Fusion."""
        self._operation.begin()
        yield from finish(self._operation, progress)
        if self._operation.disagrees:
            yield from conclude(self.context.comm, self._request, verdict_of(self._operation.verdict), progress)
        self.count()


class PackedFusion(_Fusion):
    """By messages: the values copied together, and back."""

    def __init__(self, key: tuple[int, ...], plans: list[ExactPlan]) -> None:
        super().__init__(key, plans)
        first = plans[0]
        self._flat: Any = np.empty(sum(plan.flat.size for plan in plans), first.flat.dtype)
        self._plan = ExactPlan(self.context, self._flat, first.op, Choice(first.algorithm, first.why), self.what)

    @staticmethod
    def fit(first: ExactPlan, plan: ExactPlan, nbytes: int) -> bool:
        """See _Fusion."""
        return first.op == plan.op and bool(first.flat.dtype == plan.flat.dtype)

    def steps(self, progress: Progress) -> Steps:
        """See _Fusion."""
        np.concatenate([plan.flat for plan in self.plans], out=self._flat)
        yield from self._plan.checked_steps(progress)
        start = 0
        for plan in self.plans:
            plan.flat[...] = self._flat[start : start + plan.flat.size]
            start += plan.flat.size
        self.count()


_KINDS: Mapping[str | None, type[_Fusion]] = {"pieces": SharedFusion, "values": PackedFusion}
"""By ``Algorithm.fusion``."""
