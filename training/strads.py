"""Strads: scheduled model parallelism (Lee et al., NIPS 2014; Petuum). Rows are spread, coordinates are scheduled.

A round changes several coordinates at once. Those that changed most come again soon; of two that depend on each other,
whose columns' cosine is above a bound, only one is changed in a round: together they would overshoot.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from bitring.collectives.base_plan import Plan
from bitring.collectives.runtime.context import given_comm
from bitring.collectives.runtime.jointly import jointly
from bitring.collectives.runtime.objects import allgather
from bitring.compression.plans.plan import plan_allreduce
from bitring.errors import MismatchError
from bitring.settings import Range, checked
from bitring.training.columns import columns_of, is_sparse
from bitring.training.program import Program
from bitring.training.shard import parts_for, parts_of
from bitring.training.sum_tree import SumTree
from bitring.training.whole_batch import digest

_REMEMBERED = 4096
"""Cosines of so many features' pairs are kept (4 bytes each); of more they are computed anew."""

_FLOOR = 1e-3
"""A coordinate that did not change has this share of the mean priority."""

_NOWHERE = 1e-11
"""Where each coordinate would change the residual by less than this share of the targets' length, a fit ends, too."""


class Progress(NamedTuple):
    """The objective after so many updates of coordinates, and seconds since the fit began."""

    seconds: float
    updates: int
    objective: float


class Fit(NamedTuple):
    """The result. ``coefficients``: (features,), float64, equal on all ranks and on any number of them.

    ``gap``: the objective is so far above its minimum at most. ``converged``: not ended by the limit of updates.
    ``history``: a ``Progress`` per round. ``chosen``: the coordinates that each round changed.
    """

    coefficients: Any
    objective: float
    gap: float
    converged: bool
    updates: int
    history: list[Progress]
    chosen: list[Any]


class Strads:
    """Fit ``program`` on all ranks of ``comm``. Making it is collective, and so is ``fit``.

    width: candidates in a round. independence: two columns whose cosine is larger, by its absolute value, are not
    changed in one round; 1 lets all through, which may diverge. priority: coordinates are drawn in proportion to their
    last change, or all alike. seed: of the draws. tolerance: ``fit`` ends when the gap to the minimum is at most this
    share of the objective at zero, or when rounding is all that is left. Any number of ranks makes the same choices.
    """

    def __init__(
        self,
        program: Program,
        *,
        comm: MPI.Intracomm | None = None,
        width: int = 32,
        independence: float = 0.1,
        priority: bool = True,
        seed: int = 0,
        tolerance: float = 1e-8,
        updates: int | None = None,
    ) -> None:
        """``updates``: at most about so many are made; None for no limit."""
        self.comm = given_comm(comm, "Strads")

        def check() -> dict[str, Any]:
            if not isinstance(program, Program):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TypeError(f"Strads: program must be one such as bitring.Lasso; got {type(program).__name__}")
            return {
                "program": repr(program),
                "width": checked("Strads", "width", width, int, Range(least=1)),
                "independence": checked("Strads", "independence", independence, float, Range(least=0, most=1)),
                "priority": checked("Strads", "priority", priority, bool),
                "seed": checked("Strads", "seed", seed, int, Range(least=0)),
                "tolerance": checked("Strads", "tolerance", tolerance, float, Range(least=0)),
                "updates": None if updates is None else checked("Strads", "updates", updates, int, Range(least=1)),
            }

        mine = jointly(self.comm, "Strads", check, (TypeError, ValueError))
        _require_alike(self.comm, "Strads", mine)
        self.program, self.width, self.independence = program, int(width), float(independence)
        self.priority, self.seed, self.tolerance, self.updates = bool(priority), int(seed), float(tolerance), updates

    def fit(self, x: Any, y: Any) -> Fit:
        """Find the coefficients for rows ``x`` and their targets ``y``; both whole, and the same on all ranks.

        x: (rows, features), a NumPy array or of scipy.sparse; y: (rows,). Each rank works on its part of the rows.
        Raises TypeError and ValueError on all ranks; FloatingPointError when the objective grows without end, since
        columns that depend on each other are changed together.
        """
        alike = (TypeError, ValueError)
        y = jointly(self.comm, "Strads.fit", lambda: self.program.targets(_checked(x, y)), alike)
        _require_alike(self.comm, "Strads.fit", {"the shape of x": tuple(x.shape), "the digest of y": digest([(y,)])})
        run = _Run(self, x, y)
        try:
            return run.fit()
        finally:
            run.free()


