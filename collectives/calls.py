"""Collective calls without a plan: what ``Communicator.Allreduce`` and its like do with their arguments.

A call is read into a :class:`Call`: the 1-D array that a schedule works on, what is copied there before and from
there after, and the MPI library's own call for what bitring does not serve. Then all ranks agree on it, and run it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

from bitring.arrays import NUMERIC_DTYPES, Array, bytes_of, device_of, xp_of
from bitring.collectives.execution.native import ALONE_SECONDS, DECLINED, DONE
from bitring.collectives.execution.runner import Runner, Task, make_runner
from bitring.collectives.interop.buffers import Values, is_in_place, parse
from bitring.collectives.interop.library_steps import allgather_steps
from bitring.collectives.interop.operators import REDUCTIONS, op_name, require_defined, require_op, ufunc_name
from bitring.collectives.interop.steps import Progress, Steps, finish, wait_for
from bitring.collectives.plan import HOST, library_reduces, memory_name
from bitring.collectives.runtime.agreement import Request, agree, checked, conclude, verdict_of
from bitring.collectives.runtime.context import State
from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.selection.selection import check_name, choose, direct_limits
from bitring.errors import PeerError, RefusedError
from bitring.native import operation_of, type_of

_CACHED_CHOICES = 1024
_CACHED_RUNNERS = 16
_CACHED_SCRATCH_NBYTES = 64 << 20
"""What a communicator keeps for calls without a plan, the last used ones; the very last is kept whatever its size."""


Library = Callable[[MPI.Intracomm], MPI.Request]
"""Begins the MPI library's own call on a communicator. It is not the blocking one, so that ranks that are gone are
noticed."""

_under_way: list[Any] = []
"""Calls that other ranks' library refused: theirs never end, and the library may still write to their memory."""


