"""Base of compressed plans: a check by all ranks before each run, telemetry after it, and the way out."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Generator, Mapping
from typing import Any, Protocol
from weakref import WeakMethod, WeakSet

import numpy as np
from mpi4py import MPI

from bitring.arrays import Array, device_of, xp_of
from bitring.collectives.base_plan import Plan
from bitring.collectives.execution.native import ALONE_SECONDS, DECLINED, DONE, UNFINISHED, may_run_past_engine
from bitring.collectives.execution.runner import Runner, schedule_runner
from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.context import Context
from bitring.collectives.runtime.tags import channel_of
from bitring.compression.compressor import Compressor
from bitring.compression.exchange.run_stats import RunStats
from bitring.compression.plans.telemetry import (
    BEHIND,
    DIVERGED,
    OUT_OF_PROPORTION,
    Advice,
    HealthCheck,
    Telemetry,
    Watch,
    residual_ratio,
    telemetry_of,
)
from bitring.errors import NonFiniteError
from bitring.settings import checked

logger = logging.getLogger("bitring")


def add_owed(x: Array, owed: Array) -> bool:
    """Add residuals to ``x``, in place; ``owed`` keeps the rounding error of x's dtype. Returns whether there is any.

    Where the sum is not finite x stays as it is, and ``owed`` becomes 0.
    """
    xp = xp_of(x)
    with np.errstate(over="ignore", invalid="ignore"):
        v = x.astype(owed.dtype) + owed
        rounded = v.astype(x.dtype)
        v -= rounded.astype(owed.dtype)
    held = xp.isfinite(v)  # not where v or what it was rounded to is not finite
    x[...] = xp.where(held, rounded, x)
    owed[...] = xp.where(held, v, 0)
    return bool(owed.any())


def check_flags(hierarchical: object, check_finite: object) -> None:
    """Raise TypeError unless these arguments of ``plan_allreduce`` are bools, or None for ``hierarchical``."""
    if hierarchical is not None:
        checked("plan_allreduce", "hierarchical", hierarchical, bool)
    checked("plan_allreduce", "check_finite", check_finite, bool)


class Before:
    """Copy of what a plan carries from run to run, from before a run. Its arrays are kept for the next time."""

    _OTHER = ("_watch", "_warned", "_exact", "_owes", "_to_add", "_runs", "_last", "algorithm", "why")

    def __init__(self) -> None:
        self._copies: dict[str, Array] = {}
        self._arrays: dict[str, Array] = {}
        self._other: dict[str, Any] = {}

    def forget(self) -> None:
        """There is nothing to bring back."""
        self._arrays.clear()
        self._other.clear()

    def keep(self, plan: WatchedPlan, arrays: Mapping[str, Array]) -> None:
        """Copy ``arrays``, but for those that were copied already and not forgotten."""
        for name, array in arrays.items():
            if name in self._arrays:
                continue
            kept = self._copies.get(name)
            if kept is None or (kept.shape, kept.dtype) != (array.shape, array.dtype):
                kept = self._copies[name] = xp_of(array).empty_like(array)
            kept[...] = array
            self._arrays[name] = array
        if not self._other:
            self._other = {name: getattr(plan, name) for name in self._OTHER if hasattr(plan, name)}
            self._other["_watch"] = self._other["_watch"].copy()

    def bring_back(self, plan: WatchedPlan) -> None:
        """Give ``plan`` what was kept, if anything was."""
        for name, array in self._arrays.items():
            array[...] = self._copies[name]
        for name, value in self._other.items():
            setattr(plan, name, value)
        self.forget()


_advised: WeakSet[Context] = WeakSet()
"""Those on whose communicators it has been said that residuals stay large."""


class _Part(Protocol):
    def close(self) -> None: ...


class WatchedPlan(Plan):
    """A compressed sum of ``flat``. ``telemetry`` is about the last run; None before one, and where sums are exact.

    When encoding makes a rank's residual grow without bound, or it is not finite, all ranks sum exactly from then on;
    the first of these sums has what residuals there were, so that nothing finite is lost. The log says so.
    """

    _ring: Runner | None = None  # made when the compressor has failed
    _exact: Runner | None = None  # what sums, then
    _parts: tuple[_Part, ...] = ()  # that are closed at the end

    def __init__(self, context: Context, flat: Array, compressor: Compressor, check_finite: bool) -> None:
        super().__init__(context, f"allreduce of {flat.size} {flat.dtype} values, compressed by {compressor}")
        self._flat = flat
        self._compressor = compressor
        self._check_finite = check_finite
        self._health = HealthCheck(context, self._run, self.number)
        self._watch = Watch()
        self._advice = Advice(compressor.most_left)
        self._warned = False
        self._owes = False  # whether a single rank was handed residuals
        self._before = Before()
        self._marked = False  # whether ``undo`` goes back further than the last run
        self._parts = (self._health,)
        self._last: tuple[RunStats, float, int | None] | None = None  # what telemetry is of
        self._looks = False  # whether the native check looks for NaN

    def _run_natively(self, operation: Any) -> None:
        """Make ``operation``, of the native engine, what ``_exchanged`` is to be told of; None for none.

        So a run is one with the check of all ranks before it.
        """
        if not self._health.agrees:
            return
        self._health.follow(operation)
        if self._check_finite and device_of(self._flat) is None:
            self._health.look_at(self._flat)
            self._looks = True
        fast_path = self.context.queue.fast_path
        if operation is not None and fast_path is not None and may_run_past_engine(self._health.operation):
            self._fast_path = fast_path
            self._run_past_engine = fast_path.runs(self._health.operation, ALONE_SECONDS).run
            pass_engine: Any = WeakMethod(self._pass_engine)  # a plan that held itself would be there for ever
            self._past_engine = lambda: pass_engine()()

    @property
    def telemetry(self) -> Telemetry | None:
        """See Plan."""
        return None if self._last is None else telemetry_of(*self._last)

    def _prepare_exchange(self) -> bool:
        """Prepare the next run of the native operation, unless it is not to be run as it is; returns whether it is."""
        return False

    def _exchanged(self) -> RunStats | None:
        """The native operation has been run; as ``_compressed_steps``."""
        raise NotImplementedError

    @abstractmethod
    def _finite(self) -> bool:
        """Whether this rank's values hold neither NaN nor Inf."""

    @abstractmethod
    def _compressed_steps(self, progress: Progress) -> Generator[None, None, RunStats | None]:
        """One compressed run; returns its stats, None where sums are exact. Adds to ``bytes_sent``."""

    @abstractmethod
    def _carried(self, outside: bool) -> Mapping[str, Array]:
        """The arrays that runs change in place, by name, but for x and scratch, and what the exchange keeps by itself.

        ``outside``: residuals change outside the exchange, too.
        """

    def _forget(self) -> None:
        """Keep what runs have changed by now: ``undo`` does not bring back what was before."""
        self._before.forget()

    @abstractmethod
    def _owed(self) -> list[tuple[Array, Array]]:
        """This rank's residuals, each behind the part of x that they are to be added to."""

    def _settle(self) -> None:
        """The run of a single rank. It leaves nothing out; what it was handed as residuals, of more ranks, is added."""
        if self._owes:
            left = [add_owed(x, owed) for x, owed in self._owed()]
            self._owes = any(left)

    def _refuse(self) -> None:
        """Forget what this run was given: it is not made."""

    def checked_steps(self, progress: Progress) -> Steps:
        """See Plan."""
        self.alike = not self.signed
        self._health.come()
        yield from self._steps(progress) if self._health.agrees else super().checked_steps(progress)
        self.alike = self._health.alike

    @property
    def can_be_signed(self) -> bool:
        """See Plan."""
        return self._health.agrees

    def sign(self, signature: int | None, name: str = "") -> None:
        """See Plan."""
        super().sign(signature, name)
        self._health.sign(signature)

    def mark(self) -> None:
        """See Plan. Without it, a run that fails takes back its own changes."""
        self._marked = True
        self._forget()

    def undo(self) -> None:
        """See Plan."""
        self._before.bring_back(self)

    def wait(self) -> None:
        """See Plan."""
        try:
            super().wait()
        except BaseException:
            if not (self._marked or self.started):
                self.undo()
            raise

    def _steps(self, progress: Progress) -> Steps:
        if self.context.size == 1:
            if not self._marked:
                self._forget()
            if self._check_finite and not self._finite():
                self._refuse()
                raise NonFiniteError(f"{self.what}: x holds NaN or Inf on rank 0; nothing was changed")
            self._before.keep(self, self._carried(self._owes))
            self._settle()
            return
        self._prepare()
        yield from self._health.steps(progress)
        yield from self._go_on(progress)

    def _prepare(self) -> None:
        """What comes before the check of all ranks."""
        if not self._marked:
            self._forget()
        bad = self._check_finite and not self._looks and not self._finite()
        # A rank that sums exactly, and has not loaded another state since, keeps the others at it.
        state = DIVERGED if self._exact is not None else self._watch.state
        goes_on = self._exact is None and self._prepare_exchange()
        if goes_on:
            self._before.keep(self, self._carried(False))
        self._health.prepare(bad, state, goes_on)

    def _pass_engine(self) -> Any:
        """One run past the engine, with what comes before and after. Returns what became of it."""
        if self._fast_path.inside:  # another thread is in a run, perhaps of this plan
            return DECLINED
        self._health.come()
        self._prepare()
        try:
            outcome = self._run_past_engine()
            if outcome == DECLINED:
                return DECLINED
            if outcome == DONE and self._health.followed_well:
                self._health.hear()
                self._conclude(self._exchanged())
                return DONE
        except BaseException:  # an interrupt: nobody takes the run further
            if not self._marked:
                self.undo()
            raise
        return UNFINISHED

    def _finish(self, progress: Progress) -> Steps:
        """See Plan."""
        self.alike = not self.signed
        yield from self._health.finish(progress)
        yield from self._go_on(progress)
        self.alike = self._health.alike

    def _go_on(self, progress: Progress) -> Steps:
        """What comes after the check of all ranks."""
        health = self._health
        if not health.alike:
            return
        if health.bad_rank is not None:
            self._refuse()
            raise NonFiniteError(f"{self.what}: x holds NaN or Inf on rank {health.bad_rank}; nothing was changed")
        if health.worst == BEHIND and not self._warned:
            self._warned = True
            if self.context.rank == 0:
                logger.warning(
                    "%s: a residual is more than %d times what is summed: most of it has not been sent yet",
                    self.what,
                    OUT_OF_PROPORTION,
                )
        if health.followed:
            self._conclude(self._exchanged())
            return
        gives_up = health.worst == DIVERGED and self._exact is None
        self._before.keep(self, self._carried(gives_up))
        if gives_up:
            self._give_up()
        if self._exact is not None:
            yield from self._exact.steps(progress)
            self.bytes_sent += self._exact.nbytes_sent
            return
        self._conclude((yield from self._compressed_steps(progress)))

    def _conclude(self, stats: RunStats | None) -> None:
        if stats is not None:
            self._watch.look(stats)
            self._last = stats, self._health.wait_seconds, self._health.slowest_rank
            if self._advice.due(residual_ratio(stats)):
                self._advise()

    def _advise(self) -> None:
        """Tell the user once a communicator, on rank 0, what helps against a residual that stays large."""
        if self.context.rank == 0 and self.context not in _advised:
            _advised.add(self.context)
            logger.warning(
                "%s: in most of %d runs its residual was more than %s times what is summed, and is %.1f times now: "
                "much arrives late, which costs accuracy. What helps: a lower learning rate; more levels "
                "(OneBit(levels='rank_one') with shapes, Linear(bits=4)); exact first steps (warmup_steps). See "
                "'Which compressor for my training' in docs/compression.md",
                self.what,
                Advice.RUNS,
                self._compressor.most_left,
                0.0 if self._last is None else residual_ratio(self._last[0]),
            )

    def _give_up(self) -> None:
        """Sum exactly from now on; the first time, what the residuals hold too."""
        if self._ring is None:
            self._ring = schedule_runner(
                self.context.comm, "allreduce", "ring", self._flat, MPI.SUM, 0, channel_of(self.number), persistent=True
            )
            self._parts += (self._ring,)
        self._exact = self._ring
        for x, owed in self._owed():
            add_owed(x, owed)
            owed[...] = 0
        self._last = None
        self._chosen = self.algorithm, self.why
        self.algorithm, self.why = "ring", f"the residual of {self._compressor} diverged, so sums are exact now"
        if self.context.rank == 0:
            logger.warning("%s: %s", self.what, self.why)

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Copy what ``state_dict`` returned in, and compress from now on, whatever has diverged before.

        Raises ValueError for other names, shapes or dtypes.
        """
        self._copy_in(state)

    def _copy_in(self, state: dict[str, Array]) -> dict[str, Array]:
        """Copy to the arrays of ``state_dict``, and return them."""
        mine = self.state_dict()
        if not isinstance(state, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"{self.what}: load_state_dict: state must be a dict; got {type(state).__name__}")
        if sorted(state) != sorted(mine):
            raise ValueError(f"{self.what}: load_state_dict: state must hold {sorted(mine)}; got {sorted(state)}")
        for name, array in mine.items():
            given = [getattr(state[name], part, None) for part in ("shape", "dtype")]
            if given != [array.shape, array.dtype]:
                raise ValueError(
                    f"{self.what}: load_state_dict: {name} must have shape {array.shape} and dtype {array.dtype}; "
                    f"got {given[0]} and {given[1]}"
                )
        for name, array in mine.items():
            if device_of(array) is not None and device_of(state[name]) is None:
                array.set(state[name])
            else:
                array[...] = state[name]
        if self._exact is not None:
            self.algorithm, self.why = self._chosen
        self._exact, self._watch, self._owes = None, Watch(), True
        self._forget()
        return mine

    def free(self) -> None:
        """See Plan."""
        super().free()
        self._past_engine = None
        for part in self._parts:
            part.close()
