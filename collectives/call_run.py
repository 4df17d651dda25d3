"""The run of a call without a plan: ranks agree on it, choose the algorithm, and run that, or the library's own call.

Where such a call was run before, that is one call into the extension. Else it is a job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from mpi4py import MPI

from bitring.arrays import device_of
from bitring.collectives.call import Call
from bitring.collectives.execution.native import ALONE_SECONDS, DECLINED, DONE, may_run_past_engine
from bitring.collectives.execution.runner import Runner, SelfCheckingRunner, Task, make_runner
from bitring.collectives.interop.library_steps import allgather_steps
from bitring.collectives.interop.operators import op_name
from bitring.collectives.interop.steps import Progress, Steps, finish, wait_for
from bitring.collectives.runtime.agreement import agree, checked, conclude, verdict_of
from bitring.collectives.runtime.context import Context
from bitring.collectives.schedules.query import Query
from bitring.collectives.schedules.schedule import algorithms
from bitring.collectives.selection.selection import Choice, choose
from bitring.errors import PeerError, RefusedError
from bitring.native import extension, native

_CACHED_CHOICES = 1024
_CACHED_RUNNERS = 16
_CACHED_SCRATCH_NBYTES = 64 << 20
"""Limits of what a communicator keeps for calls without a plan; the runner used last stays whatever its size."""

Library = Callable[[MPI.Intracomm, Any, Any], MPI.Request]
"""Begins the MPI library's own call on a communicator, with a send and a receive buffer. It is not the blocking one, so
that ranks that are gone are noticed."""

_under_way: list[Any] = []
"""Calls that other ranks' library refused: theirs never end, and the library may still write to their memory."""