class Call:
    """One collective call as this rank understands it.

    ``work`` is None where only the library reads this rank's arguments; ``sendbuf`` and ``recvbuf`` are what its call
    is given. ``own`` says whether bitring has the operation, ``library`` whether the MPI library has it. Once settled,
    ``choice`` is the algorithm, and ``handed_on`` says whether it is the library's own call; neither where all is done.
    ``plain`` returns instead of ``sendbuf`` and ``recvbuf`` arrays that the library cannot refuse.
    """

    def __init__(
        self,
        function: str,
        collective: str,
        algorithm: str,
        root: int = 0,
        sendbuf: Any = None,
        recvbuf: Any = None,
    ) -> None:
        self.request = Request(function)
        self.collective = collective
        self.algorithm = algorithm
        self.root = root
        self.sendbuf = sendbuf
        self.recvbuf = recvbuf
        self.op = MPI.SUM
        self.work: Array | None = None
        self.before: Callable[[], None] | None = None
        self.after: Callable[[], None] | None = None
        self.own = True
        self.library = True
        self.choice: str | None = None
        self.handed_on = False
        self.plain: Callable[[], tuple[Any, Any]] | None = None
        self.runner: Runner | None = None
        self._kept = False  # the runner, by an earlier call
        self._done = False

    def read(self, reader: Callable[[Call], None]) -> Call:
        """Let ``reader`` fill the call in; its complaint is kept for the agreement, so that all ranks raise."""
        try:
            check_name(self.algorithm, self.request.function)
            reader(self)
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            self.request.error = error
        self.request.library = self.work is None and self.request.error is None
        return self

    def terms(self, work: Array, **terms: object) -> None:
        """Work on ``work``; ``terms`` must be the same on all ranks, and so must memory and algorithm."""
        self.work = work
        self.request.terms = {**terms, "algorithm": self.algorithm, "memory": memory_name(work)}

    def settle(self, state: State, progress: Progress, blocking: bool = True) -> Steps:
        """Agree with all ranks and choose the algorithm.

        ``blocking``: this rank does nothing else meanwhile, and may take part in setting up what runs it.
        """
        if state.size > 1:
            yield from agree(state.comm, state.common, self.request, progress)
        elif self.request.error is not None:
            raise self.request.error
        self._choose(state, blocking)

    def settle_arrived(self, state: State, operation: Any, progress: Progress) -> Steps:
        """As ``settle``, for a rank that has arrived by ``operation`` already, which may do all that is to be done."""
        yield from finish(operation, progress)
        if not operation.disagrees:
            if self.runner is not None:
                self._end(state)
            self._done = True
            return
        if self.runner is not None:
            self._keep_runner(state)
        yield from conclude(state.comm, self.request, verdict_of(operation.verdict), progress)
        self._choose(state, blocking=True)

    def _choose(self, state: State, blocking: bool) -> None:
        work = self.work
        if self.request.library or work is None:
            self.choice, self.handed_on = None, True
            return
        host = device_of(work) is None
        key = self.algorithm, self.collective, work.nbytes, work.itemsize, self.own, self.library, host, blocking
        choice = state.choices.get(key)
        if choice is None:
            query = Query(
                collective=self.collective,
                nbytes=work.nbytes,
                topology=state.topology,
                own=self.own,
                library=self.library,
                itemsize=work.itemsize,
                host=host,
                blocking=blocking,
            )
            name = choose(self.algorithm, query, state.table).name
            choice = name, algorithms.get(name).library
            if len(state.choices) >= _CACHED_CHOICES:
                state.choices.clear()
            state.choices[key] = choice
        self.choice, self.handed_on = choice

    def take_runner(self, state: State) -> None:
        """Have what runs the chosen algorithm on the call's buffer: one kept from an earlier call, or a new one.

        Collective for algorithms that need setting up; none is to be had for the library's own call.
        """
        work = self.work
        if self.choice is None or self.handed_on or work is None:
            return
        self.runner = make_runner(state, self.choice, Task(self.collective, work, self.op, self.root))

    def take_kept_runner(self, state: State) -> bool:
        """Have what ran such a call before, if it is there; which is not so on all ranks alike."""
        work = self.work
        if self.choice is None or self.handed_on or work is None:
            return False
        self._key = (self.collective, self.choice, work.size, work.dtype, op_name(self.op), self.root, type(work))
        idle: list[Runner] = state.cache.pop(self._key, [])
        self._idle, self._kept = idle, bool(idle)
        if not idle:
            return False
        self.runner = idle.pop()
        self.runner.bind(work)
        return True

    def run(self, state: State, progress: Progress) -> Steps:
        """Run the chosen algorithm, with the copies before and after it."""
        if self.before is not None:
            self.before()
        if state.size > 1 and self.runner is not None:
            yield from self.runner.steps(progress)
        if self.after is not None:
            self.after()

    def steps(self, state: State, progress: Progress) -> Steps:
        """What follows ``settle`` and ``take_runner``, but for the library's own call, if that was the choice."""
        if self.runner is not None:
            yield from self.run(state, progress)
            self._keep_runner(state)
            self._done = True

    def _end(self, state: State) -> None:
        """The runner's operation is over, which was not run by ``steps``."""
        if self.after is not None:
            self.after()
        self._keep_runner(state)
        self._done = True

    def _keep_runner(self, state: State) -> None:
        runner, self.runner = self.runner, None
        assert runner is not None
        runner.unbind()
        state.cache[self._key] = [*self._idle, runner]  # the key used last is dropped last
        if self._kept:
            return
        scratch = sum(kept.scratch_nbytes for kept_alike in state.cache.values() for kept in kept_alike)
        while len(state.cache) > 1 and (len(state.cache) > _CACHED_RUNNERS or scratch > _CACHED_SCRATCH_NBYTES):
            scratch -= sum(kept.scratch_nbytes for kept in state.cache.pop(next(iter(state.cache))))

    def run_now(self, state: State, library: Library, arrival: Any = None) -> None:
        """Run the call in this thread; ``arrival``: the operation by which this rank has come to it already."""
        if arrival is None:
            arrival = self._run_past_engine(state)
            if self._done:
                return

        def whole(progress: Progress) -> Steps:
            if arrival is None:
                yield from self.settle(state, progress)
            else:
                yield from self.settle_arrived(state, arrival, progress)
            if self.handed_on:
                yield from self.library_steps(state, library, progress)
            elif not self._done and self.take_kept_runner(state):
                yield from self.steps(state, progress)

        try:
            state.lane.call(whole, self.request.function)
        except BaseException as error:
            if arrival is not None and not arrival.over:
                state.lane.cut_short(self.request.function, error)
            raise
        if not (self._done or self.handed_on):
            self.take_runner(state)
            if self.runner is not None:
                state.lane.call(lambda progress: self.steps(state, progress), self.request.function, continues=True)

    def _run_past_engine(self, state: State) -> Any:
        """Run the call without a job where all that it takes is there: the operation that did, None if none did.

        ``_done`` says whether it was enough; else the operation goes on, or has found that ranks differ.
        """
        shared = state.common
        if shared is None or self.request.error is not None or self.request.library:
            return None
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:  # another thread's run may be in the library
            return None
        self._choose(state, blocking=True)
        if not self.take_kept_runner(state):
            return None
        assert self.runner is not None
        if self.runner.operation is None:
            self._keep_runner(state)
            return None
        operation = checked(shared, self.request, self.runner.operation)
        if self.before is not None:
            self.before()
        try:
            outcome = shared.direct.runs(operation, ALONE_SECONDS).run()
        except BaseException as error:  # an interrupt, with the run half done
            state.lane.cut_short(self.request.function, error)
            raise
        if outcome == DONE:
            self._end(state)
        elif outcome == DECLINED:
            self._keep_runner(state)
        else:
            shared.direct.taken_over()
            return operation
        return None

    def library_steps(self, state: State, library: Library, progress: Progress) -> Steps:
        """The library's own call. What only some ranks' library refuses is raised on all."""
        if not self.request.library and self.plain is not None:
            self.sendbuf, self.recvbuf = self.plain()
        if self.own and not self.request.library:
            yield from wait_for(library(state.comm), progress)  # there is nothing to refuse
            return
        # The ranks whose library accepts are a call ahead of the others', in a communicator that is then given up.
        comm = (yield from state.spare(progress)) if state.size > 1 else state.comm
        request, refusal = None, None
        try:
            request = library(comm)
        except Exception as error:
            refusal = error
        refusals = yield from allgather_steps(state.comm, None if refusal is None else str(refusal), progress)
        refusing = [rank for rank, text in enumerate(refusals) if text is not None]
        if refusing and request is not None:
            _under_way.append((request, self))
        if 0 < len(refusing) < state.size:
            state.drop_spare()
        if refusal is not None:
            raise RefusedError from refusal
        if refusing:
            function, rank = self.request.function, refusing[0]
            raise PeerError(f"{function}: rank {rank} could not take part: {refusals[rank]}")
        assert request is not None
        yield from wait_for(request, progress)

    def whole(self, state: State, library: Library, progress: Progress) -> Steps:
        """All of a call that does not block its caller."""
        yield from self.settle(state, progress, blocking=False)
        if self.handed_on:
            yield from self.library_steps(state, library, progress)
            return
        if not self.take_kept_runner(state):
            self.take_runner(state)
        yield from self.steps(state, progress)


