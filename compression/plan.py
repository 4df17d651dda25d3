"""``plan_allreduce``: an AllReduce bound to a buffer, exact or compressed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.collectives.agreement import Request, wait_for
from bitring.collectives.arrays import BFLOAT16, Array, all_finite, device_of, xp_of
from bitring.collectives.errors import NonFiniteError
from bitring.collectives.executor import Progress, Steps
from bitring.collectives.operators import op_name
from bitring.collectives.plan import Plan, checked_flat, memory_name, plan_exact, run_agreement
from bitring.collectives.runner import make_runner
from bitring.collectives.selection import check_name
from bitring.collectives.state import State, state_of
from bitring.collectives.transport import channel_of
from bitring.compression.compressor import Compressor
from bitring.compression.encoder import Encoder, compressors, residual_dtype
from bitring.compression.owner_exchange import OwnerExchange
from bitring.compression.reduced_plan import plan_reduced, reducer_of


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

    ``x``: a contiguous NumPy or CuPy array, or anything that shares its memory through DLPack, of the same size and
    dtype on every rank. ``comm``: MPI.COMM_WORLD by default. ``algorithm``: a registered name, or ``"auto"``.

    ``compression``: None is exact; a registered name or an encoder such as ``OneBit(block=512)`` sends encoded sums
    of float16, bfloat16, float32 or float64 values with error feedback (Seide et al., 2014): what an encoding leaves
    out is added to the next run's values. ``boundaries``: the positions in ``x`` where a new parameter begins; no
    block of values that share levels spans two. ``hierarchical``: ranks of a node first sum exactly, and only nodes
    exchange encoded sums; by default where there is more than one node.

    A reducer such as ``PowerSGD(matrix_rank=4)`` sums its own small representation exactly instead, with nodes summed
    first in any case. ``shapes``: the parameters' shapes, for reducers that look at matrices; without it x is one
    parameter of one dimension. ``check_finite=False`` leaves out the look
    for NaN and Inf, for callers that have looked on all ranks.

    Raises on all ranks alike: MismatchError where ranks differ in dtype, count, op, algorithm or compression, and
    what is wrong with one rank's arguments (PeerError on the others). A compressed run raises NonFiniteError on all
    ranks when a value is NaN or Inf on any; nothing has changed then.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    if compression is None:
        return plan_exact(x, comm, op, algorithm)
    reducer = reducer_of(compression)
    if reducer is not None:
        return plan_reduced(x, comm, op, algorithm, reducer, hierarchical, boundaries, shapes, check_finite)
    state = state_of(comm)
    request = Request("plan_allreduce")
    flat: Array = np.empty(0, np.float32)
    encoder: Encoder | None = None
    try:
        flat = checked_flat(x, "plan_allreduce")
        check_name(algorithm)
        made = compressors.get(compression)() if isinstance(compression, str) else compression
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
        request.terms = {
            "dtype": flat.dtype,
            "count": flat.size,
            "op": op_name(op),
            "algorithm": algorithm,
            "compression": encoder,
            "hierarchical": hierarchical,
            "boundaries": tuple(boundaries),
            "memory": memory_name(flat),
        }
    except (TypeError, ValueError) as error:
        request.error = error
    run_agreement(state, request)
    assert encoder is not None
    return CompressedPlan(state, flat, encoder, hierarchical, tuple(boundaries), check_finite)


_COMPRESSED_DTYPES = ("float16", BFLOAT16.name, "float32", "float64")


class CompressedPlan(Plan):
    """A sum of ``flat`` by the owner exchange; with ``hierarchical`` of the nodes' exact sums, between their leaders.

    ``owned``: the values whose sum this rank encodes, from the first index to before the second.
    """

    algorithm = "owner exchange"

    def __init__(
        self,
        state: State,
        flat: Array,
        encoder: Encoder,
        hierarchical: bool | None,
        boundaries: tuple[int, ...],
        check_finite: bool,
    ) -> None:
        super().__init__(state, f"allreduce of {flat.size} {flat.dtype} values, compressed by {encoder}")
        self._flat = flat
        self._check_finite = check_finite
        self._exchange: OwnerExchange | None = None
        self._node: _Node | None = None
        if hierarchical is None:
            hierarchical = state.topology.nodes > 1
        comm = state.comm
        _compile_once_a_node(encoder, flat, state.node.comm)
        if hierarchical:
            self._node = _Node(state, flat, self.number)
            comm = state.leaders
        if comm != MPI.COMM_NULL:
            self._exchange = OwnerExchange(comm, flat, encoder, boundaries, channel_of(self.number))
        # A rank that is no leader keeps what is handed to it as residual until it can add it to its node's sum.
        self._to_add: Array | None = None
        self.owned = (0, 0) if self._exchange is None else self._exchange.owned
        self.why = f"{encoder} was asked for; " + (
            f"{state.topology.nodes} nodes exchange their exact sums"
            if hierarchical
            else f"{state.size} ranks exchange directly"
        )

    def _steps(self, progress: Progress) -> Steps:
        if self.state.size == 1:
            return
        if self._check_finite:
            yield from self._raise_non_finite(progress)
        if self._node is not None:
            if self._to_add is not None:
                self._flat += self._to_add.astype(self._flat.dtype)
                self._to_add = None
            yield from self._node.reduce.steps(progress)
        if self._exchange is not None:
            yield from self._exchange.steps(progress)
            self.bytes_sent += self._exchange.nbytes_sent
        if self._node is not None:
            yield from self._node.broadcast.steps(progress)
            self.bytes_sent += self._node.nbytes_sent

    def _raise_non_finite(self, progress: Progress) -> Steps:
        """Raise on all ranks if any value is NaN or Inf on any, naming the lowest such rank."""
        comm = self.state.comm
        size, rank = self.state.size, self.state.rank
        mine = np.array(0 if all_finite(self._flat) else size - rank, np.int64)
        most = np.empty_like(mine)
        yield from wait_for(comm.Iallreduce(mine, most, MPI.MAX), progress)
        if most > 0:
            raise NonFiniteError(f"{self.what}: x holds NaN or Inf on rank {size - int(most)}; nothing was changed")

    def state_dict(self) -> dict[str, Array]:
        """``residual``, one for each value, and ``owner_residual``, one for each value that this rank owns.

        1-D arrays in x's memory, float32 (float64 for float64 values); the plan's own, not copies. With
        ``hierarchical`` a rank that is not its node's leader owns nothing and has residuals of zero.
        """
        if self._exchange is not None:
            return {"residual": self._exchange.residual, "owner_residual": self._exchange.owner_residual}
        return {"residual": self._waiting(), "owner_residual": self._waiting()[:0]}

    def _waiting(self) -> Array:
        if self._to_add is None:
            return xp_of(self._flat).zeros(self._flat.size, residual_dtype(self._flat.dtype))
        return self._to_add

    def load_state_dict(self, state: dict[str, Array]) -> None:
        """Copy ``residual`` and ``owner_residual`` in. Raises ValueError for other names, shapes or dtypes."""
        mine = self.state_dict()
        if sorted(state) != sorted(mine):
            raise ValueError(f"{self.what}: load_state_dict: state must hold {sorted(mine)}; got {sorted(state)}")
        for name, array in mine.items():
            if state[name].shape != array.shape or state[name].dtype != array.dtype:
                raise ValueError(
                    f"{self.what}: load_state_dict: {name} must have shape {array.shape} and dtype {array.dtype}; "
                    f"got {state[name].shape} and {state[name].dtype}"
                )
        for name, array in mine.items():
            _assign(array, state[name])
        if self._exchange is None:
            self._to_add = mine["residual"]

    def free(self) -> None:
        """See Plan."""
        super().free()
        if self._node is not None:
            self._node.close()


def _assign(array: Array, source: Array) -> None:
    """Copy, from host memory to a device, too."""
    if device_of(array) is not None and device_of(source) is None:
        array.set(source)
    else:
        array[...] = source


class _Node:
    """The exact sum of a node's ranks on its leader, and the way back."""

    def __init__(self, state: State, flat: Array, number: int) -> None:
        node = state.node
        self.reduce = make_runner(node, "reduce", "binomial_tree", flat, number=number)
        self.broadcast = make_runner(node, "broadcast", "binomial_tree", flat, number=number)
        self.nbytes_sent = self.reduce.nbytes_sent + self.broadcast.nbytes_sent

    def close(self) -> None:
        self.reduce.close()
        self.broadcast.close()


def _compile_once_a_node(encoder: Encoder, flat: Array, node: MPI.Intracomm) -> None:
    """Compile the encoder's kernels on one rank of the node; the others load what it cached."""
    for turn in (True, False):
        if turn == (node.Get_rank() == 0):
            encoder.warm_up(flat.dtype)
            encoder.warm_up(residual_dtype(flat.dtype))
        everyone = node.Ibarrier()
        while not everyone.Test():
            time.sleep(0.001)  # a library's own barrier would spin on the core that compiles
