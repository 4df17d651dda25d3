"""``bitring.allreduce``: one call on one array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import Array, as_array, device_of, flat_view, require_numeric, xp_of
from bitring.collectives.call import operation, read_call
from bitring.collectives.call_run import CallRun
from bitring.collectives.calls import fast_path_of, remember
from bitring.collectives.execution.native import DECLINED, DONE, REFUSED
from bitring.collectives.interop.operators import op_name, require_op
from bitring.collectives.plan import array_terms
from bitring.collectives.runtime.context import KeepsDirect, context_of, given_comm
from bitring.settings import checked


def allreduce(
    x: Any,
    out: Any = None,
    *,
    op: MPI.Op = MPI.SUM,
    comm: MPI.Intracomm | None = None,
    algorithm: str = "auto",
    mean: bool = False,
) -> Array:
    """Reduce ``x`` over all ranks; every rank gets the same bits.

    ``x``: a NumPy or CuPy array, or anything that offers DLPack, ``__cuda_array_interface__`` or the buffer protocol,
    of any shape and numeric dtype, identical on all ranks; any strides and either byte order. NumPy's subclasses are
    taken for their plain data. Returns a new array of x's shape and dtype, in C order and the machine's byte order, in
    x's memory; or ``out``, a contiguous writable array like x, in one memory order on all ranks, which may be ``x``
    itself: then the sum is made in place. NaN and Inf are passed on, as MPI does. ``comm``: MPI.COMM_WORLD by default.
    ``algorithm``: a registered name, or ``"auto"``.

    ``mean``: the sum divided by the number of ranks, for float and complex dtypes and ``op=MPI.SUM``. 16-bit floats are
    added and divided in float32 and rounded once, so that a float16 mean neither over- nor underflows on the way.

    Raises on all ranks: MismatchError where ranks differ in dtype, count, shape, op, mean or algorithm. A rank's bad
    arguments raise TypeError or ValueError there, and PeerError on the others.
    """
    kept: object = comm
    fast_path, outcome = None, DECLINED
    if isinstance(algorithm, str) and algorithm == "auto" and mean is False:
        fast_path = kept.direct if isinstance(kept, KeepsDirect) else None
        if fast_path is None:
            fast_path = context_of(given_comm(comm, "allreduce")).direct
    if fast_path is not None:
        result = np.empty(x.shape, x.dtype) if out is None and type(x) is np.ndarray else out
        try:
            outcome = fast_path.reduce(x, result, op)
        except BaseException as error:  # an interrupt: others may be in the run
            context_of(given_comm(comm, "allreduce")).queue.cut_short("allreduce", error, (x, result))
            raise
        if outcome == DONE:
            return result
        if outcome != DECLINED:
            out = result
    return _allreduce(x, out, op, comm, algorithm, mean, fast_path, outcome)


def allreduce_together(
    x: Array, shapes: list[tuple[int, ...]], *, op: MPI.Op, comm: MPI.Intracomm, algorithm: str, mean: bool
) -> None:
    """As ``allreduce(x, x)`` of arrays that lie one after the other in ``x``, 1-D; all ranks must have these shapes."""
    _allreduce(x, x, op, comm, algorithm, mean, shapes=shapes)


def _allreduce(
    x: Any,
    out: Any,
    op: MPI.Op,
    comm: MPI.Intracomm | None,
    algorithm: str,
    mean: bool,
    fast_path: Any = None,
    outcome: Any = DECLINED,
    shapes: list[tuple[int, ...]] | None = None,
) -> Array:
    """``outcome``: of the ``fast_path``, where it was tried."""
    context = context_of(given_comm(comm, "allreduce"))
    reduction = _Reduction()

    def library(comm: MPI.Intracomm, send: Any, receive: Any) -> MPI.Request:
        return comm.Iallreduce(send, receive, op)

    with context.turn("allreduce", continues=outcome != DECLINED):
        if outcome == REFUSED:
            return out
        call = read_call("allreduce", "allreduce", algorithm, lambda: reduction.read(x, out, op, mean, shapes))
        context.prepare("allreduce", call.request.error)
        if fast_path is None:
            context.direct = fast_path_of(context)
            kept: object = comm
            if isinstance(kept, KeepsDirect):
                kept.direct = context.direct
        arrival = None if fast_path is None or outcome == DECLINED else fast_path.operation
        run = CallRun(context, call)
        run.now(library, arrival)
        known = algorithm == "auto" and not mean and shapes is None
        if context.direct is not None and known and call.work is not None:
            remember(context.direct, context, call, run, reduction.result)
    if mean:
        reduction.divide(context.size)
    return reduction.result


class _Reduction:
    """``result`` is what the caller gets; ``total`` the array in which the sum is made: the same, or a wider one."""

    result: Array
    total: Array
    work: Array  # the values of ``total``

    def read(self, x: Any, out: Any, op: MPI.Op, mean: bool, shapes: list[tuple[int, ...]] | None) -> dict[str, Any]:
        """Check the arguments; the fields of the call."""
        require_op(op, "allreduce")
        array = as_array(x, "allreduce", "x")
        dtype = array.dtype.newbyteorder("=")
        require_numeric(dtype, "allreduce", "x")
        if out is None:
            self.result = xp_of(array).empty(array.shape, dtype)
        else:
            self.result = as_array(out, "allreduce", "out")
            require_numeric(self.result.dtype, "allreduce", "out")
        if self.result.shape != array.shape or self.result.dtype != dtype:
            raise ValueError(
                f"allreduce: out must be like x, shape {tuple(array.shape)} of {dtype}; "
                f"got shape {tuple(self.result.shape)} of {self.result.dtype}"
            )
        if device_of(self.result) is not device_of(array):
            raise ValueError("allreduce: out must be in the same memory as x; one is on a device")
        self.total, self.work = self.result, flat_view(self.result, "allreduce", "out", writable=True)
        check_mean(mean, op, dtype)
        if mean and dtype.itemsize == 2:
            self.total = xp_of(array).empty(array.shape, np.float32)
            self.work = self.total.reshape(-1)

        def copy() -> None:
            self.total[...] = array

        def plain(before: Callable[[], None]) -> tuple[Any, Any]:
            before()
            return MPI.IN_PLACE, self.work

        before = copy if out is not x or self.total is not self.result else None
        return {
            "work": self.work,
            "before": before,
            "plain": plain,
            **operation(op, self.work, "allreduce"),
            "terms": {
                **array_terms(self.result),
                **({} if shapes is None else {"shapes": shapes}),
                "op": op_name(op),
                "mean": mean,
            },
        }

    def divide(self, size: int) -> None:
        """Make the mean of the sum over ``size`` ranks."""
        with np.errstate(all="ignore"):  # NaN and Inf are passed on
            self.total /= size
            if self.total is not self.result:
                self.result[...] = self.total


def check_mean(mean: object, op: MPI.Op, dtype: np.dtype[Any]) -> None:
    """Raise TypeError or ValueError where ``mean`` is no bool, or there is no mean of such an operation or dtype."""
    checked("allreduce", "mean", mean, bool)
    if mean and op_name(op) != "SUM":
        raise ValueError(f"allreduce: mean=True is for op=MPI.SUM; got {op_name(op)}")
    if mean and dtype.kind in "iub":
        raise TypeError(f"allreduce: mean=True is for float and complex values; got {dtype}; take x.astype(float)")
