"""Reading the arguments of ``Communicator.Allreduce`` and the other collectives into a ``Call``."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import NUMERIC_DTYPES, Array, bytes_of, device_of, xp_of
from bitring.collectives.call import Call, operation, read_call
from bitring.collectives.call_run import CallRun
from bitring.collectives.execution.library import MOST_VALUES, native_call
from bitring.collectives.execution.native import may_run_past_engine
from bitring.collectives.interop.buffers import Values, is_in_place, parse
from bitring.collectives.interop.opaque import Opaque, opaque
from bitring.collectives.interop.operators import REDUCTIONS, op_name, require_op, ufunc_name
from bitring.collectives.packed_call import packed_bcast
from bitring.collectives.plan import HOST
from bitring.collectives.runtime.agreement import Request, checked
from bitring.collectives.runtime.context import Context
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.selection.selection import fast_path_limits
from bitring.native import extension, operation_of, type_of

Copy = Callable[[], None]
Plain = Callable[[Copy], tuple[Any, Any]]


def _plain(send: Array, receive: Array) -> Plain:
    """``Call.plain``: in place where it is all the same array, or where the two overlap, which the library refuses."""

    def plain(before: Copy) -> tuple[Any, Any]:
        if send is not receive and not np.may_share_memory(send, receive):
            return send, receive
        before()
        return MPI.IN_PLACE, receive

    return plain


def _as_given(send: Array | None, receive: Array | None) -> Plain:
    """``Call.plain`` of a call that needs no copy."""

    def plain(before: Copy) -> tuple[Any, Any]:
        return send, receive

    return plain


def _copy_to(target: Array, source: Array) -> Copy:
    def copy() -> None:
        target[:] = source

    return copy


def _send_spec(sendbuf: Any, send: Values) -> Any:
    return sendbuf if is_in_place(sendbuf) else send.spec


def _order(function: str, send: Values | None, receive: Values | None) -> str:
    """The memory order of a call's values, identical on all ranks: C where no buffer has two longer axes."""
    sent, received = (values.order if values is not None else "" for values in (send, receive))
    if sent and received and sent != received:
        raise ValueError(f"{function}: sendbuf and recvbuf must have one memory order; got {sent} and {received} order")
    return sent or received or "C"


def _same(function: str, send: Array, receive: Array, blocks_sent: int = 1, blocks_received: int = 1) -> None:
    if send.dtype != receive.dtype or send.size * blocks_received != receive.size * blocks_sent:
        raise ValueError(
            f"{function}: recvbuf must have {send.size * blocks_received // blocks_sent} values of {send.dtype}, "
            f"as sendbuf asks; got {receive.size} of {receive.dtype}"
        )
    if device_of(send) is not device_of(receive):
        raise ValueError(f"{function}: sendbuf and recvbuf must be in the same memory; one is on a device")


def _reduced_terms(given: Opaque, blocks: int, op: MPI.Op, root: int | None = None) -> dict[str, object]:
    """What can be told of a reduction that only the library reads, in the words that others use."""
    count = None if given.values is None else given.values // blocks
    terms = {"dtype": given.dtype, "count": count, "order": "C", "op": op_name(op), "root": root}
    return {name: value for name, value in terms.items() if value is not None}


def _moved_terms(given: Opaque, blocks: int, root: int | None = None) -> dict[str, object]:
    """As ``_reduced_terms``, where bytes are moved."""
    nbytes = None if given.nbytes is None else given.nbytes // blocks
    terms = {"nbytes": nbytes, "order": "C", "root": root}
    return {name: value for name, value in terms.items() if value is not None}


def _same_arrays(function: str, sendbuf: Any, recvbuf: Any) -> None:
    """As ``_same``, for what only the library reads: it may crash on arrays of two dtypes without numbers."""
    sent, received = (getattr(buffer, "dtype", None) for buffer in (sendbuf, recvbuf))
    if sent is not None and received is not None and sent != received:
        raise ValueError(f"{function}: recvbuf must have values of {sent}, as sendbuf has; got {received}")


