"""``plan_allreduce``: an AllReduce bound to a buffer, exact or compressed."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import BFLOAT16, Array, all_finite, device_of, xp_of
from bitring.collectives.base_plan import Plan
from bitring.collectives.interop.operators import op_name, require_op
from bitring.collectives.interop.steps import Progress
from bitring.collectives.plan import checked_flat, plan_exact, run_agreement
from bitring.collectives.runtime.agreement import Request
from bitring.collectives.runtime.context import Context, context_of, given_comm
from bitring.collectives.runtime.tags import channel_of
from bitring.collectives.selection.selection import check_name
from bitring.compression.compressor import Compressor, parsed
from bitring.compression.encoder import Encoder, compressors, residual_dtype
from bitring.compression.exchange.layout import lay_out
from bitring.compression.exchange.once_a_node import once_a_node
from bitring.compression.exchange.owner_exchange import OwnerExchange, exchange_for
from bitring.compression.exchange.route import FlatRoute, LeaderRoute, NodeRoute, Route, make_lane_route
from bitring.compression.exchange.run_stats import RunStats
from bitring.compression.plans.parameters import Shape, checked_boundaries, checked_shapes
from bitring.compression.plans.reduced_plan import plan_reduced, reducer_of
from bitring.compression.plans.watched_plan import WatchedPlan, add_owed, check_flags


def plan_allreduce(
    x: Any,
    *,
    comm: MPI.Intracomm | None = None,
    op: MPI.Op = MPI.SUM,
    algorithm: str = "auto",
    compression: str | Compressor | None = None,
    hierarchical: bool | None = None,
    boundaries: Sequence[int] = (),
    shapes: Sequence[Sequence[int]] | None = None,
    check_finite: bool = True,
) -> Plan:
    """A plan that reduces ``x`` over all ranks in place; collective.

    ``x``: a contiguous NumPy or CuPy array, or anything that shares its memory through DLPack, of the same shape,
    memory order and dtype on every rank; NumPy's subclasses are taken for their plain data. ``comm``: MPI.COMM_WORLD by
    default. ``algorithm``: a registered name, or ``"auto"``.

    ``compression``: None is exact; "onebit", "onebit:block=512" or the encoder ``OneBit(block=512)`` sends encoded sums
    of float16, bfloat16, float32 or float64 values with error feedback (Seide et al., 2014): what an encoding leaves
    out, the residual, is added to the next run's values. ``hierarchical``: ranks of a node first sum exactly, and only
    nodes exchange encoded sums; by default where there is more than one node.

    A reducer such as ``PowerSGD(matrix_rank=4)`` sums its own small representation exactly instead, with nodes summed
    first in any case.

    ``shapes``: the shapes of the parameters in ``x``, one behind the other, for compressors that look at matrices (the
    first dimension counts rows); without it x is one parameter of its own shape. ``boundaries``: the positions in ``x``
    where a new parameter begins, for parameters whose shapes do not matter: they count as flat. Values of two
    parameters never share levels.
    ``check_finite=False`` leaves out the NaN check (of Inf, too), for callers that have made it on all ranks.

    Raises on all ranks: MismatchError where ranks differ in dtype, count, shape, op, algorithm or compression. A rank's
    bad arguments raise TypeError or ValueError there, and PeerError on the others. A compressed run raises
    NonFiniteError on all ranks when a value is NaN or Inf on any; nothing has changed then.
    """
    comm = given_comm(comm, "plan_allreduce")

    def again(other: MPI.Intracomm) -> Plan:
        return plan_allreduce(
            x,
            comm=other,
            op=op,
            algorithm=algorithm,
            compression=compression,
            hierarchical=hierarchical,
            boundaries=boundaries,
            shapes=shapes,
            check_finite=check_finite,
        )

    if compression is None:
        return plan_exact(x, comm, op, algorithm)
    reducer = reducer_of(compression)
    if reducer is not None:
        return plan_reduced(x, comm, op, algorithm, reducer, hierarchical, boundaries, shapes, check_finite).remade_by(
            again
        )
    context = context_of(comm)
    request = Request("plan_allreduce")
    flat: Array = np.empty(0, np.float32)
    encoder: Encoder | None = None
    parts: list[Shape] = []
    encoders: set[Encoder] = set()
    try:
        flat, terms = checked_flat(x, "plan_allreduce")
        check_name(algorithm, "plan_allreduce")
        require_op(op, "plan_allreduce")
        check_flags(hierarchical, check_finite)
        made = parsed(compression, "plan_allreduce")
        if not isinstance(made, Encoder):
            raise TypeError(
                f"plan_allreduce: compression must be None, a registered name ({', '.join(compressors.names())}), an "
                f"encoder or a reducer; got {type(made).__name__}"
            )
        encoder = made
        if flat.dtype.name not in _COMPRESSED_DTYPES:
            raise TypeError(f"plan_allreduce: compression is for {', '.join(_COMPRESSED_DTYPES)}; got {flat.dtype}")
        if op_name(op) != "SUM":
            raise ValueError(f"plan_allreduce: compression is for sums (op=MPI.SUM); got {op_name(op)}")
        places = checked_boundaries(boundaries, flat.size)
        parts = checked_shapes(x, flat, shapes, places)
        encoders = {encoder, *encoder.for_parts(parts)}
        request.flag = not all(each.has_functions for each in encoders)
        if device_of(flat) is not None:
            for each in encoders:
                each.device_kernels()
        request.terms = {
            **terms,
            "op": op_name(op),
            "algorithm": algorithm,
            "compression": str(encoder),
            "hierarchical": hierarchical,
            "boundaries": places,
            "shapes": parts,
        }
    except Exception as error:  # whatever it is, the other ranks must not wait for this one
        request.error = error
    with context.turn("plan_allreduce"):
        run_agreement(context, request)
        assert encoder is not None
        all_native = context.topology.native and not request.flag
        plan = CompressedPlan(context, flat, encoder, encoders, hierarchical, parts, check_finite, all_native)
        return plan.remade_by(again)


_COMPRESSED_DTYPES = ("float16", BFLOAT16.name, "float32", "float64")


class CompressedPlan(WatchedPlan):
    """A sum of ``flat`` by the owner exchange; with ``hierarchical`` of the nodes' exact sums.

    ``owned``: the values whose sum this rank encodes, from the first index to before the second.
    """

    algorithm = "owner exchange"

    def __init__(
        self,
        context: Context,
        flat: Array,
        encoder: Encoder,
        encoders: Iterable[Encoder],
        hierarchical: bool | None,
        shapes: Sequence[Shape],
        check_finite: bool,
        all_native: bool,
    ) -> None:
        """``encoders``: the kinds that parameters of these ``shapes`` may be encoded by, of which some ``encoder`` is.

        ``all_native``: whether all ranks have the native engine and the encoders' C functions.
        """
        super().__init__(context, flat, encoder, check_finite)
        self._encoder = encoder
        self._draws = any(each.draws for each in encoders)
        self._all_native = all_native
        if hierarchical is None:
            hierarchical = context.topology.nodes > 1
        if device_of(flat) is None:
            once_a_node(context, lambda: _warm_up(encoders, flat.dtype), "plan_allreduce")
        self._route = self._make_route(hierarchical, shapes)
        self._runs = np.zeros(1, np.int64)
        # What is handed to this rank as residual of values that are in others' exchange waits to be added.
        self._to_add: Array | None = None
        self._parts += (self._route,)
        self.owned = self._route.owned
        how = f"{context.size} ranks exchange directly"
        if isinstance(self._route, NodeRoute):
            self.algorithm, how = self._route.algorithm, "all ranks are on one node, whose sum is exact"
        elif hierarchical:
            how = f"{context.topology.nodes} nodes exchange their exact sums"
        self.why = f"{encoder} was asked for; {how}"
        self._run_natively(self._route.operation)

    def _make_route(self, hierarchical: bool, shapes: Sequence[Shape]) -> Route:
        context, flat, channel = self.context, self._flat, channel_of(self.number)

        def make(comm: MPI.Intracomm, like: Array, first: int) -> OwnerExchange:
            context.queue.meets(comm)
            layout = lay_out(self._encoder, shapes, comm.Get_size(), first, first + like.size)
            return exchange_for(like, self._all_native)(comm, like, layout, channel)

        if not hierarchical or context.size == 1 or context.topology.nodes == context.size:
            return FlatRoute(context, flat, make)
        if context.topology.nodes == 1:
            return NodeRoute(context, flat, self.number, self._run.kind)
        lanes = None
        if context.shared is not None and device_of(flat) is None and self._all_native:
            lanes = make_lane_route(context, flat, self._run.kind, make)
        return LeaderRoute(context, flat, self.number, make) if lanes is None else lanes

    @property
    def expected_nbytes(self) -> float:
        """The payload bytes that a run may be expected to send from this rank to others."""
        exchange = self._route.exchange
        return self._route.nbytes_sent + (0 if exchange is None else exchange.expected_nbytes)

    def _finite(self) -> bool:
        return all_finite(self._flat)

    def _prepare_exchange(self) -> bool:
        route = self._route
        if self._to_add is not None or route.operation is None:
            return False
        if route.exchange is not None:
            route.exchange.runs = int(self._runs[0]) + 1
        route.prepare()
        return True

    def _exchanged(self) -> RunStats | None:
        self._route.note()
        return self._count_run()

    def _compressed_steps(self, progress: Progress) -> Generator[None, None, RunStats | None]:
        if self._to_add is not None and not add_owed(self._flat, self._to_add):
            self._to_add = None
        exchange = self._route.exchange
        if exchange is not None:
            exchange.runs = int(self._runs[0]) + 1
        yield from self._route.steps(progress)
        return self._count_run()

    def _count_run(self) -> RunStats | None:
        exchange, nbytes = self._route.exchange, self._route.nbytes_sent
        self._runs[0] += 1
        stats = RunStats() if exchange is None else exchange.stats
        stats.bytes_sent += nbytes
        self.bytes_sent += stats.bytes_sent
        return None if isinstance(self._route, NodeRoute) else stats

    def _carried(self, outside: bool) -> dict[str, Array]:
        exchange, arrays = self._route.exchange, {"runs": self._runs}
        if exchange is not None and (outside or not exchange.keeps):
            arrays |= {"residual": exchange.residual, "owner_residual": exchange.owner_residual}
        if self._to_add is not None:
            arrays["to_add"] = self._to_add
        return arrays

    def _forget(self) -> None:
        super()._forget()
        if self._route.exchange is not None:
            self._route.exchange.forget()

    def undo(self) -> None:
        """See Plan."""
        super().undo()
        if self._route.exchange is not None:  # what it kept is older than what was copied since
            self._route.exchange.bring_back()

    def _owed(self) -> list[tuple[Array, Array]]:
        owed = [] if self._to_add is None else [(self._flat, self._to_add)]
        exchange = self._route.exchange
        if exchange is not None:
            for (first, last), residual in (
                (self._route.extent, exchange.residual),
                (self.owned, exchange.owner_residual),
            ):
                owed.append((self._flat[first:last], residual))
        return owed

    def state_dict(self) -> dict[str, Array]:
        """``residual``, one for each value, and ``owner_residual``, one for each value that this rank owns.

        1-D arrays in x's memory, float32 (float64 for float64 values). The plan's own, but for ``hierarchical``, where
        ``residual`` is a copy: each rank has one for its lane of the values, and zeros elsewhere. For an encoder that
        draws, also ``runs``, how many there were, on which its seeds depend: one int64 in host memory.
        """
        return {**self._residuals(), "runs": self._runs} if self._draws else self._residuals()

    def _residuals(self) -> dict[str, Array]:
        exchange, (first, last), n = self._route.exchange, self._route.extent, self._flat.size
        if exchange is not None and (first, last) == (0, n):
            return {"residual": exchange.residual, "owner_residual": exchange.owner_residual}
        zeros = xp_of(self._flat).zeros
        exact = residual_dtype(self._flat.dtype)
        residual = zeros(n, exact) if self._to_add is None else self._to_add.copy()
        if exchange is None:
            return {"residual": residual, "owner_residual": zeros(0, exact)}
        residual[first:last] = exchange.residual
        return {"residual": residual, "owner_residual": exchange.owner_residual}

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """See WatchedPlan."""
        mine = self._copy_in(state)
        exchange, (first, last) = self._route.exchange, self._route.extent
        if exchange is not None and exchange.residual is not mine["residual"]:
            exchange.residual[...] = mine["residual"][first:last]
        if exchange is None or exchange.residual is not mine["residual"]:
            mine["residual"][first:last] = 0
            self._to_add = mine["residual"]


def _warm_up(encoders: Iterable[Encoder], dtype: Any) -> None:
    for encoder in encoders:
        for each in (dtype, residual_dtype(dtype)):
            encoder.warm_up(each)
