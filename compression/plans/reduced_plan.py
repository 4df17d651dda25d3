"""A plan whose sum travels by a reducer: a small representation, summed by exact AllReduces."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import Array, device_of
from bitring.collectives.interop.operators import op_name, require_op
from bitring.collectives.interop.steps import Progress
from bitring.collectives.plan import checked_flat, run_agreement
from bitring.collectives.runtime.agreement import Request
from bitring.collectives.runtime.context import Context, context_of
from bitring.collectives.selection.selection import check_name
from bitring.compression.compressor import parsed
from bitring.compression.encoder import VALUE_DTYPES
from bitring.compression.exchange.exchange import Exchange
from bitring.compression.exchange.run_stats import RunStats, sample
from bitring.compression.factors import Factors
from bitring.compression.plans.parameters import checked_boundaries, checked_shapes
from bitring.compression.plans.watched_plan import WatchedPlan, check_flags
from bitring.compression.reducer import Reducer, unflatten


def reducer_of(compression: object) -> Reducer | None:
    """The reducer that is asked for, by name or as an instance; None for anything else, and for a mistake."""
    try:
        made = parsed(compression, "plan_allreduce")
    except Exception:  # plan_allreduce tells of it, on all ranks
        return None
    return made if isinstance(made, Reducer) else None


def plan_reduced(
    x: Any,
    comm: MPI.Intracomm,
    op: MPI.Op,
    algorithm: str,
    reducer: Reducer,
    hierarchical: bool | None,
    boundaries: Sequence[int],
    shapes: Sequence[Sequence[int]] | None,
    check_finite: bool,
) -> ReducedPlan:
    """See ``bitring.plan_allreduce``. Collective."""
    context = context_of(comm)
    flat: Array = np.empty(0, np.float32)
    parts: list[tuple[int, ...]] = []
    request = Request("plan_allreduce")
    try:
        flat, terms = checked_flat(x, "plan_allreduce")
        check_name(algorithm, "plan_allreduce")
        require_op(op, "plan_allreduce")
        check_flags(hierarchical, check_finite)
        if flat.dtype not in VALUE_DTYPES:
            names = ", ".join(dtype.name for dtype in VALUE_DTYPES)
            raise TypeError(f"plan_allreduce: compression is for {names}; got {flat.dtype}")
        if op_name(op) != "SUM":
            raise ValueError(f"plan_allreduce: compression is for sums (op=MPI.SUM); got {op_name(op)}")
        reducer.check(flat)
        parts = checked_shapes(x, flat, shapes)
        request.terms = {
            **terms,
            "op": op_name(op),
            "algorithm": algorithm,
            "compression": str(reducer),
            "hierarchical": hierarchical,
            "boundaries": checked_boundaries(boundaries, flat.size),
            "shapes": parts,
        }
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        request.error = error
    with context.turn("plan_allreduce"):
        run_agreement(context, request)
        return ReducedPlan(context, flat, reducer, parts, algorithm, check_finite)


class ReducedPlan(WatchedPlan):
    """A sum of ``flat`` by a reducer. With one rank there is nothing to exchange, and nothing is left out."""

    algorithm = "exact sums of a small representation"

    def __init__(
        self,
        context: Context,
        flat: Array,
        reducer: Reducer,
        shapes: Sequence[tuple[int, ...]],
        algorithm: str,
        check_finite: bool,
    ) -> None:
        super().__init__(context, flat, reducer, check_finite)
        self.takes_factors = reducer.takes_factors
        self._exchange = Exchange(context, algorithm)
        self._reduction = reducer.bind(flat, unflatten(flat, shapes), self._exchange)
        self._runs = 0
        self.why = (
            f"{reducer} was asked for; {self._reduction.why}; exact sums are node-aware themselves, so hierarchical "
            f"makes no difference"
        )

    def take(self, number: int, factors: Factors) -> None:
        """Take ``factors`` as this rank's values of a parameter, counted from 0, in the next run, instead of x's."""
        self._reduction.take(number, factors)

    def _settle(self) -> None:
        self._reduction.finish()
        super()._settle()

    def _refuse(self) -> None:
        self._reduction.drop()

    def _carried(self, outside: bool) -> dict[str, Array]:
        return dict(self._reduction.state)

    def _owed(self) -> list[tuple[Array, Array]]:
        residual = self._reduction.state.get("residual")
        return [] if residual is None else [(self._flat, residual)]

    def _finite(self) -> bool:
        return self._reduction.finite()

    def _compressed_steps(self, progress: Progress) -> Generator[None, None, RunStats | None]:
        stats = self._reduction.stats = RunStats()
        device, residual = device_of(self._flat), self._reduction.state.get("residual")
        before, began = self._exchange.bytes_sent, time.perf_counter()
        self._runs += 1
        if residual is not None and device is None:
            with stats.during("encode"):
                stats.norms.look_before(sample(self._flat, self._runs), sample(residual, self._runs))
        yield from self._reduction.steps(progress)
        if device is not None:
            event = device.record()
            while not event.done:
                yield
            progress.moves += 1
        elif residual is not None:
            with stats.during("encode"):
                stats.norms.look_after(sample(residual, self._runs))
                stats.look_at_all(residual)
        stats.seconds = time.perf_counter() - began
        stats.bytes_sent = self._exchange.bytes_sent - before
        self.bytes_sent += stats.bytes_sent
        return stats

    def state_dict(self) -> dict[str, Array]:
        """Arrays that the reducer carries from run to run; the plan's own, not copies.

        ``residual``, where the reducer leaves something out, is 1-D with one for each value, in x's memory, float32
        (float64 for float64 values). All else is identical on all ranks.
        """
        return dict(self._reduction.state)

    def free(self) -> None:
        """See Plan."""
        super().free()
        for each in self._exchange.sums:
            each.free()