def allreduce_call(context: Context, function: str, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str) -> Call:
    """Allreduce(sendbuf, recvbuf): in place on ``recvbuf``."""

    def read() -> dict[str, Any]:
        receive = parse(recvbuf, function, "recvbuf", writable=True)
        send = receive if is_in_place(sendbuf) else parse(sendbuf, function, "sendbuf", writable=False)
        if receive is None or send is None:
            _same_arrays(function, sendbuf, recvbuf)
            require_op(op, function)
            terms = _reduced_terms(opaque(recvbuf, function, "recvbuf"), 1, op)
            return {"sendbuf": sendbuf, "recvbuf": recvbuf, "terms": terms}
        work, before = receive.flat, None
        if send is not receive:
            _same(function, send.flat, work)
            before = _copy_to(work, send.flat)
        order = _order(function, send, receive)
        return {
            "sendbuf": _send_spec(sendbuf, send),
            "recvbuf": receive.spec,
            "work": work,
            "before": before,
            "plain": _plain(send.flat, work),
            **operation(op, work, function),
            "terms": {"dtype": work.dtype, "count": work.size, "order": order, "op": op_name(op)},
        }

    return read_call(function, "allreduce", algorithm, read)


def reduce_call(context: Context, sendbuf: Any, recvbuf: Any, op: MPI.Op, root: int, algorithm: str) -> Call:
    """Reduce(sendbuf, recvbuf, root): in place on the root's ``recvbuf``, on a copy of ``sendbuf`` elsewhere."""

    def read() -> dict[str, Any]:
        require_root(root, context.size, "Reduce")
        at_root = context.rank == root
        if is_in_place(sendbuf) and not at_root:
            raise ValueError(f"Reduce: sendbuf may be MPI.IN_PLACE on rank {root}, the root, only")
        receive = parse(recvbuf, "Reduce", "recvbuf", writable=True) if at_root else None
        send = receive if is_in_place(sendbuf) else parse(sendbuf, "Reduce", "sendbuf", writable=False)
        if send is None or (at_root and receive is None):
            if at_root:
                _same_arrays("Reduce", sendbuf, recvbuf)
            require_op(op, "Reduce")
            given = recvbuf if is_in_place(sendbuf) else sendbuf
            terms = _reduced_terms(opaque(given, "Reduce", "sendbuf"), 1, op, int(root))
            return {"sendbuf": sendbuf, "recvbuf": recvbuf, "root": int(root), "terms": terms}
        given, before = send.flat, None
        work = xp_of(given).empty(given.size, given.dtype) if receive is None else receive.flat
        if work is not given:
            _same("Reduce", given, work)
            before = _copy_to(work, given)
        order = _order("Reduce", send, receive)
        reduced = operation(op, work, "Reduce")
        terms = {"dtype": work.dtype, "count": work.size, "order": order, "op": op_name(op), "root": int(root)}
        return {
            "sendbuf": _send_spec(sendbuf, send),
            "recvbuf": recvbuf if receive is None else receive.spec,
            "root": int(root),
            "work": work,
            "before": before,
            "plain": _as_given(given, None) if receive is None else _plain(given, work),
            **reduced,
            "terms": terms,
        }

    return read_call("Reduce", "reduce", algorithm, read)


