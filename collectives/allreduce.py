"""``bitring.allreduce``: one call on one array."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from bitring.collectives.arrays import Array, as_array, device_of, flat_view, xp_of
from bitring.collectives.buffers import is_numeric
from bitring.collectives.calls import Call, set_operation
from bitring.collectives.operators import op_name
from bitring.collectives.state import given_comm, state_of


def allreduce(
    x: Any, out: Any = None, *, op: MPI.Op = MPI.SUM, comm: MPI.Intracomm | None = None, algorithm: str = "auto"
) -> Array:
    """Reduce ``x`` over all ranks; every rank gets the same bits.

    ``x``: a NumPy or CuPy array, or anything that offers DLPack, ``__cuda_array_interface__`` or the buffer protocol,
    of any shape and numeric dtype, alike on all ranks. Returns a new array of x's shape and dtype in x's memory, or
    ``out``, a contiguous writable array like x, which may be ``x`` itself: then the sum is made in place. NaN and Inf
    are passed on, as MPI does. ``comm``: MPI.COMM_WORLD by default. ``algorithm``: a registered name, or ``"auto"``.

    Raises on all ranks alike: MismatchError where ranks differ in dtype, count, op or algorithm, and what is wrong
    with one rank's arguments (TypeError, ValueError; PeerError on the others).
    """
    state = state_of(given_comm(comm, "allreduce"))
    state.prepare("allreduce")
    results: list[tuple[Array, Array]] = []

    def read(call: Call) -> None:
        array = as_array(x, "allreduce", "x")
        if not is_numeric(array.dtype):
            raise TypeError(f"allreduce: x must have a numeric dtype; got {array.dtype}")
        result = xp_of(array).empty(array.shape, array.dtype) if out is None else as_array(out, "allreduce", "out")
        if result.shape != array.shape or result.dtype != array.dtype:
            raise ValueError(
                f"allreduce: out must be like x, shape {tuple(array.shape)} of {array.dtype}; "
                f"got shape {tuple(result.shape)} of {result.dtype}"
            )
        if device_of(result) is not device_of(array):
            raise ValueError("allreduce: out must be in the same memory as x; one is on a device")
        flat = flat_view(result, "allreduce", "out", writable=True)
        if out is not x:

            def copy() -> None:
                result[...] = array

            call.before = copy
        set_operation(call, op, flat)
        call.terms(flat, dtype=flat.dtype, count=flat.size, op=op_name(op))
        results.append((result, flat))

    call = Call("allreduce", "allreduce", algorithm).read(read)

    def library(comm: MPI.Intracomm) -> MPI.Request:
        if call.before is not None:
            call.before()
        return comm.Iallreduce(MPI.IN_PLACE, results[0][1], op)

    call.run_now(state, library)
    return results[0][0]