class CallRun:
    """One run of a call on a communicator."""

    def __init__(self, context: Context, call: Call) -> None:
        self._context = context
        self._call = call
        self._choice: Choice | None = None  # the algorithm, when settled
        self._handed_on = False  # to the MPI library: it is the library's own call
        self._runner: Runner | None = None
        self._key: tuple[Any, ...] = ()  # under which runners are kept
        self._idle: list[Runner] = []  # others kept there
        self._kept = False  # the runner, by an earlier call
        self._last: Runner | None = None  # the runner that was kept
        self._copied = False  # the call's ``before`` is done
        self._done = False

    @property
    def choice(self) -> Choice | None:
        """The algorithm, when settled; None where it is the library's own call."""
        return None if self._handed_on else self._choice

    @property
    def chosen(self) -> str | None:
        """The algorithm's name, when settled; None where only the library can run the call."""
        return None if self._choice is None else self._choice.name

    @property
    def bound(self) -> Any:
        """The native operation that has run the call, and may run others like it; None where there is none."""
        operation = None if self._last is None else self._last.operation
        return operation if native() is not None and isinstance(operation, extension.BoundCollective) else None

    def settle(self, progress: Progress, blocking: bool = True) -> Steps:
        """Agree with all ranks and choose the algorithm.

        ``blocking``: this rank does nothing else meanwhile, and may take part in setting up what runs it.
        """
        if self._context.size > 1:
            self._call.request.flag = self._lacks_runner(blocking)
            yield from agree(self._context.comm, self._context.roll_call, self._call.request, progress)
        elif self._call.request.error is not None:
            raise self._call.request.error
        self._choose(blocking)

    def _lacks_runner(self, blocking: bool) -> bool:
        """Whether this rank has kept no runner of the call, of an algorithm for which all ranks would make theirs anew.

        The others hear of it: what is new to one rank may be known to another.
        """
        if self._call.request.error is not None or self._call.request.library:
            return False
        self._choose(blocking)
        key = self._runner_key()
        return key is not None and algorithms.get(key[1]).sets_up and not self._context.cache.get(key)

    def _settle_arrived(self, operation: Any, progress: Progress) -> Steps:
        """As ``settle``, for a rank that has arrived by ``operation`` already, which may do all that is to be done."""
        yield from finish(operation, progress)
        if not operation.disagrees:
            if self._runner is not None:
                self._end()
            self._done = True
            return
        if self._runner is not None:
            self._keep_runner()
        yield from conclude(self._context.comm, self._call.request, verdict_of(operation.verdict), progress)
        self._choose(blocking=True)

    def _choose(self, blocking: bool) -> None:
        work = self._call.work
        if self._call.request.library or work is None:
            self._choice, self._handed_on = None, True
            return
        host = device_of(work) is None
        key = (
            self._call.algorithm,
            self._call.collective,
            work.nbytes,
            work.itemsize,
            self._call.own,
            self._call.library,
            host,
            blocking,
        )
        choice = self._context.choices.get(key)
        if choice is None:
            query = Query(
                collective=self._call.collective,
                nbytes=work.nbytes,
                topology=self._context.topology,
                own=self._call.own,
                library=self._call.library,
                itemsize=work.itemsize,
                host=host,
                blocking=blocking,
            )
            chosen = choose(self._call.algorithm, query, self._context.table)
            choice = chosen, algorithms.get(chosen.name).library
            if len(self._context.choices) >= _CACHED_CHOICES:
                self._context.choices.clear()
            self._context.choices[key] = choice
        self._choice, self._handed_on = choice

    def _take_runner(self) -> None:
        """Make what runs the chosen algorithm on the call's buffer, if it is not the library's own call.

        Collective for algorithms that need setting up.
        """
        work = self._call.work
        if self._choice is None or self._handed_on or work is None:
            return
        self._runner = make_runner(
            self._context, self._choice.name, Task(self._call.collective, work, self._call.op, self._call.root)
        )

    def _take_kept_runner(self) -> bool:
        """Take the runner of such a call before, if one was kept. Ranks may differ in that."""
        work, key = self._call.work, self._runner_key()
        if key is None:
            return False
        self._key = key
        idle: list[Runner] = self._context.cache.pop(self._key, [])
        if self._call.request.flag:  # some rank has none
            self._forget(idle)
            idle = []
        self._idle, self._kept = idle, bool(idle)
        if not idle:
            return False
        self._runner = idle.pop()
        self._runner.bind(work)
        return True

    def _runner_key(self) -> tuple[Any, ...] | None:
        """The key under which runners of the call are kept; None where it has none."""
        work = self._call.work
        if self._choice is None or self._handed_on or work is None:
            return None
        return (
            self._call.collective,
            self._choice.name,
            work.size,
            work.dtype,
            op_name(self._call.op),
            self._call.root,
            type(work),
        )

    def _steps(self, progress: Progress) -> Steps:
        """Run the runner that was taken, with the copies before and after it."""
        if self._runner is not None:
            self._copy_once()
            if self._context.size > 1:
                yield from self._runner.steps(progress)
            self._end()

    def _copy_once(self) -> None:
        """Do what the call does ``before``; no matter how many ways are tried: where buffers overlap, the first copy
        has changed the source.
        """
        if not self._copied and self._call.before is not None:
            self._call.before()
        self._copied = True

    def _end(self) -> None:
        """End a run: copy the result, keep the runner."""
        if self._call.after is not None:
            self._call.after()
        self._keep_runner()
        self._done = True

    def _keep_runner(self) -> None:
        cache = self._context.cache
        runner, self._runner, self._last = self._runner, None, self._runner
        assert runner is not None
        runner.unbind()
        cache[self._key] = [*self._idle, runner]  # the key used last is dropped last
        if self._kept:
            return
        scratch = sum(kept.scratch_nbytes for kept_alike in cache.values() for kept in kept_alike)
        while len(cache) > 1 and (len(cache) > _CACHED_RUNNERS or scratch > _CACHED_SCRATCH_NBYTES):
            dropped = cache.pop(next(iter(cache)))
            self._forget(dropped)
            scratch -= sum(kept.scratch_nbytes for kept in dropped)

    def _forget(self, runners: list[Runner]) -> None:
        """No call is to be run by these any more."""
        fast_path = self._context.queue.fast_path
        for runner in runners:
            if fast_path is not None and isinstance(runner.operation, extension.BoundCollective):
                fast_path.forget(runner.operation)

    def now(self, library: Library, arrival: Any = None) -> None:
        """Run the call in this thread; ``arrival``: the operation by which this rank has come to it already."""
        if arrival is None:
            arrival = self._run_past_engine()
            if self._done:
                return

        def whole(progress: Progress) -> Steps:
            operation = self._begin_repeated() if arrival is None else arrival
            if operation is None:
                yield from self.settle(progress)
            else:
                yield from self._settle_arrived(operation, progress)
            if self._handed_on:
                yield from self.library_steps(library, progress)
            elif not self._done and self._take_kept_runner():
                yield from self._steps(progress)

        try:
            self._context.queue.call(whole, self._call.request.function)
        except BaseException as error:
            if arrival is not None and not arrival.over:
                self._context.queue.cut_short(self._call.request.function, error, self)
            raise
        if not (self._done or self._handed_on):
            self._take_runner()
            if self._runner is not None:
                self._context.queue.call(self._steps, self._call.request.function, continues=True)

    def _run_past_engine(self) -> Any:
        """Run the call without a job, where a kept runner can.

        Returns None where none could, or the run is over (``_done``); else its operation, which goes on, or has found
        that ranks differ.
        """
        fast_path = self._context.queue.fast_path
        if fast_path is None or self._call.request.error is not None:
            return None
        repeats = self._repeats()
        if self._call.request.library:
            return None
        self._choose(blocking=True)
        if not self._take_kept_runner():
            if not repeats:
                return None
            self._take_runner()
        assert self._runner is not None
        if self._runner.operation is None:
            self._keep_runner()
            return None
        if algorithms.get(self._key[1]).self_checking:
            operation = cast(SelfCheckingRunner, self._runner).signed(self._call.request.signature)
        else:
            operation = checked(self._context.roll_call, self._call.request, self._runner.operation)
        if not may_run_past_engine(operation):
            self._keep_runner()
            return None
        self._copy_once()
        try:
            outcome = fast_path.runs(operation, ALONE_SECONDS).run()
        except BaseException as error:  # an interrupt: others may be in the run
            self._context.queue.cut_short(self._call.request.function, error, self)
            raise
        if outcome == DONE:
            self._end()
        elif outcome == DECLINED:
            self._keep_runner()
        else:
            fast_path.taken_over()
            return operation
        return None

    def _repeats(self) -> bool:
        """Whether the ranks make this call without asking each other first, which this one must not do, either.

        If it is such a call but for this rank's arguments, it becomes one.
        """
        call, roll_call = self._call, self._context.roll_call
        if call.request.error is not None or roll_call is None or not roll_call.repeating:
            return False
        if call.request.library and call.packed is not None:
            call = call.packed(call)
        if call.request.library or not roll_call.repeats(call.request.signature):
            return False
        self._call = call
        return True

    def _begin_repeated(self) -> Any:
        """The operation, begun, of a call that the ranks make without asking each other first; None for any other."""
        if not self._repeats():
            return None
        self._choose(blocking=True)
        if not self._take_kept_runner():
            self._take_runner()
        self._copy_once()
        operation = cast(SelfCheckingRunner, self._runner).signed(self._call.request.signature)
        operation.begin()
        return operation

    def library_steps(self, library: Library, progress: Progress) -> Steps:
        """Run the library's own call. Arguments that the library refuses on some ranks are errors on all."""
        call = self._call
        send, receive = call.sendbuf, call.recvbuf
        if not call.request.library and call.plain is not None:
            send, receive = call.plain(self._copy_once)
            self._copied = False  # where this is a request's run, the next one copies anew
        if call.own and not call.request.library:
            yield from wait_for(library(self._context.comm, send, receive), progress)  # there is nothing to refuse
            return
        # The ranks whose library accepts are a call ahead of the others', in a communicator that is then given up.
        comm = (yield from self._context.spare(progress)) if self._context.size > 1 else self._context.comm
        request, refusal = None, None
        try:
            request = library(comm, send, receive)
        except Exception as error:
            refusal = error
        refusals = yield from allgather_steps(self._context.comm, None if refusal is None else str(refusal), progress)
        refusing = [rank for rank, text in enumerate(refusals) if text is not None]
        if refusing and request is not None:
            _under_way.append((request, call, send, receive))
        if 0 < len(refusing) < self._context.size:
            self._context.drop_spare()
        if refusal is not None:
            raise RefusedError from refusal
        if refusing:
            function, rank = call.request.function, refusing[0]
            raise PeerError(f"{function}: rank {rank} could not take part: {refusals[rank]}")
        assert request is not None
        yield from wait_for(request, progress)

    def whole(self, library: Library, progress: Progress) -> Steps:
        """Run all of a call that does not block its caller."""
        yield from self.settle(progress, blocking=False)
        if self._handed_on:
            yield from self.library_steps(library, progress)
            return
        if not self._take_kept_runner():
            self._take_runner()
        yield from self._steps(progress)