def reduce_scatter_block_call(context: Context, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str) -> Call:
    """Reduce_scatter_block(sendbuf, recvbuf): on a copy of the ``size`` blocks, so that ``sendbuf`` stays as it is."""
    function, size, rank = "Reduce_scatter_block", context.size, context.rank

    def read() -> dict[str, Any]:
        in_place = is_in_place(sendbuf)
        receive = parse(recvbuf, function, "recvbuf", writable=True, blocks=size if in_place else 1)
        send = receive if in_place else parse(sendbuf, function, "sendbuf", writable=False, blocks=size)
        if receive is None or send is None:
            _same_arrays(function, sendbuf, recvbuf)
            require_op(op, function)
            blocks = size if in_place else 1
            terms = _reduced_terms(opaque(recvbuf, function, "recvbuf", blocks), blocks, op)
            return {"sendbuf": sendbuf, "recvbuf": recvbuf, "terms": terms}
        given = send.flat
        if given.size % size:
            raise ValueError(f"{function}: sendbuf must hold {size} equal blocks; got {given.size} values")
        block = given.size // size
        if send is not receive:
            _same(function, given, receive.flat, blocks_sent=size)
        work = xp_of(given).empty(given.size, given.dtype)

        def plain(before: Copy) -> tuple[Any, Any]:
            if send is receive:
                return MPI.IN_PLACE, given
            if np.may_share_memory(given, receive.flat):
                work[:] = given
                return work, receive.flat
            return given, receive.flat

        order = _order(function, send, receive)
        return {
            "sendbuf": _send_spec(sendbuf, send),
            "recvbuf": receive.spec,
            "work": work,
            "before": _copy_to(work, given),
            "after": _copy_to(receive.flat[:block], work[rank * block : (rank + 1) * block]),
            "plain": plain,
            **operation(op, work, function),
            "terms": {"dtype": work.dtype, "count": block, "order": order, "op": op_name(op)},
        }

    return read_call(function, "reduce_scatter", algorithm, read)


def allgather_call(context: Context, function: str, sendbuf: Any, recvbuf: Any, algorithm: str) -> Call:
    """Allgather(sendbuf, recvbuf): in place on ``recvbuf``, as bytes."""

    def read() -> dict[str, Any]:
        receive = parse(recvbuf, function, "recvbuf", writable=True, blocks=context.size)
        send = receive if is_in_place(sendbuf) else parse(sendbuf, function, "sendbuf", writable=False)
        if receive is None or send is None:
            _same_arrays(function, sendbuf, recvbuf)
            terms = _moved_terms(opaque(recvbuf, function, "recvbuf", context.size), context.size)
            return {"sendbuf": sendbuf, "recvbuf": recvbuf, "terms": terms}
        received, before = bytes_of(receive.flat), None
        sent = received if send is receive else bytes_of(send.flat)
        if received.size % context.size:
            raise ValueError(
                f"{function}: recvbuf must hold {context.size} equal blocks; got {receive.flat.size} values of "
                f"{receive.flat.dtype}"
            )
        block = received.size // context.size
        if send is not receive:
            _same(function, sent, received, blocks_received=context.size)
            before = _copy_to(received[context.rank * block : (context.rank + 1) * block], sent)
        return {
            "sendbuf": _send_spec(sendbuf, send),
            "recvbuf": receive.spec,
            "work": received,
            "before": before,
            "plain": _plain(sent, received),
            "library": device_of(received) is None,
            "terms": {"nbytes": block, "order": _order(function, send, receive)},
        }

    return read_call(function, "allgather", algorithm, read)


def bcast_call(context: Context, buf: Any, root: int, algorithm: str) -> Call:
    """Bcast(buf, root): in place, as bytes."""

    def read() -> dict[str, Any]:
        require_root(root, context.size, "Bcast")
        values = parse(buf, "Bcast", "buf", writable=context.rank != root)
        if values is None:
            told = opaque(buf, "Bcast", "buf")
            terms, packed = _moved_terms(told, 1, int(root)), packed_bcast(context, buf, told, int(root))
            return {"recvbuf": buf, "root": int(root), "terms": terms, "packed": packed}
        work = bytes_of(values.flat)
        return {
            "recvbuf": values.spec,
            "root": int(root),
            "work": work,
            "plain": _as_given(None, work),
            "library": device_of(work) is None,
            "terms": {"nbytes": work.size, "order": _order("Bcast", values, None), "root": int(root)},
        }

    return read_call("Bcast", "broadcast", algorithm, read)


