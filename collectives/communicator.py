"""``Communicator``: mpi4py's Intracomm whose AllReduce and related calls run bitring's algorithms."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from typing_extensions import Self

from bitring.arrays import require_native
from bitring.collectives.base_plan import RUN
from bitring.collectives.call import Call
from bitring.collectives.call_run import CallRun
from bitring.collectives.calls import (
    allgather_call,
    allreduce_call,
    bcast_call,
    fast_path_of,
    know,
    reduce_call,
    reduce_scatter_block_call,
)
from bitring.collectives.execution.native import DECLINED, DONE, REFUSED
from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.plan import ExactPlan, run_agreement
from bitring.collectives.requests import GeneralRequest, PersistentRequest
from bitring.collectives.runtime.agreement import Request, agree
from bitring.collectives.runtime.context import Context, KeepsDirect, check_alive, context_of, finish_making
from bitring.collectives.runtime.objects import agreed_job
from bitring.collectives.selection.selection import check_name
from bitring.errors import uncopyable
from bitring.native import extension, native


def _shape(given: Any) -> tuple[int, ...]:
    """A shape as NumPy takes it: a whole number or several. Raises ValueError."""
    wrong = f"empty: shape must be made of whole numbers from 0 on, of a product below 2^63; got {given!r}"
    try:
        shape = tuple(map(operator.index, given if isinstance(given, Iterable) else (given,)))
    except TypeError:
        raise ValueError(wrong) from None
    if min(shape, default=0) < 0 or math.prod(shape) > sys.maxsize:
        raise ValueError(wrong)
    return shape


def _dtype(given: Any) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(given)
        return dtype
    except Exception as error:  # NumPy has several
        raise TypeError(f"empty: dtype must be what numpy.dtype takes; got {given!r}: {error}") from None


def _nbytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    require_native(dtype, "empty", "dtype")
    if dtype.hasobject or dtype.subdtype is not None or not dtype.itemsize:
        raise TypeError(f"empty: dtype must be of plain values; got {dtype}")
    return math.prod(shape) * dtype.itemsize


def _require(given: object, kind: type, function: str, argument: str) -> None:
    if not isinstance(given, kind):
        raise TypeError(f"{function}: {argument} must be an MPI.{kind.__name__}; got {type(given).__name__}")


def _require_ints(function: str, **given: Any) -> None:
    for argument, value in given.items():
        try:
            fits = not isinstance(value, (str, bytes)) and -(1 << 31) <= int(value) < 1 << 31
        except (TypeError, ValueError, OverflowError):
            fits = False
        if not fits:
            raise TypeError(f"{function}: {argument} must be an int of 32 bits; got {value!r}")


class Communicator(MPI.Intracomm, KeepsDirect):
    """A drop-in for ``MPI.Intracomm``: the same communicator, with bitring's collectives.

    ``Communicator(comm)`` wraps ``comm`` without duplicating it; ``Dup``, ``Split`` and ``Create`` return
    Communicators with the same ``algorithm``. Allreduce, Iallreduce, Allreduce_init, Reduce, Reduce_scatter_block,
    Allgather, Iallgather and Bcast are bitring's; all else is mpi4py's own. What bitring does not serve (operations
    made by ``MPI.Op.Create``, derived datatypes) goes to the MPI library, on all ranks alike.

    All ranks must make these calls alike: where they differ in dtype, count, operation, root or algorithm, or where
    one rank's arguments are bad, every rank raises (MismatchError, PeerError) and none hangs. So it is with Dup, Clone,
    Split, Split_type and Create.
    """

    _algorithm = "auto"
    _fast_path: Any = None  # the native way of Allreduce, when there is one

    def __new__(cls, comm: MPI.Comm | None = None, algorithm: str = "auto") -> Self:
        """Raise ValueError for an unknown algorithm, TypeError for anything but an intracommunicator."""
        if comm is not None and not isinstance(comm, MPI.Intracomm):
            raise TypeError(f"Communicator: comm must be an MPI.Intracomm; got {type(comm).__name__}")
        check_name(algorithm, "Communicator")
        self = super().__new__(cls, comm)
        self._algorithm = algorithm
        return self

    def __init__(self, comm: MPI.Comm | None = None, algorithm: str = "auto") -> None:
        pass

    def __reduce__(self) -> Any:
        raise uncopyable(self, "Dup() makes another one; make it anew in another process")

    @property
    def algorithm(self) -> str:
        """The algorithm asked for: a registered name, or ``"auto"``."""
        return self._algorithm

    def _derived(self, comm: MPI.Comm) -> Any:
        return type(self)(comm, self._algorithm) if isinstance(comm, MPI.Intracomm) else comm

    def _made(self, function: str, make: Callable[[], MPI.Comm], check: Callable[[], object] = lambda: None) -> Any:
        """Return the Communicator of ``make``, a blocking call of the library's, made once all ranks have come to it.

        ``check`` raises where this rank's arguments are bad; the other ranks then raise PeerError.
        """
        check_alive(self, function)
        request = Request(function)
        try:
            check()
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            request.error = error
        context = context_of(self)
        with context.turn(function):
            if context.size > 1:
                context.queue.call(lambda progress: agree(context.comm, context.roll_call, request, progress), function)
            elif request.error is not None:
                raise request.error
            return self._derived(make())

    def Free(self) -> None:
        """As mpi4py's. What is under way ends with an error that says so.

        Raises MismatchError, and frees all the same, where earlier calls of Bcast or Reduce were not the same on all
        ranks and this one had gone on.
        """
        try:
            finish_making(self)
        finally:
            super().Free()

    def Disconnect(self) -> None:
        """As mpi4py's; see ``Free``."""
        try:
            finish_making(self)
        finally:
            super().Disconnect()

    def Dup(self, info: MPI.Info | None = None) -> Self:
        """As mpi4py's; returns a Communicator."""

        def check() -> None:
            if info is not None:
                _require(info, MPI.Info, "Dup", "info")

        made: Self = self._made("Dup", lambda: super(Communicator, self).Dup(info), check)
        return made

    def Clone(self) -> Self:
        """As mpi4py's; returns a Communicator."""
        made: Self = self._made("Clone", super().Clone)
        return made

    def Split(self, color: int = 0, key: int = 0) -> Self:
        """As mpi4py's; returns a Communicator."""

        def check() -> None:
            _require_ints("Split", color=color, key=key)
            if color < 0 and color != MPI.UNDEFINED:
                raise ValueError(f"Split: color must be at least 0, or MPI.UNDEFINED; got {color}")

        made: Self = self._made("Split", lambda: super(Communicator, self).Split(color, key), check)
        return made

    def Split_type(self, split_type: int, key: int = 0, info: MPI.Info = MPI.INFO_NULL) -> Self:
        """As mpi4py's; returns a Communicator."""

        def check() -> None:
            _require_ints("Split_type", split_type=split_type, key=key)
            _require(info, MPI.Info, "Split_type", "info")

        made: Self = self._made(
            "Split_type", lambda: super(Communicator, self).Split_type(split_type, key, info), check
        )
        return made

    def Create(self, group: MPI.Group) -> Self:
        """As mpi4py's; returns a Communicator."""
        made: Self = self._made(
            "Create",
            lambda: super(Communicator, self).Create(group),
            lambda: _require(group, MPI.Group, "Create", "group"),
        )
        return made

    def Create_group(self, group: MPI.Group, tag: int = 0) -> Self:
        """As mpi4py's; returns a Communicator."""
        derived: Self = self._derived(super().Create_group(group, tag))
        return derived

    def empty(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Any:
        """A new NumPy array in memory that the ranks of this node share, so that they reduce it in place. Collective.

        ``shape`` and ``dtype`` must be identical on all ranks. Each rank gets an array of its own, whose values are
        undefined. Where no memory can be shared it is an ordinary array, and the log says why.
        Raises TypeError or ValueError for what NumPy cannot make an array of, MismatchError where ranks differ.
        """
        request = Request("empty")
        nbytes = 0
        try:
            shape = _shape(shape)
            dtype = _dtype(dtype)
            nbytes = _nbytes(shape, dtype)
            request.terms = {"shape": shape, "dtype": dtype}
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            request.error = error
        context = context_of(self)
        with context.turn("empty"):
            run_agreement(context, request)
            if context.shared is not None:
                shared, node = context.shared, context.node.comm
                part = agreed_job(context, lambda progress: shared.new_part(node, nbytes, progress), "empty")
                if part is not None:
                    return np.asarray(part)[:nbytes].view(dtype).reshape(shape)
        return np.empty(shape, dtype)

    def Allreduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        """Reduce over all ranks; every rank gets the same bits in ``recvbuf``."""
        fast_path, outcome = self._fast_path, DECLINED
        if fast_path is not None:
            try:
                outcome = fast_path.allreduce(sendbuf, recvbuf, op)
            except BaseException as error:  # an interrupt: others may be in the run
                context_of(self).queue.cut_short("Allreduce", error, (sendbuf, recvbuf))
                raise
            if outcome == DONE:
                return
        context = context_of(self)
        with context.turn("Allreduce", continues=outcome != DECLINED):
            if outcome == REFUSED:
                return
            call = allreduce_call(context, "Allreduce", sendbuf, recvbuf, op, self._algorithm)
            context.prepare("Allreduce", call.request.error)
            if fast_path is None and self._algorithm == "auto":
                self._fast_path = fast_path_of(context)
            arrival = None if fast_path is None or outcome == DECLINED else fast_path.operation
            run = CallRun(context, call)
            run.now(lambda comm, send, receive: comm.Iallreduce(send, receive, op), arrival)
            if self._fast_path is not None:
                know(self._fast_path, context, call, run)

    def Iallreduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> MPI.Request:
        """Begin an Allreduce; the request works in any mixed Waitall. Errors are raised by its Wait or Test."""
        context = context_of(self)
        with context.turn("Iallreduce"):
            call = allreduce_call(context, "Iallreduce", sendbuf, recvbuf, op, self._algorithm)

            def steps(progress: Progress) -> Steps:
                return CallRun(context, call).whole(
                    lambda comm, send, receive: comm.Iallreduce(send, receive, op), progress
                )

            return GeneralRequest(context, steps, "Iallreduce")

    def Allreduce_init(
        self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, info: MPI.Info = MPI.INFO_NULL
    ) -> MPI.Prequest:
        """A persistent Allreduce: ``Start`` begins it; Wait, Test and any mixed Waitall complete it.

        Start each request by itself: ``MPI.Prequest.Startall`` refuses it.
        """
        context = context_of(self)
        with context.turn("Allreduce_init"):
            call = allreduce_call(context, "Allreduce_init", sendbuf, recvbuf, op, self._algorithm)
            context.prepare("Allreduce_init", call.request.error)
            settled = CallRun(context, call)
            context.queue.call(settled.settle, "Allreduce_init")
            if call.work is not None and settled.choice is not None:
                plan = ExactPlan(context, call.work, op, settled.choice)

                def run_of_plan(progress: Progress) -> Steps:
                    if call.before is not None:
                        call.before()
                    yield from plan.checked_steps(progress)

                return PersistentRequest(context, run_of_plan, "Allreduce_init", plan)
            run = Request(RUN, {"request": context.new_plan()})

        def steps(progress: Progress) -> Steps:
            if context.size > 1:
                yield from agree(context.comm, context.roll_call, run, progress)
            yield from settled.library_steps(lambda comm, send, receive: comm.Iallreduce(send, receive, op), progress)

        return PersistentRequest(context, steps, "Allreduce_init")

    def Reduce(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM, root: int = 0) -> None:
        """Reduce over all ranks into ``recvbuf`` of rank ``root``."""
        self._run(_REDUCE, sendbuf, recvbuf, op, root)

    def Reduce_scatter_block(self, sendbuf: Any, recvbuf: Any, op: MPI.Op = MPI.SUM) -> None:
        """Reduce over all ranks; rank r gets block r."""
        self._run(_REDUCE_SCATTER_BLOCK, sendbuf, recvbuf, op, 0)

    def Allgather(self, sendbuf: Any, recvbuf: Any) -> None:
        """Gather every rank's ``sendbuf`` in ``recvbuf`` of every rank, in rank order."""
        self._run(_ALLGATHER, sendbuf, recvbuf, None, 0)

    def Iallgather(self, sendbuf: Any, recvbuf: Any) -> MPI.Request:
        """Begin an Allgather; see ``Iallreduce``."""
        context = context_of(self)
        with context.turn("Iallgather"):
            call = allgather_call(context, "Iallgather", sendbuf, recvbuf, self._algorithm)

            def steps(progress: Progress) -> Steps:
                return CallRun(context, call).whole(
                    lambda comm, send, receive: comm.Iallgather(send, receive), progress
                )

            return GeneralRequest(context, steps, "Iallgather")

    def Bcast(self, buf: Any, root: int = 0) -> None:
        """Copy rank ``root``'s ``buf`` to every rank's."""
        self._run(_BCAST, None, buf, None, root)

    def _run(self, kind: _Kind, sendbuf: Any, recvbuf: Any, op: MPI.Op | None, root: int) -> None:
        fast_path, outcome = self._fast_path, DECLINED
        if fast_path is not None:
            try:
                outcome = fast_path.call(kind.collective, sendbuf, recvbuf, op, root)
            except BaseException as error:  # an interrupt: others may be in the run
                context_of(self).queue.cut_short(kind.function, error, (sendbuf, recvbuf))
                raise
            if outcome == DONE:
                return
        context = context_of(self)
        with context.turn(kind.function, continues=outcome != DECLINED):
            if outcome == REFUSED:
                return
            call = kind.read(context, sendbuf, recvbuf, op, root, self._algorithm)
            context.prepare(kind.function, call.request.error)
            if fast_path is None and self._algorithm == "auto":
                self._fast_path = fast_path_of(context)
            arrival = None if fast_path is None or outcome == DECLINED else fast_path.operation
            run = CallRun(context, call)
            run.now(lambda comm, send, receive: kind.library(comm, send, receive, op, root), arrival)
            if self._fast_path is not None:
                know(self._fast_path, context, call, run)


class _Kind(NamedTuple):
    """A call that has a fast path once it was made: how its arguments are read, and the library's own."""

    function: str
    collective: Any  # as the native engine names it
    read: Callable[[Context, Any, Any, Any, Any, str], Call]
    library: Callable[[MPI.Intracomm, Any, Any, Any, int], MPI.Request]


def _native(collective: str) -> Any:
    return None if native() is None else extension.Collective[collective]


_REDUCE = _Kind(
    "Reduce",
    _native("reduce"),
    reduce_call,
    lambda comm, send, receive, op, root: comm.Ireduce(send, receive, op, root),
)
_REDUCE_SCATTER_BLOCK = _Kind(
    "Reduce_scatter_block",
    _native("reduce_scatter"),
    lambda context, send, receive, op, root, algorithm: reduce_scatter_block_call(
        context, send, receive, op, algorithm
    ),
    lambda comm, send, receive, op, root: comm.Ireduce_scatter_block(send, receive, op),
)
_ALLGATHER = _Kind(
    "Allgather",
    _native("allgather"),
    lambda context, send, receive, op, root, algorithm: allgather_call(context, "Allgather", send, receive, algorithm),
    lambda comm, send, receive, op, root: comm.Iallgather(send, receive),
)
_BCAST = _Kind(
    "Bcast",
    _native("broadcast"),
    lambda context, send, receive, op, root, algorithm: bcast_call(context, receive, root, algorithm),
    lambda comm, send, receive, op, root: comm.Ibcast(receive, root),
)
