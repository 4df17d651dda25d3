"""Telemetry of compressed runs, their costs and losses, and the check by all ranks before each of them."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import Array
from bitring.collectives.execution.runner import Task, make_runner
from bitring.collectives.interop.steps import Progress, Steps, finish
from bitring.collectives.runtime.agreement import Request, conclude, met, verdict_of
from bitring.collectives.runtime.context import Context
from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import algorithms
from bitring.compression.exchange.run_stats import RunStats
from bitring.native import address_of, extension, type_of

OUT_OF_PROPORTION = 10_000
"""A residual of so many times the values' norm is far behind: error feedback keeps it some 1 / (1 - contraction)."""

EXPANDED = 1.1
"""An encoding that leaves more than so many times what it was given, in squared norms, makes a residual grow."""

BEHIND, DIVERGED = 1, 2

_RANK_BITS = 20
_LONGEST = 1 << 40  # microseconds


@dataclass(frozen=True)
class Telemetry:
    """One compressed run on this rank.

    ``seconds`` of the exchange, ``encode_seconds`` and ``decode_seconds`` of them in kernels (a reducer's: making what
    is summed, and the result of it), ``wire_seconds`` the rest; ``wait_seconds`` before it, for the slowest rank.
    ``slowest_rank`` of the run before: the one that waited least; None in the first run. ``bytes_sent``: payload bytes
    to other ranks.

    From a sample of the values: ``residual_ratio`` = ‖new residual‖ / ‖values‖, ``contraction`` = ‖new residual‖² /
    ‖values + old residual‖², below 1 for a compressor that contracts; ``owner_residual_ratio`` is the former of the
    sums that this rank encodes as an owner. NaN where nothing was looked at: in device memory, in a reducer without
    residual, and of owners in any reducer. Inf where a norm is.
    """

    seconds: float
    encode_seconds: float
    decode_seconds: float
    wire_seconds: float
    wait_seconds: float
    slowest_rank: int | None
    bytes_sent: int
    residual_ratio: float
    contraction: float
    owner_residual_ratio: float


def telemetry_of(stats: RunStats, wait_seconds: float, slowest_rank: int | None) -> Telemetry:
    """The telemetry of a run whose exchange left ``stats``."""
    return Telemetry(
        stats.seconds,
        stats.encode,
        stats.decode,
        max(0.0, stats.seconds - stats.encode - stats.decode),
        wait_seconds,
        slowest_rank,
        stats.bytes_sent,
        residual_ratio(stats),
        _over(stats.norms.residual, stats.norms.sums),
        math.sqrt(_over(stats.owner_norms.residual, stats.owner_norms.values)),
    )


def residual_ratio(stats: RunStats) -> float:
    """See Telemetry."""
    return math.sqrt(_over(stats.norms.residual, stats.norms.values))


def _over(part: float, whole: float) -> float:
    if not (math.isfinite(part) and math.isfinite(whole)):
        return math.inf
    return part / whole if whole > 0 else math.nan


class Watch:
    """Sees residuals that are out of proportion to the largest values so far.

    ``state``: 0; BEHIND when one is; DIVERGED when one is that the last encoding made larger, or is not finite. A
    residual that encoding makes smaller comes down by itself, and may belong to values that no sample has seen.
    """

    def __init__(self) -> None:
        self._largest = [0.0, 0.0]
        self.state = 0

    def copy(self) -> Watch:
        """Another that has seen as much."""
        other = Watch()
        other._largest, other.state = list(self._largest), self.state
        return other

    def look(self, stats: RunStats) -> None:
        """Take a run into account."""
        self.state = 0 if stats.finite else DIVERGED
        for k, norms in enumerate((stats.norms, stats.owner_norms)):
            self._largest[k] = max(self._largest[k], norms.values)
            if 0 < OUT_OF_PROPORTION**2 * self._largest[k] < norms.residual:
                self.state = max(self.state, DIVERGED if norms.residual > EXPANDED * norms.sums else BEHIND)


class Advice:
    """Sees a residual that stays larger than trainings bear: ``residual_ratio`` above ``most`` in most runs."""

    RUNS = 100

    def __init__(self, most: float) -> None:
        self._most = most
        self._runs = self._above = 0

    def due(self, residual_ratio: float) -> bool:
        """Take a run into account; whether it completes so many of which three quarters were above."""
        self._runs += 1
        self._above += residual_ratio > self._most
        if self._runs < self.RUNS:
            return False
        often = 4 * self._above > 3 * self.RUNS
        self._runs = self._above = 0
        return often


_SUMMED = ("encode_seconds", "wire_seconds", "decode_seconds", "wait_seconds", "bytes_sent")
_AVERAGED = ("residual_ratio", "contraction", "owner_residual_ratio")


