"""A job that is to end soon: all ranks learn of the signal at the same place, and can save together.

Batch systems send SIGTERM or SIGUSR1 some time before they end a job, to all ranks or to one. Ranks that looked at
their own signals would stop at different steps and wait for each other. So a signal is only noted, and ``requested``
is an answer that all ranks got in the same exchange. Where a trainer steps, that is the record that its ranks
exchange anyway; elsewhere asking is a small collective of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from mpi4py import MPI

from bitring.collectives.interop.steps import Progress, Steps
from bitring.collectives.runtime.agreement import Request, agree
from bitring.collectives.runtime.context import context_of, given_comm

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

NOTICE = 1 << 16
"""The bit of a trainer's notices that says that a signal came to a rank."""

SAME_SECONDS = 1.0
"""Signals so close together are one: a launcher passes on what the batch system sends to every process as well."""

_SIGACTION_NBYTES = 256  # more than any C library's struct sigaction has

_libc = ctypes.CDLL(None)

_active: list[Preemption] = []


class Preemption:
    """Within ``with Preemption(comm) as preemption:``, SIGTERM and SIGUSR1 end no process but are noted.

    ``preemption.requested`` says whether one came to any rank of ``comm`` (MPI.COMM_WORLD if None). Entering is
    collective, and is for the main thread, which Python lets mind signals: RuntimeError elsewhere, and PeerError on
    the other ranks. Leaving is not collective. Signal handlers of before are in place again after the block, those
    written in C as well; inside it, Python's are called too.

    A second signal, at least a second after the first, does what it would have done without the block: unless there is
    a handler for it, the process ends at once.
    """

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        self.comm = given_comm(comm, "Preemption")
        self.answer_is_new = False
        """A trainer on the same ranks has made a step since the answer was last asked for."""
        self._answer = False
        self._noted_at: float | None = None
        self._entered = False
        self._before: dict[int, Any] = {}
        self._actions: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came to any rank: the same answer on all ranks, at the same place. It stays True.

        After a step of a ``DataParallel`` on the same ranks: the answer of its last exchange, which costs nothing; in
        modes that exchange every τ steps a signal is therefore heard of at the next exchange. Asked again without a
        step in between, or without a trainer: collective, one small exchange, and all ranks must ask. After the block:
        the last answer.

        Raises RuntimeError before the block is entered; what a collective raises, on all ranks: MismatchError when
        another rank is in another call, PeerError when one has died.
        """
        if not self._entered:
            raise RuntimeError("Preemption.requested: expected inside the block `with Preemption(comm) as preemption:`")
        if self in _active and not (self._answer or self.answer_is_new):
            request = Request("Preemption.requested", flag=self.noted)
            _meet(self.comm, request)
            self.learn(request.flag)
        self.answer_is_new = False
        return self._answer

    @property
    def noted(self) -> bool:
        """Whether a signal came to this rank; the others may not know yet."""
        return self._noted_at is not None

    def learn(self, answer: bool) -> None:
        """Take the answer that all ranks are given in the same exchange."""
        self._answer |= answer

    def __enter__(self) -> Preemption:
        error: Exception | None = None
        if self._entered:
            error = RuntimeError(
                "Preemption: expected a new one for each `with` block; got one that was entered before"
            )
        elif threading.current_thread() is not threading.main_thread():
            error = RuntimeError(
                f"Preemption: expected in the main thread, which alone can mind signals; "
                f"got the thread {threading.current_thread().name!r}"
            )
        if error is None:
            self._install()
        try:
            _meet(self.comm, Request("Preemption", error=error))
        except BaseException:
            if error is None:
                self._restore()
            raise
        self._entered = True
        _active.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _active.remove(self)
        self._restore()

    def _install(self) -> None:
        for number in SIGNALS:
            self._actions[number] = _action(number)
            self._before[number] = signal.getsignal(number)
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler; Python calls it between two instructions of the main thread."""
        now = time.monotonic()
        if self._noted_at is None:
            self._noted_at = now
        elif now - self._noted_at > SAME_SECONDS:
            self._restore()
            signal.raise_signal(number)
            return
        before = self._before[number]
        if callable(before):
            before(number, frame)

    def _restore(self) -> None:
        """Put the handlers of before in place again, but where somebody has put another one in place of ours."""
        for number, action in self._actions.items():
            if signal.getsignal(number) == self._note:
                before = self._before[number]
                signal.signal(number, signal.SIG_DFL if before is None else before)
                _libc.sigaction(number, action, None)
        self._actions.clear()


def _restore_in_child() -> None:
    """A forked child is no rank: signals end it, as its parent expects that stops it by them."""
    while _active:
        _active.pop()._restore()


os.register_at_fork(after_in_child=_restore_in_child)


def watching(comm: MPI.Intracomm) -> list[Preemption]:
    """The blocks entered on the ranks of ``comm``; the same on all of them."""
    if not _active:
        return []
    congruent = (MPI.IDENT, MPI.CONGRUENT, MPI.SIMILAR)
    return [each for each in _active if MPI.Comm.Compare(each.comm, comm) in congruent]


def _action(number: int) -> Any:
    """The process's way with a signal as the C library keeps it: Python does not know of handlers written in C."""
    action = ctypes.create_string_buffer(_SIGACTION_NBYTES)
    _libc.sigaction(number, None, action)
    return action


def _meet(comm: MPI.Intracomm, request: Request) -> None:
    """Have the ranks agree on ``request``; see ``agree``. Collective."""
    context = context_of(comm)
    if context.size == 1:
        if request.error is not None:
            raise request.error
        return

    def steps(progress: Progress) -> Steps:
        yield from agree(context.comm, context.roll_call, request, progress)

    with context.turn(request.function):
        context.prepare(request.function)
        context.queue.submit(steps, request.function).wait()