def _plain(call: Call, send: Array, receive: Array) -> Callable[[], tuple[Any, Any]]:
    """``Call.plain``: in place where it is all the same array, or where the two overlap, which the library refuses."""

    def plain() -> tuple[Any, Any]:
        if send is not receive and not np.may_share_memory(send, receive):
            return send, receive
        if call.before is not None:
            call.before()
        return MPI.IN_PLACE, receive

    return plain


def _copy_to(target: Array, source: Array) -> Callable[[], None]:
    def copy() -> None:
        target[:] = source

    return copy


def _send_spec(sendbuf: Any, send: Values) -> Any:
    return sendbuf if is_in_place(sendbuf) else send.spec


def _order(function: str, send: Values | None, receive: Values | None) -> str:
    """The memory order of a call's values, which all ranks must have alike: C where no buffer has two longer axes."""
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


def _same_arrays(function: str, sendbuf: Any, recvbuf: Any) -> None:
    """As ``_same``, for what only the library reads: it may crash on arrays of two dtypes without numbers."""
    sent, received = (getattr(buffer, "dtype", None) for buffer in (sendbuf, recvbuf))
    if sent is not None and received is not None and sent != received:
        raise ValueError(f"{function}: recvbuf must have values of {sent}, as sendbuf has; got {received}")