class Totals:
    """Sums and means of many runs."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: Counter[str] = Counter()
        self._slowest: Counter[int] = Counter()

    def add(self, run: Telemetry) -> None:
        """Count a run in."""
        for name in (*_SUMMED, *_AVERAGED):
            x = getattr(run, name)
            if not math.isnan(x):
                self._sums[name] += x
                self._counts[name] += 1
        if run.slowest_rank is not None:
            self._slowest[run.slowest_rank] += 1

    def taken(self) -> dict[str, float | int | None]:
        """Since the last call: seconds and bytes summed, ratios as means, the rank that was slowest most often.

        Empty where there was no run.
        """
        if not self._sums:
            return {}
        result: dict[str, float | int | None] = {name: self._sums[name] for name in _SUMMED}
        for name in _AVERAGED:
            result[name] = self._sums[name] / self._counts[name] if self._counts[name] else None
        result["slowest_rank"] = self._slowest.most_common(1)[0][0] if self._slowest else None
        self._clear()
        return result


def waited(operation: extension.WatchedRun, came: float) -> float:
    """Seconds from when this rank came, at ``came`` by ``time.perf_counter``, to the end of the operation's check."""
    return operation.waited * 1e-9


class HealthCheck:
    """A tiny AllReduce before each run: is a value NaN or Inf, has a residual diverged, who was slowest last time.

    Where an algorithm finds out by itself whether all ranks mean the run ``asked`` for, it does: ``agrees``; then
    ``operation`` is the check, natively, and what is to ``follow`` it. After a check, the same on all ranks:
    ``bad_rank``, the lowest whose values are NaN or Inf, else None; ``worst``, the largest state of a Watch;
    ``slowest_rank``. ``wait_seconds``: from when this rank came to the run. ``followed``: whether the check was all
    right and what follows has been run, too.
    """

    def __init__(self, context: Context, asked: Request, number: int) -> None:
        self._comm, self._rank, self._size = context.comm, context.rank, context.size
        self._asked = asked
        self._signed = False
        self.alike = True
        """After ``steps``: whether all ranks have said the same."""
        self._words = np.zeros(3, np.int64)
        nbytes, topology = self._words.nbytes, context.topology
        query = Query(collective="allreduce", nbytes=nbytes, topology=topology, own=True, library=False, itemsize=8)
        able = [name for name in algorithms.names() if algorithms.get(name).missing(query) is None]
        name = next((name for name in able if algorithms.get(name).self_checking), "recursive_doubling")
        self._runner = make_runner(context, name, Task("allreduce", self._words, MPI.MAX, 0, number, asked.kind))
        self.agrees = algorithms.get(name).self_checking
        self.operation: extension.WatchedRun | None = None
        if self.agrees:
            self.operation = extension.WatchedRun(self._runner.operation, address_of(self._words))
        self.wait_seconds = 0.0
        self._came = 0.0
        self._runs = 0
        self.bad_rank: int | None = None
        self.slowest_rank: int | None = None
        self.worst = 0
        self.followed = False

    def follow(self, operation: Any) -> None:
        """The native operation is what follows from now on, where it is to; only where it ``agrees``."""
        assert self.operation is not None
        self.operation.follow(operation)

    def look_at(self, x: Array) -> None:
        """Look for NaN and Inf in ``x``, 1-D and in host memory, from now on; only where it ``agrees``."""
        kind = type_of(x.dtype)
        assert self.operation is not None
        assert kind is not None
        self.operation.look_at(address_of(x), x.size, kind, self._size - self._rank)

    def come(self) -> None:
        """This rank has come to the run: its wait begins."""
        self._came = time.perf_counter()

    def sign(self, signature: int | None) -> None:
        """See Plan. Only where it ``agrees``."""
        self._runner.operation.sign(self._asked.kind if signature is None else signature)
        self._signed = signature is not None
        self.alike = True

    def prepare(self, bad: bool, state: int, goes_on: bool) -> None:
        """What this rank says next: whether its values are ``bad``, and the ``state`` of its Watch.

        ``goes_on``: where all is right what follows may be run.
        """
        self.alike = True
        self.followed = False
        microseconds = min(int(self.wait_seconds * 1e6), _LONGEST)
        words = self._size - self._rank if bad else 0, state, -(microseconds << _RANK_BITS | self._rank)
        if self.operation is not None:
            self.operation.prepare(*words, goes_on)
        else:
            self._words[:] = words

    def steps(self, progress: Progress) -> Steps:
        """Find out, and run what follows.

        Where it ``agrees`` it raises on all ranks, MismatchError or PeerError, unless all are in this run.
        """
        if self.operation is not None:
            self.operation.begin()
            yield from self.finish(progress)
        else:
            yield from self._runner.steps(progress)
            self.wait_seconds = time.perf_counter() - self._came
            self.hear()

    def finish(self, progress: Progress) -> Steps:
        """The rest of ``operation``, which has begun; as ``steps``."""
        operation = self.operation
        assert operation is not None
        yield from finish(operation, progress)
        if operation.disagrees:
            verdict = verdict_of(operation.verdict)
            if self._signed and met(verdict):
                self.alike = False
                return
            yield from conclude(self._comm, self._asked, verdict, progress)
        self.hear()

    @property
    def followed_well(self) -> bool:
        """Whether what follows was run natively, with nothing the matter on any rank; before ``hear``."""
        return self.operation is not None and self.operation.followed and not self._words[1]

    def hear(self) -> None:
        """Take over what the ranks have said."""
        if self.operation is not None:
            self.wait_seconds, self.followed = waited(self.operation, self._came), self.operation.followed
        bad_place, self.worst, least = self._words.tolist()
        self.bad_rank = self._size - bad_place if bad_place else None
        self.slowest_rank = -least & ((1 << _RANK_BITS) - 1) if self._runs else None
        self._runs += 1

    def close(self) -> None:
        """Give MPI's requests back."""
        self._runner.close()