class _Run:
    """One fit."""

    def __init__(self, strads: Strads, x: Any, y: Any) -> None:
        comm = strads.comm
        rank, ranks = comm.Get_rank(), comm.Get_size()
        self._settings, self._program, self._comm = strads, strads.program, comm
        rows, self._features = x.shape
        self._parts = parts_for(ranks)
        first, last = parts_of(rank, ranks)
        by_row = x.tocsr() if is_sparse(x) else x
        bounds = [rows * part // self._parts for part in range(self._parts + 1)]
        cuts = [(part, slice(bounds[part], bounds[part + 1])) for part in range(first, last)]
        self._workers = [(part, self._program.worker(columns_of(by_row[cut]), y[cut])) for part, cut in cuts]
        self._plans: dict[int, tuple[Any, Plan]] = {}
        self._everything = np.arange(self._features)
        self._values = np.zeros(self._features)
        self._squares = self._summed(self._features, lambda worker: worker.columns.squares())
        self._cosines = np.full((self._features,) * 2 if self._features <= _REMEMBERED else (0, 0), np.nan, np.float32)
        self._random = np.random.default_rng(strads.seed)

    def fit(self) -> Fit:
        """Rounds until the gap is small enough; it is looked at after as many updates as there are coordinates."""
        program, features, settings = self._program, self._features, self._settings
        begin = time.perf_counter()
        width = min(settings.width, features)
        history: list[Progress] = []
        chosen: list[Any] = []
        updates, looked = 0, 0
        measured, sums = self._look()
        start = objective = program.objective(measured, self._values)
        gap = program.gap(measured, sums, self._values)
        priorities = _raised(self._far(sums))
        still_to_go, most = True, math.inf if settings.updates is None else settings.updates
        while still_to_go and gap > settings.tolerance * start and updates < most:
            draw = priorities if settings.priority else np.ones(features)
            candidates = program.schedule(self._random, draw, width)
            candidates = candidates[np.argsort(-priorities[candidates], kind="stable")]
            pushed = self._push(candidates)
            objective = program.objective(pushed[width:], self._values)
            history.append(Progress(time.perf_counter() - begin, updates, objective))
            if not objective <= 1e3 * max(start, 1e-300):
                raise FloatingPointError(
                    f"Strads.fit: the objective has grown from {start:g} to {objective:g}: columns that depend on "
                    "each other are changed together; a smaller width helps, or independence, which is "
                    f"{settings.independence:g}"
                )
            new = program.pull(pushed[:width], self._values[candidates], self._squares[candidates])
            changes = new - self._values[candidates]
            moving = np.flatnonzero(changes)
            kept = moving[self._independent(candidates[moving])]
            updates += width - (moving.size - kept.size)
            still = np.setdiff1d(np.arange(width), moving, assume_unique=True)
            priorities[candidates[still]] = 0
            coordinates, changes = candidates[kept], changes[kept]
            priorities[coordinates] = np.abs(changes) * np.sqrt(self._squares[coordinates])
            priorities = _raised(priorities)
            if coordinates.size:
                self._values[coordinates] += changes
                for _, worker in self._workers:
                    program.apply(worker, coordinates, changes)
            chosen.append(coordinates)
            if updates - looked >= features:
                looked = updates
                measured, sums = self._look()
                objective = program.objective(measured, self._values)
                gap = program.gap(measured, sums, self._values)
                far = self._far(sums)
                still_to_go = bool(far.max() > _NOWHERE * np.sqrt(2 * start))
                if settings.priority:
                    priorities = _raised(far)
        measured, sums = self._look()
        objective, gap = program.objective(measured, self._values), program.gap(measured, sums, self._values)
        history.append(Progress(time.perf_counter() - begin, updates, objective))
        converged = gap <= settings.tolerance * start or not still_to_go
        return Fit(self._values, objective, max(gap, 0.0), converged, updates, history, chosen)

    def _push(self, candidates: Any) -> Any:
        """The candidates' sums, and the measures."""

        def sums(worker: Any) -> Any:
            return np.append(self._program.push(worker, candidates), self._program.measure(worker))

        return self._summed(len(candidates) + 2, sums)

    def _look(self) -> tuple[Any, Any]:
        """The measures and the sums of all coordinates."""
        program = self._program

        def all_sums(worker: Any) -> Any:
            return np.append(program.measure(worker), program.push(worker, self._everything))

        found = self._summed(2 + self._features, all_sums)
        return found[:2], found[2:]

    def _far(self, sums: Any) -> Any:
        """How far each coordinate would go by itself, in the length that it adds to the residual."""
        changes = self._program.pull(sums, self._values, self._squares) - self._values
        return np.abs(changes) * np.sqrt(self._squares)

    def _independent(self, coordinates: Any) -> Any:
        """Positions in ``coordinates`` of those to change: each by the bound independent of all before it."""
        bound, count = self._settings.independence, len(coordinates)
        if bound >= 1 or count < 2:
            return np.arange(count)
        among = np.ix_(coordinates, coordinates)
        cosines = self._cosines[among] if self._cosines.size else None
        if cosines is None or np.isnan(cosines).any():
            width = min(self._settings.width, self._features)

            def padded(worker: Any) -> Any:
                gram = np.zeros((width, width))
                gram[:count, :count] = worker.columns.gram(coordinates)
                return gram.reshape(-1)

            products = np.abs(self._summed(width * width, padded).reshape(width, width)[:count, :count])
            lengths = np.sqrt(self._squares[coordinates])
            cosines = (products / np.outer(lengths, lengths)).astype(np.float32)
            if self._cosines.size:
                self._cosines[among] = cosines
        dependent = cosines > bound
        kept: list[int] = []
        barred = np.zeros(count, bool)
        for i in range(count):
            if not barred[i]:
                kept.append(i)
                barred |= dependent[i]
        return np.array(kept, int)

    def _summed(self, size: int, of: Callable[[Any], Any]) -> Any:
        """The sum over all workers, along a fixed tree: the same bits on any number of ranks. Collective."""
        if size not in self._plans:
            buffer = np.zeros((self._parts, size))
            plan = plan_allreduce(buffer.reshape(-1), comm=self._comm)
            self._plans[size] = buffer, plan
        buffer, plan = self._plans[size]
        buffer.fill(0)
        for part, worker in self._workers:
            buffer[part] = of(worker)
        plan()  # each part is somebody's, and zero elsewhere: nothing is rounded
        tree = SumTree(self._parts)
        for part in range(self._parts):
            tree.add((0, part), buffer[part].copy())
        return tree.total

    def free(self) -> None:
        """Free the plans."""
        for _, plan in self._plans.values():
            plan.free()


def _raised(priorities: Any) -> Any:
    """None is zero, so that every coordinate comes again."""
    return np.maximum(priorities, _FLOOR * priorities.mean() + 1e-300)


def _checked(x: Any, y: Any) -> Any:
    """``y`` as float64. Raises TypeError and ValueError."""
    if not is_sparse(x) and not isinstance(x, np.ndarray):
        raise TypeError(f"Strads.fit: x must be a NumPy array or a matrix of scipy.sparse; got {type(x).__name__}")
    if len(x.shape) != 2 or x.dtype.kind not in "fiub" or 0 in x.shape:
        raise ValueError(f"Strads.fit: x must be real, of shape (rows, features); got {x.dtype} of shape {x.shape}")
    y = np.asarray(y, np.float64)
    if y.shape != x.shape[:1]:
        raise ValueError(f"Strads.fit: y must have shape ({x.shape[0]},), as many as x has rows; got {y.shape}")
    if not (np.isfinite(y).all() and np.isfinite(x.tocsr().data if is_sparse(x) else x).all()):
        raise ValueError("Strads.fit: x and y must be finite; there is NaN or Inf")
    return y


def _require_alike(comm: MPI.Intracomm, function: str, mine: dict[str, Any]) -> None:
    """Raise MismatchError where a rank's values are not rank 0's. Collective."""
    everyone = allgather(comm, mine, function)
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            if value != everyone[0][name]:
                raise MismatchError(f"{function}: {name} is {value} on rank {rank}, {everyone[0][name]} on rank 0")