def set_operation(call: Call, op: MPI.Op, work: Array) -> None:
    """Say who can reduce ``work`` under ``op``. Raises TypeError when nobody can."""
    require_op(op, call.request.function)
    call.op = op
    call.own = op_name(op) != "user"
    call.library = library_reduces(work, op)
    if call.own:
        require_defined(op, work.dtype, call.request.function)
    elif not call.library:
        raise TypeError(
            f"{call.request.function}: op must be a predefined operation for {work.dtype} in {memory_name(work)}; "
            "got one made by MPI.Op.Create"
        )


def allreduce_call(state: State, function: str, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str) -> Call:
    """Allreduce(sendbuf, recvbuf): in place on ``recvbuf``."""

    def read(call: Call) -> None:
        receive = parse(recvbuf, function, "recvbuf", writable=True)
        send = receive if is_in_place(sendbuf) else parse(sendbuf, function, "sendbuf", writable=False)
        if receive is None or send is None:
            _same_arrays(function, sendbuf, recvbuf)
            return
        call.sendbuf, call.recvbuf = _send_spec(sendbuf, send), receive.spec
        work = receive.flat
        if send is not receive:
            _same(function, send.flat, work)
            call.before = _copy_to(work, send.flat)
        call.plain = _plain(call, send.flat, work)
        set_operation(call, op, work)
        call.terms(work, dtype=work.dtype, count=work.size, order=_order(function, send, receive), op=op_name(op))

    return Call(function, "allreduce", algorithm, sendbuf=sendbuf, recvbuf=recvbuf).read(read)


def reduce_call(state: State, sendbuf: Any, recvbuf: Any, op: MPI.Op, root: int, algorithm: str) -> Call:
    """Reduce(sendbuf, recvbuf, root): in place on the root's ``recvbuf``, on a copy of ``sendbuf`` elsewhere."""

    def read(call: Call) -> None:
        require_root(root, state.size, "Reduce")
        at_root = state.rank == root
        if is_in_place(sendbuf) and not at_root:
            raise ValueError(f"Reduce: sendbuf may be MPI.IN_PLACE on rank {root}, the root, only")
        receive = parse(recvbuf, "Reduce", "recvbuf", writable=True) if at_root else None
        send = receive if is_in_place(sendbuf) else parse(sendbuf, "Reduce", "sendbuf", writable=False)
        if send is None or (at_root and receive is None):
            if at_root:
                _same_arrays("Reduce", sendbuf, recvbuf)
            return
        call.sendbuf, call.recvbuf = _send_spec(sendbuf, send), recvbuf if receive is None else receive.spec
        given = send.flat
        work = xp_of(given).empty(given.size, given.dtype) if receive is None else receive.flat
        if work is not given:
            _same("Reduce", given, work)
            call.before = _copy_to(work, given)
        call.plain = (lambda: (given, None)) if receive is None else _plain(call, given, work)
        set_operation(call, op, work)
        order = _order("Reduce", send, receive)
        call.terms(work, dtype=work.dtype, count=work.size, order=order, op=op_name(op), root=int(root))

    return Call("Reduce", "reduce", algorithm, root, sendbuf, recvbuf).read(read)


def reduce_scatter_block_call(state: State, sendbuf: Any, recvbuf: Any, op: MPI.Op, algorithm: str) -> Call:
    """Reduce_scatter_block(sendbuf, recvbuf): on a copy of the ``size`` blocks, so that ``sendbuf`` stays as it is."""
    function, size, rank = "Reduce_scatter_block", state.size, state.rank

    def read(call: Call) -> None:
        in_place = is_in_place(sendbuf)
        receive = parse(recvbuf, function, "recvbuf", writable=True, blocks=size if in_place else 1)
        send = receive if in_place else parse(sendbuf, function, "sendbuf", writable=False, blocks=size)
        if receive is None or send is None:
            _same_arrays(function, sendbuf, recvbuf)
            return
        call.sendbuf, call.recvbuf = _send_spec(sendbuf, send), receive.spec
        given = send.flat
        if given.size % size:
            raise ValueError(f"{function}: sendbuf must hold {size} equal blocks; got {given.size} values")
        block = given.size // size
        if send is not receive:
            _same(function, given, receive.flat, blocks_sent=size)
        work = xp_of(given).empty(given.size, given.dtype)
        call.before = _copy_to(work, given)
        call.after = _copy_to(receive.flat[:block], work[rank * block : (rank + 1) * block])

        def plain() -> tuple[Any, Any]:
            if send is receive:
                return MPI.IN_PLACE, given
            if np.may_share_memory(given, receive.flat):
                work[:] = given
                return work, receive.flat
            return given, receive.flat

        call.plain = plain
        set_operation(call, op, work)
        call.terms(work, dtype=work.dtype, count=block, order=_order(function, send, receive), op=op_name(op))

    return Call(function, "reduce_scatter", algorithm, sendbuf=sendbuf, recvbuf=recvbuf).read(read)