def require_root(root: object, size: int, function: str) -> None:
    """Raise TypeError or ValueError, naming ``function``, unless ``root`` is one of ``size`` ranks."""
    if not isinstance(root, (int, np.integer)):
        raise TypeError(f"{function}: root must be a rank, an int; got {type(root).__name__}")
    if not 0 <= root < size:
        raise ValueError(f"{function}: root must be a rank from 0 to {size - 1}; got {root}")


def fast_path_of(context: Context) -> Any:
    """The fast path of ``Communicator.Allreduce``, for arrays and operations that it knows; None where there is none.

    Ranks that take it agree, in their arrival, with ranks whose arguments it declines.
    """
    fast_path = context.queue.fast_path
    if fast_path is None or not may_run_past_engine(fast_path.operation):
        return None
    if not context.fast_path_serves:
        context.fast_path_serves = True
        fast_path.limit(*fast_path_limits(context.topology, context.table))
        for op, dtype in itertools.product(REDUCTIONS, NUMERIC_DTYPES):
            ufunc = ufunc_name(op, dtype)
            kind = type_of(dtype)
            if ufunc is not None and kind is not None:
                terms = {"dtype": dtype, "count": 0, "order": "C", "op": op_name(op), "algorithm": "auto"}
                signature = Request("Allreduce", {**terms, "memory": HOST}).kind
                fast_path.serve(op, operation_of(ufunc), kind, signature)
    return fast_path


def know(fast_path: Any, context: Context, call: Call, run: CallRun) -> None:
    """Tell the fast path of a call whose ranks have agreed, for those like it; ``run``: its run, which is over.

    Of C-contiguous arrays in host memory; none of other algorithms than those that it stands in for.
    """
    work, terms = call.work, call.request.terms
    if work is None or device_of(work) is not None or terms["order"] != "C":
        return
    moves, served = call.collective in ("broadcast", "allgather"), call.collective == "allreduce"
    given = work.nbytes // context.size if call.collective == "allgather" else work.nbytes
    little = context.common is not None and given <= extension.NodeCollective.most
    bound, whole = None, None
    if served or not little:
        bound, whole = _way(context, call, run)
        checks_itself = run.chosen is not None and algorithms.get(run.chosen).self_checking
        if whole is None and (served or not checks_itself):
            return
    kind = type_of(work.dtype)
    if kind is not None and (moves or ufunc_name(call.op, work.dtype) is not None):
        collective = extension.Collective[call.collective]
        op = None if moves else call.op
        fast_path.know(collective, op, kind, work.size, call.root, call.request.signature, bound, whole)


def _way(context: Context, call: Call, run: CallRun) -> tuple[Any, Any]:
    """What runs calls like one whose run is over, once all ranks have said the same; twice None where there is none.

    The native operation, and the same when it is checked. Values of other collectives than these are not where a
    schedule works on them.
    """
    work, bound = call.work, run.bound if call.collective in ("allreduce", "broadcast") else None
    if context.roll_call is None or work is None or run.chosen is None or not call.own:
        return None, None
    if bound is None and algorithms.get(run.chosen).library:
        count = work.size // context.size if call.collective in ("allgather", "reduce_scatter") else work.size
        if count <= MOST_VALUES:
            bound = native_call(context.comm, call.collective, work.dtype, count, call.op, call.root)
    whole = None if bound is None else checked(context.roll_call, call.request, bound)
    return (bound, whole) if may_run_past_engine(whole) else (None, None)


def remember(fast_path: Any, context: Context, call: Call, run: CallRun, result: Array) -> None:
    """Tell the fast path of a call that reduces arrays like ``result``; ``run``: its run, which is over.

    What has come by the fast path is known there.
    """
    if run.chosen is None:
        return
    if device_of(result) is None and result.flags.c_contiguous and (kind := type_of(result.dtype)) is not None:
        fast_path.remember(call.op, kind, result.shape, call.request.signature, *_way(context, call, run))