def allgather_call(state: State, function: str, sendbuf: Any, recvbuf: Any, algorithm: str) -> Call:
    """Allgather(sendbuf, recvbuf): in place on ``recvbuf``, as bytes."""

    def read(call: Call) -> None:
        receive = parse(recvbuf, function, "recvbuf", writable=True, blocks=state.size)
        send = receive if is_in_place(sendbuf) else parse(sendbuf, function, "sendbuf", writable=False)
        if receive is None or send is None:
            _same_arrays(function, sendbuf, recvbuf)
            return
        call.sendbuf, call.recvbuf = _send_spec(sendbuf, send), receive.spec
        received = bytes_of(receive.flat)
        sent = received if send is receive else bytes_of(send.flat)
        call.plain = _plain(call, sent, received)
        if received.size % state.size:
            raise ValueError(
                f"{function}: recvbuf must hold {state.size} equal blocks; got {receive.flat.size} values of "
                f"{receive.flat.dtype}"
            )
        block = received.size // state.size
        if send is not receive:
            _same(function, sent, received, blocks_received=state.size)
            call.before = _copy_to(received[state.rank * block : (state.rank + 1) * block], sent)
        call.library = device_of(received) is None
        call.terms(received, nbytes=block, order=_order(function, send, receive))

    return Call(function, "allgather", algorithm, sendbuf=sendbuf, recvbuf=recvbuf).read(read)


def bcast_call(state: State, buf: Any, root: int, algorithm: str) -> Call:
    """Bcast(buf, root): in place, as bytes."""

    def read(call: Call) -> None:
        require_root(root, state.size, "Bcast")
        values = parse(buf, "Bcast", "buf", writable=state.rank != root)
        if values is not None:
            call.recvbuf = values.spec
            work = bytes_of(values.flat)
            call.plain = lambda: (None, work)
            call.library = device_of(work) is None
            call.terms(work, nbytes=work.size, order=_order("Bcast", values, None), root=int(root))

    return Call("Bcast", "broadcast", algorithm, root, recvbuf=buf).read(read)


def require_root(root: object, size: int, function: str) -> None:
    """Raise TypeError or ValueError, naming ``function``, unless ``root`` is one of ``size`` ranks."""
    if not isinstance(root, (int, np.integer)):
        raise TypeError(f"{function}: root must be a rank, an int; got {type(root).__name__}")
    if not 0 <= root < size:
        raise ValueError(f"{function}: root must be a rank from 0 to {size - 1}; got {root}")


def direct_of(state: State) -> Any:
    """The native way of ``Communicator.Allreduce``, for arrays and operations that it knows; None where it would lose.

    Ranks that take it agree, in their arrival, with ranks whose arguments it declines.
    """
    shared = state.common
    if shared is None:
        return None
    if not shared.direct_serves:
        shared.direct_serves = True
        shared.direct.limit(*direct_limits(state.topology, state.table))
        for op, dtype in itertools.product(REDUCTIONS, NUMERIC_DTYPES):
            ufunc = ufunc_name(op, dtype)
            kind = type_of(dtype)
            if ufunc is not None and kind is not None:
                terms = {"dtype": dtype, "count": 0, "order": "C", "op": op_name(op), "algorithm": "auto"}
                signature = Request("Allreduce", {**terms, "memory": HOST}).kind
                shared.direct.serve(op, operation_of(ufunc), kind, signature)
    return shared.direct
